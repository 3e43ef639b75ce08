"""Pretrain a GPT on a dataset directory: next-token prediction, checkpoints, metrics, a plot of the loss.

    python train.py --data out/data --out_dir out/run
    python train.py --data out/wiki:3 out/books --out_dir out/run
    python train.py config/shakespeare_char.toml --max_steps=500

The options are TrainOptions and those shared with fine-tuning, papagaio/training/options.py. `fit` is the training loop.
"""

import shlex
import sys
from functools import partial
from typing import Any, Literal

from pydantic import model_validator

from papagaio.batches.mixture import parse_source
from papagaio.errors import UserError, run
from papagaio.options import option, parse
from papagaio.training.options import RunOptions

# Defaults of a preset for training, if they differ from RunOptions'. What a preset means for the model is in model.py.
RECIPES: dict[str, dict[str, Any]] = {
    "modern": {},
    "frontier": {},
    "gpt2": dict(
        **dict(optimizer="adamw", learning_rate=6e-4, min_learning_rate=6e-5, schedule="cosine", warmup_steps=100),
        **dict(weight_decay=0.1, beta1=0.9, grad_clip=1.0),
    ),
}
_model = partial(option, group="Model")


class TrainOptions(RunOptions):
    """Options of train.py."""

    data: tuple[str, ...] = option(
        ...,
        "dataset directories, made by data/prepare.py; of DIR:3 an epoch has each window three times",
        group="Run",
        resume="content",
        min_length=1,
    )
    budget: str | None = option(
        None,
        "training time, such as 90s, 10m or 2h: chooses the model, and all other options that are not given, to use it",
        group="One dial",
        resume="ignored",
        pattern=r"^\d+(\.\d+)?[smh]$",
    )
    depth: int | None = option(
        None,
        "number of blocks: chooses all other options that are not given to fit it, the corpus and the device",
        group="One dial",
        resume="ignored",
        ge=1,
        le=64,
    )
    preset: Literal["modern", "gpt2", "frontier"] = _model("modern", "architecture, and defaults of the options for training")
    n_layer: int = _model(6, "blocks", ge=1)
    n_head: int = _model(6, "attention heads", ge=1)
    n_kv_head: int | None = _model(None, "key-value heads, fewer than n_head for grouped-query attention", ge=1)
    n_embd: int = _model(384, "channels", ge=1)
    block_size: int = _model(256, "context length, in tokens", ge=1)
    position: Literal["rope", "learned", "sinusoidal", "none"] | None = _model(
        None, "positional encoding (default: the preset's, which is learned for gpt2, else rope)"
    )
    dropout: float = _model(0.0, "fraction of activations that are set to 0 in training", ge=0, lt=1)
    document_mask: bool = _model(False, "a token attends to its own document only, if a window holds several")

    @model_validator(mode="after")
    def _shape(self) -> "TrainOptions":  # as GPTConfig does, but before torch is imported
        for word in self.data:
            parse_source(word)
        if self.depth and self.budget:
            raise ValueError("depth and budget exclude each other")
        if self.depth or self.budget:  # checked again with what they choose
            return self
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(TrainOptions, doc=__doc__)

from collections.abc import Callable

import torch

from model import GPT, PRESETS, GPTConfig
from papagaio import runtime
from papagaio.batches.prefetch import Prefetch
from papagaio.batches.windows import Loader, Objective, WindowLoader, likelihood
from papagaio.generation.engine import Engine, Request
from papagaio.generation.options import SamplingOptions
from papagaio.runs.directory import locked, open_run, refuse_taken, run_state
from papagaio.runs.saver import Saver
from papagaio.tokenizer import Tokenizer
from papagaio.training import dial
from papagaio.training.corpora import Corpora, Validation
from papagaio.training.dry_run import dry_run, seconds_per_step
from papagaio.training.metrics import RunLog
from papagaio.training.optimizers import make_optimizers, schedule, set_learning_rate
from papagaio.training.progress import Identity, Progress
from papagaio.training.step import TrainingStep, prepare_model


def main(config: TrainOptions) -> None:
    if not config.dry_run:
        refuse_taken(config)
    corpora = Corpora(config.data)
    tokenizer, device, speed = corpora.tokenizer, runtime.pick_device(config.device), None
    if config.depth or config.budget:
        config, speed = turn_dial(config, corpora, device)
    config = config.with_defaults(RECIPES[config.preset])
    loader = make_loader(config, corpora)
    shares = [visits / loader.n_windows for visits in loader.mixture.visits.tolist()]
    for name, share in zip(corpora.names, shares, strict=True) if len(shares) > 1 else []:
        print(f"{name}: {share:.1%} of the training windows", file=sys.stderr)
    # A forward pass alone takes a third of the memory of one with its gradient, and larger batches are faster.
    size = max(2 * (config.micro_batch_size or config.batch_size), 4096 // config.block_size)
    validation = Validation(corpora, shares, config.block_size, size, config.eval_tokens, config.document_mask)
    torch.manual_seed(config.seed)
    if config.dry_run:
        dry_run(partial(make_model, config, tokenizer), loader, likelihood, config, device, validation.tokens, speed)
        return
    gpt = make_model(config, tokenizer).to(device)
    parameters = sum(p.numel() for p in gpt.parameters())
    print(f"preset {config.preset}, {parameters:,} parameters, on {device}", file=sys.stderr)
    print(f"{config.max_steps:,} steps are {loader.epochs(config.max_steps):.2f} epochs of the training split", file=sys.stderr)
    if validation.tokens < validation.whole:
        measured = f"{validation.tokens:,} of {validation.whole:,} validation tokens"
        print(f"val_loss is measured on {measured} (--eval_tokens)", file=sys.stderr)
    dtype = runtime.pick_dtype(config.dtype, device)
    sampling = SamplingOptions(max_new_tokens=max(1, config.sample_tokens), seed=config.seed)

    def preview() -> str:
        """A text that the model writes from nothing, at temperature 0.8."""
        start, *others = tokenizer.special.values()
        requests = [Request([start], config.seed)]
        steps = Engine(gpt, tokenizer).complete(requests, sampling, end={start}, banned=others)
        return "".join(step.text for step in steps)

    identity = Identity(stage="pretrain", data_sha256=corpora.sha256)
    with locked(config), Prefetch(loader, device) as batches:
        fit(gpt, batches, lambda: validation(gpt, dtype), preview, tokenizer, config, identity)
    run_dir = shlex.quote(str(config.out_dir))
    print(f"next: sample.py --checkpoint {run_dir}, or finetune.py --init_from {run_dir}", file=sys.stderr)


def make_model(config: TrainOptions, tokenizer: Tokenizer, **changes: Any) -> GPT:
    """The model that the options describe, with its initial weights; `changes` replaces fields of its GPTConfig."""
    shape = config.model_dump(include={"n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "dropout"})
    position = {"position": config.position} if config.position else {}
    fields = {"vocab_size": tokenizer.vocab_size} | shape | PRESETS[config.preset] | position | changes
    try:
        return GPT(GPTConfig(**fields))
    except ValueError as error:
        raise UserError(str(error)) from None


def make_loader(config: TrainOptions, corpora: Corpora) -> WindowLoader:
    return corpora.loader(config.block_size, config.batch_size, config.seed, config.document_mask)


def turn_dial(config: TrainOptions, corpora: Corpora, device: torch.device) -> tuple[TrainOptions, float | None]:
    """The options, completed by what --depth or --budget chooses for these datasets and this machine, and the tokens per second
    that it has measured for them."""

    def tokens_per_second(values: dict[str, Any]) -> float:
        trial = config.model_copy(update=values | {"max_steps": 1}).with_defaults(RECIPES[config.preset])
        loader, make = make_loader(trial, corpora), partial(make_model, trial, corpora.tokenizer)
        return trial.batch_size * trial.block_size / seconds_per_step(make, loader, likelihood, trial, device)

    vocab_size, on_gpu = corpora.tokenizer.vocab_size, device.type == "cuda"
    return dial.complete(config, corpora.epoch_tokens, vocab_size, on_gpu, tokens_per_second)


def fit(
    model: GPT,
    batches: Loader,
    evaluate: Callable[[], dict[str, float]],
    preview: Callable[[], str],
    tokenizer: Tokenizer,
    config: RunOptions,
    identity: Identity,
    objective: Objective = likelihood,
) -> Progress:
    """Train `model` in place for config.max_steps: the loop of pretraining and of fine-tuning. Returns the final progress.

    `evaluate()` measures val_loss and other figures; the text of `preview()` is shown with them. Writes config.toml, loss.png,
    metrics.jsonl and checkpoints/ in config.out_dir, which must be `locked`. One of errors.STOP_SIGNALS saves and exits.
    """
    optimizers = make_optimizers(model, config)
    progress = open_run(model, optimizers, tokenizer, config, identity)
    prepare_model(model, config)
    flops, peak = model.flops_per_token(), runtime.peak_flops(next(model.parameters()).device)
    with (
        runtime.StopSignal() as stop,
        RunLog(config, progress, identity.stage) as log,
        Saver(config, tokenizer, log, progress.step or None) as saver,
    ):
        train_step = TrainingStep(model, optimizers, objective, config, progress, log.say)
        while True:
            last = progress.step == config.max_steps
            due = (progress.step % config.eval_interval == 0 or last) and progress.evaluated_step != progress.step
            checkpoint_due = config.checkpoint_interval and progress.step % config.checkpoint_interval == 0
            if last or stop.received or (progress.step and (due or checkpoint_due)):  # before an evaluation, which can be long
                progress.loss_scale, progress.metrics_lines = train_step.scaler.state_dict() or None, log.lines
                saver.save(model, optimizers, run_state(progress, identity, config))
            if due and not stop.received:
                try:
                    with stop.at_once(), log.paused():
                        measured, text = evaluate(), preview() if config.sample_tokens else ""
                except runtime.Stopped:
                    continue
                best = log.write_evaluation(progress, text, epoch=batches.epochs(progress.step), **measured)
                if progress.step or last:  # it was saved above
                    if best:
                        saver.mark_best()
                    saver.plot()
            if last or stop.received or progress.gave_up(config.patience):
                break

            factor = schedule(progress.step, config)
            set_learning_rate(optimizers, factor)
            sequences = batches(progress.step)
            step = train_step(sequences, partial(batches.places, progress.step))
            predicted = sum(int((batch.targets != -100).sum()) for batch in sequences)
            progress.add_step(step.losses, predicted)
            log.advance(sum(batch.ids.numel() for batch in sequences))
            if (progress.step % config.log_interval == 0 or progress.step == config.max_steps) and progress.loss_count:
                figures = {"learning_rate": factor * config.learning_rate, "epoch": batches.epochs(progress.step)}
                log.write_training(progress, flops, peak, **figures, grad_norm=step.grad_norm)
        saver.finish()

    if stop.received:
        print(f"stopped by a signal; saved at step {progress.step}, --resume continues", file=sys.stderr)
        sys.exit(128 + stop.received)
    if progress.step < config.max_steps:
        waited = f"no lower validation loss in {config.patience} evaluations since step {progress.best_step:,}"
        print(f"stopped early: {waited}; the run's directory now means checkpoints/best", file=sys.stderr)
    return progress


if __name__ == "__main__":
    run(main, OPTIONS)

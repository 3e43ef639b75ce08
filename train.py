"""Pretrain a GPT on a dataset directory: next-token prediction, checkpoints, metrics, a plot of the loss.

    python train.py --data out/data --out_dir out/run
    python train.py --data out/wiki:3 out/books --out_dir out/run
    python train.py config/shakespeare_char.toml --max_steps=500
    python train.py --data out/mine --init_from out/smol --out_dir out/more

The options are TrainOptions and those shared with fine-tuning, papagaio/training/options.py. `fit` is the training loop.
"""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from papagaio.batches.mixture import parse_source
from papagaio.errors import UserError, run
from papagaio.launch import silence_other_ranks
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
RECIPES["llama"] = RECIPES["gpt2"]
# The model's shape comes from the checkpoint: a fifth of the rate, so that it keeps what it knows.
CONTINUED = {"muon": dict(learning_rate=0.005, embedding_learning_rate=0.035, head_learning_rate=0.0025)}
CONTINUED["adamw"] = RECIPES["gpt2"] | dict(learning_rate=1e-4, min_learning_rate=1e-5)
_model = partial(option, group="Model")
SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd")


class TrainOptions(RunOptions):
    """Options of train.py."""

    data: tuple[str, ...] = option(
        ...,
        "dataset directories, made by data/prepare.py; of DIR:3 an epoch has each window three times",
        group="Run",
        resume="content",
        min_length=1,
    )
    init_from: Path | None = option(
        None, "checkpoint to continue pretraining from: a run, or a checkpoint directory", group="Run", resume="content"
    )
    init_optimizer: bool = option(False, "with init_from: keep the state of its optimizer too", group="Run")
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
    preset: Literal["modern", "gpt2", "llama", "frontier"] = _model(
        "modern", "architecture, and defaults of the options for training"
    )
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
        if self.init_optimizer and not self.init_from:
            raise ValueError("init_optimizer needs a checkpoint: give an init_from")
        if self.init_from or self.depth or self.budget:  # checked again with what they choose
            return self
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    silence_other_ranks()
    OPTIONS = parse(TrainOptions, doc=__doc__)

from collections.abc import Callable

import torch

from model import GPT, PRESETS, GPTConfig
from papagaio import runtime
from papagaio.batches.prefetch import Prefetch
from papagaio.batches.windows import Loader, Objective, WindowLoader, likelihood
from papagaio.generation.engine import Engine, Request
from papagaio.generation.options import SamplingOptions
from papagaio.runs.checkpoint import Checkpoint, model_maker
from papagaio.runs.directory import locked, open_checkpoint, open_run, refuse_taken, restarted, run_state
from papagaio.runs.saver import Saver
from papagaio.tokenizer import Tokenizer
from papagaio.training import dial
from papagaio.training.corpora import Corpora, Validation
from papagaio.training.dry_run import dry_run, seconds_per_step
from papagaio.training.metrics import RunLog, flops_per_token
from papagaio.training.optimizers import make_optimizers, schedule, set_learning_rate
from papagaio.training.parallel import ALONE, World, together
from papagaio.training.progress import Identity, Progress
from papagaio.training.sharding import is_sharded, place
from papagaio.training.step import TrainingStep, prepare_model


def main(config: TrainOptions, world: World = ALONE) -> None:
    config = restarted(config, world)
    if not config.dry_run:
        world.on_rank_0(partial(refuse_taken, config))
    corpora = Corpora(config.data)
    tokenizer, device, speed = corpora.tokenizer, world.pick_device(config.device), None
    checkpoint = open_checkpoint(config.init_from) if config.init_from else None
    if (config.depth or config.budget) and checkpoint is None:
        config, speed = turn_dial(config, corpora, device, world)
    config = config.with_defaults(recipe(config, checkpoint, tokenizer))
    loader = make_loader(config, corpora)
    shares = [visits / loader.n_windows for visits in loader.mixture.visits.tolist()]
    for name, share in zip(corpora.names, shares, strict=True) if len(shares) > 1 else []:
        print(f"{name}: {share:.1%} of the training windows", file=sys.stderr)
    # A forward pass alone takes a third of the memory of one with its gradient, and larger batches are faster.
    size = max(2 * (config.micro_batch_size or config.batch_size), 4096 // config.block_size)
    validation = Validation(corpora, shares, config.block_size, size, config.eval_tokens, config.document_mask)
    torch.manual_seed(config.seed)
    if config.dry_run:
        make, loader = partial(make_model, config, tokenizer, checkpoint), world.share(loader)
        world.on_rank_0(lambda: dry_run(make, loader, likelihood, config, device, validation.tokens, speed, world.size))
        return
    gpt = make_model(config, tokenizer, checkpoint)
    if checkpoint is not None:
        checkpoint.load_model(gpt)
    place(gpt, config, device, world)
    parameters = sum(p.numel() for p in gpt.parameters())
    what = f"preset {config.preset}" if checkpoint is None else f"from {checkpoint.path}"
    print(f"{what}, {parameters:,} parameters, on {device}", file=sys.stderr)
    print(f"{config.max_steps:,} steps are {loader.epochs(config.max_steps):.2f} epochs of the training split", file=sys.stderr)
    if validation.tokens < validation.whole:
        measured = f"{validation.tokens:,} of {validation.whole:,} validation tokens"
        print(f"val_loss is measured on {measured} (--eval_tokens)", file=sys.stderr)
    dtype = runtime.pick_dtype(config.dtype, device)
    sampling = SamplingOptions(max_new_tokens=max(1, config.sample_tokens), seed=config.seed)

    def preview() -> str:
        """A text that the model writes from nothing, at temperature 0.8."""
        start = tokenizer.start
        others = {*tokenizer.special.values()} - {start}
        requests = [Request([start], config.seed)]
        steps = Engine(gpt, tokenizer).complete(requests, sampling, end={start}, banned=others)
        return "".join(step.text for step in steps)

    base = {} if checkpoint is None else checkpoint.origin
    identity = Identity(stage="pretrain", data_sha256=corpora.sha256, **base)
    moments = checkpoint if config.init_optimizer else None
    with world.entering(locked(config)), Prefetch(world.share(loader), device) as batches:
        fit(gpt, batches, lambda: validation(gpt, dtype, world), preview, tokenizer, config, identity, world=world, init=moments)
    run_dir = shlex.quote(str(config.out_dir))
    print(f"next: sample.py --checkpoint {run_dir}, or finetune.py --init_from {run_dir}", file=sys.stderr)


def recipe(config: TrainOptions, checkpoint: Checkpoint | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Defaults of the options that the user has not set: the preset's, or those for a checkpoint whose training goes on. Raises
    UserError if its tokenizer is not the dataset's."""
    if checkpoint is None:
        return RECIPES[config.preset]
    if taken := config.model_fields_set & {*SHAPE, "preset", "position", "depth", "budget"}:
        raise UserError(f"--init_from={config.init_from} brings its own model: {min(taken)} cannot be chosen")
    if checkpoint.tokenizer.sha256 != tokenizer.sha256:
        cure = f"prepare the text with data/prepare.py --tokenizer {config.init_from}"
        raise UserError(f"{config.data}: its tokenizer is not that of {config.init_from}; {cure}")
    checkpoint.outline(model_maker(GPT, GPTConfig))  # refuses a model.json that the weights do not fit
    fields = checkpoint.model_fields
    optimizer = config.optimizer if "optimizer" in config.model_fields_set else checkpoint.state.get("optimizer", "muon")
    shape = {name: fields[name] for name in SHAPE} | {"block_size": min(1024, fields["block_size"])}
    return shape | {"optimizer": optimizer} | CONTINUED[optimizer]


def make_model(config: TrainOptions, tokenizer: Tokenizer, checkpoint: Checkpoint | None = None, **changes: Any) -> GPT:
    """The model that the options or the checkpoint describe, with initial weights; `changes` replaces fields of its GPTConfig."""
    shape = config.model_dump(include={*SHAPE, "block_size", "dropout"})
    position = {"position": config.position} if config.position else {}
    fields = {"vocab_size": tokenizer.vocab_size} | shape | PRESETS[config.preset] | position | changes
    if checkpoint is not None:
        fields = checkpoint.model_fields | {"dropout": config.dropout} | changes
        if config.block_size > fields["block_size"]:
            raise UserError(f"--block_size={config.block_size}: the model has a context of {fields['block_size']} tokens")
    try:
        return GPT(GPTConfig(**fields))
    except ValueError as error:
        raise UserError(str(error)) from None


def make_loader(config: TrainOptions, corpora: Corpora) -> WindowLoader:
    return corpora.loader(config.block_size, config.batch_size, config.seed, config.document_mask)


def turn_dial(
    config: TrainOptions, corpora: Corpora, device: torch.device, world: World = ALONE
) -> tuple[TrainOptions, float | None]:
    """The options, completed by what --depth or --budget chooses for these datasets and this machine, and the tokens per second
    that it has measured for them. Rank 0 measures, and the others are taken to be as fast."""

    def tokens_per_second(values: dict[str, Any]) -> float:
        trial = config.model_copy(update=values | {"max_steps": 1}).with_defaults(RECIPES[config.preset])
        loader, make = make_loader(trial, corpora), partial(make_model, trial, corpora.tokenizer)
        tokens = world.size * trial.batch_size * trial.block_size
        return tokens / seconds_per_step(make, loader, likelihood, trial, device)

    def completed() -> tuple[dict[str, Any], float | None]:
        vocab_size, on_gpu = corpora.tokenizer.vocab_size, device.type == "cuda"
        chosen, speed = dial.complete(config, corpora.epoch_tokens, vocab_size, on_gpu, tokens_per_second)
        return chosen.model_dump(include=set(dial.CHOSEN) & chosen.model_fields_set), speed

    chosen, speed = world.on_rank_0(completed)
    return config.with_defaults(chosen), speed


def fit(
    model: GPT,
    batches: Loader,
    evaluate: Callable[[], dict[str, float]],
    preview: Callable[[], str],
    tokenizer: Tokenizer,
    config: RunOptions,
    identity: Identity,
    objective: Objective = likelihood,
    world: World = ALONE,
    init: Checkpoint | None = None,
) -> Progress:
    """Train `model` in place for config.max_steps: the loop of pretraining and of fine-tuning. Returns the final progress.

    `evaluate()` measures val_loss and other figures; the text of `preview()` is shown with them. Writes config.toml, loss.png,
    metrics.jsonl and checkpoints/ in config.out_dir, which must be `locked`. One of errors.STOP_SIGNALS saves and exits. A
    new run begins with the optimizer's state of the checkpoint `init`. All ranks of `world` call it, each with its part of the
    batches; rank 0 writes.
    """
    optimizers = make_optimizers(model, config, world)
    if init is not None:
        init.load_optimizers(model, optimizers)  # a resumed run replaces it
    progress = open_run(model, optimizers, tokenizer, config, identity, world)
    prepare_model(model, config)
    flops, peak = flops_per_token(model), runtime.peak_flops(next(model.parameters()).device)
    with (
        runtime.StopSignal(alone=world.size == 1) as stop,
        RunLog(config, progress, identity.stage, writes=world.rank == 0) as log,
        Saver(config, tokenizer, log, progress.step or None, world) as saver,
    ):
        train_step = TrainingStep(model, optimizers, objective, config, progress, log.say, world, stop)
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
                        shows = config.sample_tokens and not is_sharded(model)
                        measured, text = evaluate(), world.on_rank_0(preview) if shows else ""
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
            progress.add_step(step.losses, step.targets)
            log.advance(world.size * sum(batch.ids.numel() for batch in sequences))
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
    run(together(main), OPTIONS)

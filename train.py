"""Pretrain a GPT on a dataset directory: next-token prediction, checkpoints, metrics, a plot of the loss.

    python train.py --data out/data --out_dir out/run
    python train.py config/shakespeare_char.toml --max_steps=500

The options are TrainOptions and, shared with fine-tuning, papagaio/options.py's RunOptions. `fit` is the training loop.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from papagaio.errors import MachineError, UserError, run
from papagaio.generation.options import SamplingOptions
from papagaio.options import load_toml, option, parse
from papagaio.training.options import RunOptions

# What a preset means for training, where the user says nothing else; what it means for the model stands in model.py.
RECIPES: dict[str, dict[str, Any]] = {
    "modern": {},  # RunOptions' defaults
    "frontier": {},
    "gpt2": {
        "optimizer": "adamw",
        "learning_rate": 6e-4,
        "min_learning_rate": 6e-5,
        "schedule": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "grad_clip": 1.0,
    },
}


BUDGET = r"^\d+(\.\d+)?[smh]$"


class TrainOptions(RunOptions):
    """Options of train.py."""

    data: Path = option(..., "dataset directory, made by data/prepare.py")
    depth: int | None = option(
        None,
        "one dial: so many blocks, and whatever else is not given chosen to fit them, the corpus and the device",
        ge=1,
        le=64,
    )
    budget: str | None = option(
        None, "one dial: training time such as 90s, 10m or 2h; the model and the rest are chosen to use it", pattern=BUDGET
    )
    preset: Literal["modern", "gpt2", "frontier"] = option("modern", "architecture and, unless given, the training recipe")
    n_layer: int = option(6, "blocks", ge=1)
    n_head: int = option(6, "attention heads", ge=1)
    n_kv_head: int | None = option(None, "key-value heads, fewer than n_head for grouped-query attention", ge=1)
    n_embd: int = option(384, "channels", ge=1)
    block_size: int = option(256, "context length, in tokens", ge=1)
    dropout: float = option(0.0, "share of activations dropped in training", ge=0, lt=1)
    document_mask: bool = option(False, "a token sees its own document only, where several are in a window")
    start_at_documents: bool = option(False, "move a window in which a document begins on to that place")

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, values: dict[str, Any]) -> dict[str, Any]:
        return RECIPES.get(values.get("preset", "modern"), {}) | values

    @model_validator(mode="after")
    def _shape(self) -> "TrainOptions":  # as GPTConfig does, but before torch is imported
        if self.depth and self.budget:
            raise ValueError("depth and budget exclude each other")
        if self.depth or self.budget:  # what they choose is checked with what is given
            return self
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(TrainOptions, doc=__doc__)

import torch

from model import GPT, PRESETS, GPTConfig
from papagaio import runtime
from papagaio.batches.windows import Ahead, Batch, Loader, Objective, ValidationWindows, WindowLoader, likelihood, mix
from papagaio.corpus.dataset import Dataset
from papagaio.evaluation import evaluate_loss
from papagaio.generation.engine import generate
from papagaio.runs.directory import open_run, owned
from papagaio.runs.saver import Saver
from papagaio.tokenizer import Tokenizer
from papagaio.training.dial import by_budget, by_depth
from papagaio.training.dry_run import dry_run, seconds_per_step
from papagaio.training.guard import accepts
from papagaio.training.metrics import RunLog
from papagaio.training.optimizers import make_optimizers, schedule, set_learning_rate


def main(config: TrainOptions) -> None:
    dataset = Dataset(config.data)
    tokenizer = dataset.tokenizer
    device = runtime.pick_device(config.device)
    if config.depth or config.budget:
        config = turn_the_dial(config, dataset, device)
    loader = training_windows(dataset, config)
    # A forward pass alone takes a third of the memory of one with its gradient, and larger ones are faster.
    size = max(2 * (config.micro_batch_size or config.batch_size), 4096 // config.block_size)
    validation = ValidationWindows(dataset, config.block_size, size, config.eval_tokens, document_mask=config.document_mask)
    torch.manual_seed(config.seed)
    if config.dry_run:
        dry_run(lambda: make_model(config, tokenizer), loader, config, device)
        return
    model = make_model(config, tokenizer).to(device)
    print(f"preset {config.preset}, {model.num_parameters():,} parameters, on {device}", file=sys.stderr)
    print(f"{config.max_steps:,} steps are {loader.epochs(config.max_steps):.2f} epochs of the training split", file=sys.stderr)

    def preview() -> str:
        """What the model writes on its own, at temperature 0.8."""
        options = SamplingOptions(checkpoint=config.out_dir, max_new_tokens=config.sample_tokens, seed=config.seed)
        start, *banned = tokenizer.special.values()
        tokens = generate(model, [start], options, block_size=config.block_size, banned=banned, end=[start], device=device)
        return tokenizer.decode(tokens)

    dtype = runtime.pick_dtype(config.dtype, device)
    facts = {"stage": "pretrain", "data_sha256": dataset.sha256}
    with owned(config):
        fit(model, loader, lambda: evaluate_loss(model, validation, tokenizer, dtype), preview, tokenizer, config, facts)


def make_model(config: TrainOptions, tokenizer: Tokenizer) -> GPT:
    """The model that the options ask for, with its initial weights."""
    shape = config.model_dump(include={"n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "dropout"})
    try:
        return GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape, **PRESETS[config.preset]))
    except ValueError as error:
        raise UserError(str(error)) from None


def training_windows(dataset: Dataset, config: TrainOptions) -> WindowLoader:
    masks = {"document_mask": config.document_mask, "start_at_documents": config.start_at_documents}
    return WindowLoader(dataset, "train", config.block_size, config.batch_size, config.seed, **masks)


def turn_the_dial(config: TrainOptions, dataset: Dataset, device: torch.device) -> TrainOptions:
    """The options with what --depth or --budget leaves open filled in, printed with the reasons (papagaio/training/dial.py).

    A run that is resumed keeps what was chosen when it began. Raises UserError where the choices do not fit together.
    """
    given = config.model_dump(include=config.model_fields_set)
    saved = config.out_dir / "config.toml"
    if config.resume and saved.exists():
        _, chosen = load_toml(saved)
        keys = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "micro_batch_size", "max_steps")
        keys += ("eval_interval", "eval_tokens")
        return TrainOptions(**{key: chosen[key] for key in keys if key in chosen} | given)

    def tokens_per_second(values: dict[str, Any]) -> float:
        trial = TrainOptions(**given | values | {"max_steps": 1})
        seconds = seconds_per_step(make_model(trial, dataset.tokenizer).to(device), training_windows(dataset, trial), trial)
        return trial.batch_size * trial.block_size / seconds

    facts = dataset.splits["train"]["tokens"], dataset.tokenizer.vocab_size, device.type == "cuda"
    try:
        if config.depth:
            choice = by_depth(config.depth, *facts, given)
        else:
            seconds = float(config.budget[:-1]) * {"s": 1, "m": 60, "h": 3600}[config.budget[-1]]
            choice = by_budget(seconds, *facts, given, tokens_per_second)
        config = TrainOptions(**choice.values | given)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    for line in choice.reasons:
        print(f"chosen: {line}", file=sys.stderr)
    return config


def fit(
    model: GPT,
    loader: Loader,
    evaluate: Callable[[], dict[str, float]],
    preview: Callable[[], str],
    tokenizer: Tokenizer,
    config: RunOptions,
    facts: dict[str, Any],
    objective: Objective = likelihood,
) -> dict[str, Any]:
    """Train `model` in place for config.max_steps; returns the state at the end. Pretraining and fine-tuning are this loop.

    `loader(step)` gives the batches of an optimizer step, whose weights sum to 1, `loader.epochs(step)` the passes over the
    data until then; `objective(model, batch)` is the loss. `evaluate()` gives val_loss, and what else there is to measure;
    `preview()` is shown with it. `facts` (stage, data, base) are noted in the checkpoints; a run resumes only with the same ones.
    Writes config.toml, metrics.jsonl, loss.png and checkpoints/ in config.out_dir, which must be `owned`. On SIGINT, SIGTERM and
    SIGUSR1 it saves and ends the process with 128 + the signal.
    """
    device = next(model.parameters()).device
    dtype = runtime.pick_dtype(config.dtype, device)
    peak = runtime.peak_flops(device)
    runtime.keep_memory()
    optimizers = make_optimizers(model, config)
    state = open_run(model, asdict(model.config), optimizers, tokenizer, config, facts)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16 has no numbers for small gradients
    if scaler.is_enabled() and state["loss_scale"]:
        scaler.load_state_dict(state["loss_scale"])
    model.recompute = config.activation_checkpointing
    if config.compile:
        runtime.compile_in_place(model, device)
    model.train()

    with (
        runtime.StopSignal() as stop,
        RunLog(config, state["step"], state["metrics_lines"]) as log,
        Ahead(loader, device) as batches,
        Saver(config, tokenizer, log, state["step"] or None) as saver,
    ):
        clock, clock_tokens = time.perf_counter(), 0
        while True:
            step = state["step"]
            last = step == config.max_steps
            due = (step % config.eval_interval == 0 or last) and state["evaluated"] != step
            checkpoint_due = config.checkpoint_interval and step % config.checkpoint_interval == 0
            if last or stop.received or (step and (due or checkpoint_due)):  # before evaluating, which may take long, or fail
                state |= {"loss_scale": scaler.state_dict() or None, "metrics_lines": log.lines}
                saver.save(model, asdict(model.config), optimizers, state)
            if due and not stop.received:
                paused = time.perf_counter()
                try:
                    with stop.at_once():
                        found = evaluate()
                        text = preview() if config.sample_tokens else ""
                except runtime.Stopped:
                    continue
                log.log(step, state["tokens"], epoch=loader.epochs(step), **found)
                if note_evaluation(found["val_loss"], state, loader.epochs(step), log) and (step or last):
                    saver.mark_best()
                if text:
                    log.say("  | " + text.replace("\n", "\n  | "))
                if step or last:
                    saver.plot()
                clock += time.perf_counter() - paused
            if last or stop.received or gave_up(state, config):
                break

            factor = schedule(step, config)
            set_learning_rate(optimizers, factor)
            sequences = batches(step)
            loss = gradients(model, sequences, objective, scaler, dtype, config, state, log)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))
            if accepts(loss, norm, scaler.get_scale(), state, config, lambda step=step: loader.places(step), log.say):
                for optimizer in optimizers:
                    optimizer.step()
            scaler.update()
            model.zero_grad(set_to_none=True)
            if math.isfinite(loss):
                state |= {"loss_sum": state["loss_sum"] + loss, "summed": state["summed"] + 1}
            state["tokens"] += sum(int((batch.targets != -100).sum()) for batch in sequences)
            clock_tokens += sum(batch.ids.numel() for batch in sequences)
            state["step"] += 1
            log.advance()

            if (state["step"] % config.log_interval == 0 or state["step"] == config.max_steps) and state["summed"]:
                state["train_loss"] = state["loss_sum"] / state["summed"]
                speed = clock_tokens / (time.perf_counter() - clock)
                measured = {"learning_rate": factor * config.learning_rate, "epoch": loader.epochs(state["step"])}
                measured |= {"grad_norm": norm} if math.isfinite(norm) else {}
                measured |= {"tokens_per_second": speed} | ({"mfu": speed * model.flops_per_token() / peak} if peak else {})
                log.log(state["step"], state["tokens"], train_loss=state["train_loss"], **measured)
                state |= {"loss_sum": 0.0, "summed": 0}
                clock, clock_tokens = time.perf_counter(), 0
        saver.finish()

    if stop.received:
        print(f"stopped by a signal; saved at step {state['step']}, --resume continues", file=sys.stderr)
        sys.exit(128 + stop.received)
    if state["step"] < config.max_steps:
        print(
            f"stopped early: no lower validation loss in {config.patience} evaluations since step {state['best_step']:,}; "
            "checkpoints/best, which is what the run's directory means, keeps that step",
            file=sys.stderr,
        )
    return state


def gradients(
    model: GPT,
    batches: list[Batch],
    objective: Objective,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype,
    config: RunOptions,
    state: dict[str, Any],
    log: RunLog,
) -> float:
    """Leave the gradient of a step in the parameters, a micro-batch at a time, and return its loss.

    Where memory is too small, with config.auto_microbatch the step is done again in micro-batches of half the size, which the
    state keeps; else raises MachineError, which names what to lower.
    """
    device = next(model.parameters()).device
    wanted = config.micro_batch_size or config.batch_size
    size = min(wanted, state["micro_batch_size"] or wanted, max(len(batch.ids) for batch in batches))
    while True:
        torch.manual_seed(mix(config.seed, state["step"]))  # dropout depends on seed and step alone: a resumed run repeats it
        loss = torch.zeros((), device=device)
        try:
            for micro in (micro for batch in batches for micro in batch.split(size)):
                with runtime.autocast(device, dtype):
                    part = objective(model, micro.to(device))
                scaler.scale(part).backward()
                loss += part.detach()
            return float(loss)
        except RuntimeError as error:
            if not runtime.is_out_of_memory(error):
                raise
            if not config.auto_microbatch or size == 1:
                lower = "micro_batch_size" if size > 1 else "block_size, or add --activation_checkpointing"
                raise MachineError(
                    f"out of memory at step {state['step'] + 1:,}, with {size} sequences at a time: lower {lower} (or let "
                    "--auto_microbatch do it); what was saved is kept, --resume goes on from there"
                ) from None
        part = micro = None  # what holds memory
        model.zero_grad(set_to_none=True)
        size //= 2
        state["micro_batch_size"] = size
        if device.type == "cuda":
            torch.cuda.empty_cache()
        log.say(f"out of memory: from step {state['step'] + 1:,} on {size} sequences at a time, micro_batch_size={size}")


def gave_up(state: dict[str, Any], config: RunOptions) -> bool:
    """Whether as many evaluations as config.patience have brought no lower validation loss."""
    return bool(config.patience) and state["unimproved"] >= config.patience


def note_evaluation(val_loss: float, state: dict[str, Any], epochs: float, log: RunLog) -> bool:
    """Take a validation loss into the state, say if it tells of overfitting; whether it is the lowest so far."""
    state["evaluated"] = state["step"]
    if state["best_val_loss"] is None or val_loss < state["best_val_loss"]:
        state |= {"best_val_loss": val_loss, "best_step": state["step"], "best_train_loss": state["train_loss"], "unimproved": 0}
        return True
    state["unimproved"] += 1
    if not state["warned"] and overfits(val_loss, state):
        log.say(overfitting_notice(val_loss, state, epochs))
        state["warned"] = True
    return False


def overfits(val_loss: float, state: dict[str, Any]) -> bool:
    """Whether the validation loss has risen since its best, by more than its own wavering, and the training loss fallen."""
    if state["best_train_loss"] is None:
        return False
    return val_loss > 1.01 * state["best_val_loss"] and state["train_loss"] < state["best_train_loss"]


def overfitting_notice(val_loss: float, state: dict[str, Any], epochs: float) -> str:
    return (
        f"warning: overfitting. Since step {state['best_step']:,} the validation loss has risen from "
        f"{state['best_val_loss']:.4f} to {val_loss:.4f} and the training loss fallen from {state['best_train_loss']:.4f} to "
        f"{state['train_loss']:.4f}: after {epochs:.1f} epochs the model learns this text by heart. checkpoints/best keeps step "
        f"{state['best_step']:,}. What helps: fewer --max_steps, --dropout=0.2, --weight_decay=0.3, a smaller model "
        "(--n_layer, --n_embd), or more text."
    )


if __name__ == "__main__":
    run(main, OPTIONS)

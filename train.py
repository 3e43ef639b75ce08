"""Pretrain a GPT on a dataset directory: next-token prediction, checkpoints, metrics, a plot of the loss.

    python train.py --data out/data --out_dir out/run
    python train.py config/shakespeare_char.toml --max_steps=500

The options are TrainOptions and, shared with fine-tuning, papagaio/config.py's RunOptions. `fit` is the training loop.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from papagaio.config import MachineError, RunOptions, SamplingOptions, UserError, option, parse, run

# What a preset means for training, where the user says nothing else; what it means for the model stands in model.py.
RECIPES: dict[str, dict[str, Any]] = {
    "modern": {},  # RunOptions' defaults
    "gpt2": {
        "optimizer": "adamw",
        "learning_rate": 6e-4,
        "min_learning_rate": 6e-5,
        "schedule": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "beta1": 0.9,
    },
}


class TrainOptions(RunOptions):
    """Options of train.py."""

    data: Path = option(..., "dataset directory, made by data/prepare.py")
    preset: Literal["modern", "gpt2"] = option("modern", "architecture and, unless given, the training recipe")
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
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(TrainOptions, doc=__doc__)

import tomli_w
import torch
from torch import Tensor

from model import GPT, PRESETS, GPTConfig
from papagaio import runtime
from papagaio.checkpoint import open_checkpoint, point_to, prune, save_checkpoint
from papagaio.evaluation import evaluate_loss
from papagaio.generate import generate
from papagaio.loader import Ahead, Batch, ValidationWindows, WindowLoader, mix
from papagaio.metrics import RunLog
from papagaio.optim import make_optimizers, schedule, set_learning_rate
from papagaio.plots import plot_losses
from papagaio.shards import Dataset
from papagaio.tokenizer import Tokenizer


def main(config: TrainOptions) -> None:
    dataset = Dataset(config.data)
    tokenizer = dataset.tokenizer
    loader = WindowLoader(
        dataset,
        "train",
        config.block_size,
        config.batch_size,
        config.seed,
        document_mask=config.document_mask,
        start_at_documents=config.start_at_documents,
    )
    size = config.micro_batch_size or config.batch_size
    validation = ValidationWindows(dataset, config.block_size, size, config.eval_tokens, document_mask=config.document_mask)
    device = runtime.pick_device(config.device)
    torch.manual_seed(config.seed)
    shape = config.model_dump(include={"n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "dropout"})
    try:
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape, **PRESETS[config.preset])).to(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(f"preset {config.preset}, {model.num_parameters():,} parameters, on {device}", file=sys.stderr)
    print(f"{config.max_steps:,} steps are {loader.epochs(config.max_steps):.2f} epochs of the training split", file=sys.stderr)
    if config.dry_run:
        dry_run(model, loader, config, loader.n_windows)
        return

    def preview() -> str:
        """What the model writes on its own, at temperature 0.8."""
        options = SamplingOptions(checkpoint=config.out_dir, max_new_tokens=config.sample_tokens, seed=config.seed)
        start, *banned = tokenizer.special.values()
        tokens = generate(model, [start], options, block_size=config.block_size, banned=banned, end=[start], device=device)
        return tokenizer.decode(tokens)

    fit(model, loader, validation, preview, tokenizer, config, stage="pretrain")


def fit(
    model: GPT,
    loader: Callable[[int], list[Batch]],
    validation: Iterable[Batch],
    preview: Callable[[], str],
    tokenizer: Tokenizer,
    config: RunOptions,
    stage: str,
) -> None:
    """Train `model` in place for config.max_steps. Pretraining and fine-tuning are this loop.

    `loader(step)` gives the batches of an optimizer step, whose weights sum to 1; the loss is measured on `validation`;
    `preview()` is shown at each evaluation; `stage` is noted in the checkpoints. Writes config.toml, metrics.jsonl, loss.png
    and checkpoints/ in config.out_dir. On SIGINT and SIGTERM it saves and ends the process with 128 + the signal.
    """
    device = next(model.parameters()).device
    dtype = runtime.pick_dtype(config.dtype, device)
    peak = runtime.peak_flops(device)
    optimizers = make_optimizers(model, config)
    state = open_run(model, optimizers, tokenizer, config, stage)
    loss_sum = torch.tensor(state["loss_sum"], device=device)  # of the steps since the last line in metrics.jsonl
    if config.compile:
        model.compile()  # in place, so that parameter names stay as they are
    model.train()

    with runtime.StopSignal() as stop, RunLog(config, state["step"]) as log, Ahead(loader, device) as batches:
        clock, clock_tokens = time.perf_counter(), 0
        while True:
            step, last = state["step"], state["step"] == config.max_steps
            improved = False
            if (step % config.eval_interval == 0 or last) and state["evaluated"] != step and not stop.received:
                paused = time.perf_counter()
                found = evaluate_loss(model, validation, tokenizer, dtype)
                log.log(step, state["tokens"], **found)
                improved = state["best_val_loss"] is None or found["val_loss"] < state["best_val_loss"]
                best = found["val_loss"] if improved else state["best_val_loss"]
                state |= {"evaluated": step, "best_val_loss": best}
                if config.sample_tokens:
                    log.say("  | " + preview().replace("\n", "\n  | "))
                clock += time.perf_counter() - paused

            checkpoint_due = config.checkpoint_interval and step and step % config.checkpoint_interval == 0
            if checkpoint_due or (improved and step) or last or stop.received:
                state["loss_sum"] = float(loss_sum)
                path = save_checkpoint(config.out_dir / "checkpoints", model, asdict(model.config), optimizers, state, tokenizer)
                point_to(path, "last")
                if improved:
                    point_to(path, "best")
                prune(path.parent)
                plot_losses(log.path, config.out_dir / "loss.png")
            if last or stop.received:
                break

            torch.manual_seed(mix(config.seed, step))  # dropout depends on seed and step alone, so a resumed run repeats it
            factor = schedule(step, config)
            set_learning_rate(optimizers, factor)
            for batch in batches(step):
                state["tokens"] += int((batch.targets != -100).sum())
                clock_tokens += batch.ids.numel()
                for micro in batch.split(config.micro_batch_size or config.batch_size):
                    with runtime.autocast(device, dtype):
                        loss = model(*micro.to(device))
                    loss.backward()
                    loss_sum += loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            state["step"] += 1
            log.advance()

            if state["step"] % config.log_interval == 0 or state["step"] == config.max_steps:
                train_loss = float(loss_sum) / (state["step"] - state["logged"])
                if not math.isfinite(train_loss):
                    raise MachineError(f"the loss is {train_loss} at step {state['step']}: lower learning_rate")
                speed = clock_tokens / (time.perf_counter() - clock)
                mfu = {"mfu": speed * model.flops_per_token() / peak} if peak else {}
                measured = {"learning_rate": factor * config.learning_rate, "grad_norm": float(grad_norm)}
                log.log(state["step"], state["tokens"], train_loss=train_loss, **measured, tokens_per_second=speed, **mfu)
                loss_sum.zero_()
                state["logged"], clock, clock_tokens = state["step"], time.perf_counter(), 0

    if stop.received:
        print(f"stopped by a signal; saved at step {state['step']}, --resume continues", file=sys.stderr)
        sys.exit(128 + stop.received)


def open_run(
    model: GPT, optimizers: list[torch.optim.Optimizer], tokenizer: Tokenizer, config: RunOptions, stage: str
) -> dict[str, Any]:
    """Make config.out_dir ready and return the state to start from: a new run's, or with --resume the last checkpoint's.

    Raises UserError where there is a run already and neither --resume nor --overwrite is given, or where the checkpoint is
    of another model, tokenizer, seed or stage.
    """
    ours = [config.out_dir / name for name in ("config.toml", "metrics.jsonl", "loss.png", "checkpoints")]
    state = {"step": 0, "tokens": 0, "stage": stage, "optimizer": config.optimizer}
    state |= {"seed": config.seed, "batch_size": config.batch_size}
    progress = {"logged": 0, "loss_sum": 0.0, "evaluated": None, "best_val_loss": None}
    if config.resume and (config.out_dir / "checkpoints" / "last").exists():
        checkpoint = open_checkpoint(config.out_dir)
        fixed = ("stage", "optimizer", "seed", "batch_size")
        found = {key: checkpoint.state[key] for key in fixed} | checkpoint.model_fields
        wanted = {key: state[key] for key in fixed} | asdict(model.config)
        for key in wanted:
            if found.get(key) != wanted[key]:
                raise UserError(f"{checkpoint.path}: {key} was {found.get(key)!r}, now it is {wanted[key]!r}; resume as it was")
        if checkpoint.tokenizer.sha256 != tokenizer.sha256:
            raise UserError(f"{checkpoint.path}: its tokenizer is not the data's; resume with the run's own data")
        if checkpoint.state["step"] > config.max_steps:
            raise UserError(f"{checkpoint.path}: already beyond --max_steps={config.max_steps}")
        checkpoint.load_model(model)
        checkpoint.load_optimizers(model, optimizers)
        state, progress = checkpoint.state, {}
    elif any(path.exists() for path in ours) and not (config.overwrite or config.resume):
        raise UserError(f"{config.out_dir}: a run is there already; add --resume to continue it, or --overwrite to replace it")
    else:
        for path in ours:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    config.out_dir.mkdir(parents=True, exist_ok=True)
    options = config.model_dump(mode="json", exclude={"resume", "overwrite", "dry_run"}, exclude_none=True)
    (config.out_dir / "config.toml").write_text(tomli_w.dumps(options), encoding="utf-8")
    return state | progress


def dry_run(model: GPT, loader: Callable[[int], list[Batch]], config: RunOptions, n_sequences: int) -> None:
    """Print what a run would cost, after three steps of it that are thrown away; an epoch has n_sequences."""
    device = next(model.parameters()).device
    dtype = runtime.pick_dtype(config.dtype, device)
    optimizers = make_optimizers(model, config)
    saved: dict[int, int] = {}  # bytes of each tensor that the backward pass will need

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    seconds, activations, tokens = [], 0, 0
    for step in range(3):
        start = time.perf_counter()
        for micro in (micro for batch in loader(step) for micro in batch.split(config.micro_batch_size or config.batch_size)):
            inputs = micro.to(device)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), runtime.autocast(device, dtype):
                loss = model(*inputs)
            activations = max(activations, sum(saved.values()))
            loss.backward()
            saved.clear()
            tokens += inputs.ids.numel() / 3
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        runtime.synchronize(device)
        seconds.append(time.perf_counter() - start)

    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    states = [t for optimizer in optimizers for tensors in optimizer.state.values() for t in tensors.values()]
    optimizer_bytes = sum(t.numel() * t.element_size() for t in states)
    activations = max(0, activations - weights_bytes)  # the weights themselves are among what backward needs
    parts = {"weights": weights_bytes, "gradients": weights_bytes, "optimizer": optimizer_bytes, "activations": activations}
    total = config.max_steps * tokens
    print(f"parameters: {model.num_parameters():,}")
    listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    print(f"memory: about {sum(parts.values()) / 2**20:,.0f} MiB: {listed}")
    print(f"FLOPs: {model.flops_per_token():.3g} a token, {model.flops_per_token() * total:.3g} in all")
    epochs = config.max_steps * config.batch_size / n_sequences
    print(f"epochs: {epochs:.2f} of {n_sequences:,} sequences, {total:,.0f} tokens in all")
    print(f"time: about {min(seconds) * config.max_steps / 60:,.1f} minutes, {tokens / min(seconds):,.0f} tokens/s on {device}")


if __name__ == "__main__":
    run(main, OPTIONS)

"""A run's directory: one process at a time writes there, nothing is replaced unasked, and a run goes on from where it was.

config.toml, metrics.jsonl, loss.png, checkpoints/      what a run writes
.lock                                                   held by the process that trains; it is free when that has ended
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tomli_w
import torch
from filelock import FileLock, Timeout
from torch import nn

from papagaio.errors import MachineError, UserError
from papagaio.files import write_whole
from papagaio.runs.checkpoint import Checkpoint, contents, discard, open_checkpoint, steps_saved
from papagaio.tokenizer import Tokenizer
from papagaio.training.metrics import read_metrics
from papagaio.training.optimizers import moment_bytes
from papagaio.training.options import RunOptions

OURS = ("config.toml", "metrics.jsonl", "loss.png", "checkpoints", "merged")
# What a resumed run may change, besides where its files stand: none of it makes it a run of other data, or of another model.
MAY_CHANGE = (
    *("max_steps", "learning_rate", "min_learning_rate", "embedding_learning_rate", "head_learning_rate", "grad_clip"),
    *("micro_batch_size", "auto_microbatch", "activation_checkpointing", "device", "dtype", "compile"),
    *("log_interval", "eval_interval", "checkpoint_interval", "keep", "patience", "sample_tokens"),
    *("on_nonfinite", "on_spike", "wandb", "wandb_project"),
)
# Paths, whose content is compared instead; and what has no part in training (what a dial chose is compared, not the dial).
ELSEWHERE = ("out_dir", "data", "val_data", "init_from", "base", "replay_data", "test_data", "control_data")
NO_PART = ("resume", "overwrite", "dry_run", "preview", "lora_merge", "depth", "budget")


@contextmanager
def owned(config: RunOptions) -> Iterator[None]:
    """Inside, config.out_dir is this process's own.

    Raises UserError where another one trains there, or where there is a run already and neither --resume nor --overwrite is
    given; nothing has been changed then.
    """
    if any((config.out_dir / name).exists() for name in OURS) and not (config.overwrite or config.resume):
        raise UserError(f"{config.out_dir}: a run is there already; add --resume to continue it, or --overwrite to replace it")
    config.out_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(config.out_dir / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{config.out_dir}: another process is training there; wait for it, or name another --out_dir") from None


def open_run(
    model: nn.Module,
    model_fields: dict[str, Any],
    optimizers: list[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    config: RunOptions,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Make config.out_dir ready and return the state to start from: a new run's, or with --resume that of its newest checkpoint
    that is not damaged, which is put into the model and the optimizers.

    Raises UserError where that is of another model, other data or other options than now.
    """
    fixed = config.model_dump(mode="json", exclude={*MAY_CHANGE, *ELSEWHERE, *NO_PART})
    state = {"step": 0, "tokens": 0} | facts | {"optimizer": config.optimizer, "options": fixed}
    progress = {"metrics_lines": 0, "summed": 0, "loss_sum": 0.0, "loss_scale": None, "train_loss": None}
    progress |= {"evaluated": None, "warned": False, "best_val_loss": None, "best_step": 0, "best_train_loss": None}
    progress |= {"unimproved": 0, "recent_losses": [], "nonfinite": 0, "micro_batch_size": None}
    checkpoint = newest(config) if config.resume else None
    if checkpoint is not None:
        refuse_another(checkpoint, facts | fixed | model_fields | {"tokenizer": tokenizer.sha256})
        if checkpoint.state["step"] > config.max_steps:
            raise UserError(f"{checkpoint.path}: already beyond --max_steps={config.max_steps}")
        checkpoint.load_model(model)
        checkpoint.load_optimizers(model, optimizers)
        if "metrics_lines" not in checkpoint.state:  # from before they were counted
            lines = read_metrics(config.out_dir / "metrics.jsonl")
            progress["metrics_lines"] = sum(line["step"] <= checkpoint.state["step"] for line in lines)
        state, progress = checkpoint.state, {key: value for key, value in progress.items() if key not in checkpoint.state}
    else:
        for path in (config.out_dir / name for name in OURS):
            discard(path) if path.is_dir() else path.unlink(missing_ok=True)
    for directory in (config.out_dir, config.out_dir / "checkpoints"):
        for path in (*directory.glob(".*.tmp"), *directory.glob(".*.old")):  # of a crash
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    refuse_full_disk(model, optimizers, config, state["step"])
    options = config.model_dump(mode="json", exclude={"resume", "overwrite", "dry_run"}, exclude_none=True)
    write_whole(config.out_dir / "config.toml", tomli_w.dumps(options))
    return state | progress


def newest(config: RunOptions) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies; those that do not are named and passed over. None where none was saved.

    Raises UserError where there are some, and none verifies.
    """
    checkpoints = config.out_dir / "checkpoints"
    steps = steps_saved(checkpoints)
    for step in reversed(steps):
        try:
            return open_checkpoint(checkpoints / f"step-{step}")
        except (UserError, MachineError) as error:
            print(f"warning: passed over: {error}", file=sys.stderr)
    if steps:
        raise UserError(f"{checkpoints}: none of its {len(steps)} checkpoints can be read; --overwrite begins anew")
    return None


def refuse_another(checkpoint: Checkpoint, wanted: dict[str, Any]) -> None:
    """Raises UserError, naming all that differs, where a checkpoint is of another run than the one that is wanted."""
    state = checkpoint.state
    found = state | state.get("options", {}) | checkpoint.model_fields | {"tokenizer": checkpoint.tokenizer.sha256}
    differing = [key for key, value in wanted.items() if key in found and found[key] != value]
    if differing:
        changes = "; ".join(f"{key} was {_short(found[key])}, now it is {_short(wanted[key])}" for key in differing)
        raise UserError(f"{checkpoint.path}: {changes}; resume as it was. What may change: {', '.join(MAY_CHANGE)}")


def _short(value: Any) -> str:
    """A value as Python writes it; of a sha256 the beginning."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def refuse_full_disk(model: nn.Module, optimizers: list[torch.optim.Optimizer], config: RunOptions, step: int) -> None:
    """Raises MachineError where the checkpoints that a run will keep at once do not fit on what is left of the disk."""
    each = checkpoint_bytes(model, optimizers)
    saves = 1 + (config.max_steps - step) // min(config.eval_interval, config.checkpoint_interval or config.eval_interval)
    there = len(steps_saved(config.out_dir / "checkpoints"))
    count = max(0, min(saves, config.keep + 1) - there) + 1  # the newest ones, the best, and one that is being written
    free = shutil.disk_usage(config.out_dir).free
    if count * each > free:
        raise MachineError(
            f"{config.out_dir}: {count} more checkpoints of {each / 2**20:,.0f} MiB are to be there at once, and the disk has "
            f"{free / 2**20:,.0f} MiB free: make room, or lower --keep"
        )


def checkpoint_bytes(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """About how large a checkpoint is: what is trained, or all weights, and the optimizers' moments."""
    weights = contents(model, {}, [], {}).tensors
    return sum(tensor.nbytes for named in weights.values() for tensor in named.values()) + moment_bytes(optimizers)

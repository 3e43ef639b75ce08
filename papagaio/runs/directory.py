"""A run's directory: one process at a time writes to it, nothing is replaced unasked, and an interrupted run can go on.

config.toml, metrics.jsonl, loss.png, checkpoints/      what a run writes (and merged/, wandb_id, if asked for)
checkpoints/last, checkpoints/best                      small text files with the name of a checkpoint beside them
.lock                                                   locked by the process that trains, until it ends
.launch                                                 which torchrun began the run: it resumes when that starts it again
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from papagaio.errors import MachineError, UserError
from papagaio.files import SAVE_TENSORS, clear, discard, locked_file, read_text, refuse_pickle, remove, write_whole
from papagaio.launch import launch_id, restarts
from papagaio.options import load_toml
from papagaio.runs.checkpoint import ADAPTERS, Checkpoint, contents, read_checkpoint
from papagaio.tokenizer import Tokenizer
from papagaio.training.metrics import WANDB_ID
from papagaio.training.optimizers import moment_bytes
from papagaio.training.options import RunOptions
from papagaio.training.parallel import ALONE, World
from papagaio.training.progress import Identity, Progress

LAUNCH = ".launch"
RUN_FILES = ("config.toml", "metrics.jsonl", "loss.png", "checkpoints", "merged", WANDB_ID)


def refuse_taken(config: RunOptions) -> None:
    """Raises UserError if config.out_dir holds a run and neither --resume nor --overwrite is given, or if it leads nowhere.

    Raises MachineError if nothing can be written there. Nothing is changed: scripts call it before long work.
    """
    out_dir, checkpoints = config.out_dir, config.out_dir / "checkpoints"
    for path in (out_dir, checkpoints):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: a link to {os.readlink(path)}, which is not there; make that directory, or delete the link")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: a file, where a run needs a directory; name another --out_dir")
    # An empty directory is no run: checkpoints/ may have been made as a link to a larger disk.
    found = [name for name in RUN_FILES if (out_dir / name).is_file() or any((out_dir / name).glob("*"))]
    if found and not (config.overwrite or config.resume):
        raise UserError(f"{out_dir}: a run is there already; add --resume to continue it, or --overwrite to replace it")
    if config.resume and "merged" in found and not steps_saved(checkpoints):
        raise UserError(f"{out_dir}: no checkpoint to resume, but merged/ is there; --overwrite replaces the run")
    for path in (checkpoints, next(path for path in (out_dir, *out_dir.parents) if path.exists())):
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            raise MachineError(f"{path}: nothing can be written there; name another --out_dir")


def restarted(config: RunOptions, world: World) -> RunOptions:
    """The options; with --resume instead of --overwrite if torchrun has started the process again, and the run in config.out_dir
    is one that it began."""

    def begun() -> bool:
        path = config.out_dir / LAUNCH
        return restarts() > 0 and path.is_file() and path.read_text(encoding="utf-8") == launch_id()

    return config.model_copy(update={"resume": True, "overwrite": False}) if world.on_rank_0(begun) else config


@contextmanager
def locked(config: RunOptions) -> Iterator[None]:
    """Reserve config.out_dir for this process. Raises UserError, before anything is changed, if another process trains there, or
    as `refuse_taken` does."""
    refuse_taken(config)
    out_dir = config.out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    with locked_file(out_dir / ".lock", f"{out_dir}: another process is training there; wait for it, or name another --out_dir"):
        yield


def open_run(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    config: RunOptions,
    identity: Identity,
    world: World = ALONE,
) -> Progress:
    """Prepare config.out_dir and return the progress to start from. With --resume, the newest undamaged checkpoint is loaded into
    the model and the optimizers; raises UserError if it belongs to another model, other data or other options.

    Rank 0 does so; then the others, which must see the same directory, load their parts of the same checkpoint.
    """
    opened = partial(_open_run, model, optimizers, tokenizer, config, identity)
    progress = Progress(**world.on_rank_0(lambda: dataclasses.asdict(opened())))
    if world.rank and progress.step:
        checkpoint = open_checkpoint(config.out_dir / "checkpoints" / f"step-{progress.step}")
        checkpoint.load_model(model)
        checkpoint.load_optimizers(model, optimizers)
    return progress


def _open_run(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tokenizer: Tokenizer, config: RunOptions, identity: Identity
) -> Progress:
    progress = Progress()
    checkpoint = newest(config) if config.resume else None
    if checkpoint is not None:
        progress = _saved_progress(checkpoint, model, tokenizer, config, identity)
        checkpoint.load_model(model)
        checkpoint.load_optimizers(model, optimizers)
    else:
        if config.resume:
            _begin_again(config.out_dir)
        for path in (config.out_dir / name for name in RUN_FILES):
            clear(path) if path.is_dir() else path.unlink(missing_ok=True)
    for directory in (config.out_dir, config.out_dir / "checkpoints"):
        for path in (*directory.glob(".*.tmp"), *directory.glob(".*.old")):  # left by a crash
            remove(path)
    refuse_full_disk(model, optimizers, config, progress.step)
    if launch_id():
        write_whole(config.out_dir / LAUNCH, launch_id())
    import tomli_w  # here, because generation does not need it

    options = config.model_dump(mode="json", exclude={"resume", "overwrite", "dry_run"}, exclude_none=True)
    write_whole(config.out_dir / "config.toml", tomli_w.dumps(options))
    return progress


def _begin_again(out_dir: Path) -> None:
    """Say that there is nothing to resume, and put aside the metrics of a run that ended before its first checkpoint."""
    metrics, kept = out_dir / "metrics.jsonl", ""
    if metrics.exists() and metrics.stat().st_size:
        aside = next(path for i in count(1) if not (path := out_dir / f"metrics.before-{i}.jsonl").exists())
        metrics.rename(aside)
        kept = f"; metrics.jsonl is kept as {aside.name}"
    print(f"{out_dir}: no checkpoint to resume, the run starts from the beginning{kept}", file=sys.stderr)


def run_state(progress: Progress, identity: Identity, config: RunOptions) -> dict[str, Any]:
    """The content of state.json: the progress, and what a resumed run must have in common with this one."""
    options = config.model_dump(mode="json", include=set(config.by_resume("same")))
    return dataclasses.asdict(progress) | dataclasses.asdict(identity) | {"optimizer": config.optimizer, "options": options}


def _saved_progress(
    checkpoint: Checkpoint, model: nn.Module, tokenizer: Tokenizer, config: RunOptions, identity: Identity
) -> Progress:
    """The progress in a checkpoint of this run. Raises UserError, which names all differences, if it is another run's."""
    older_runs_lack = {"replay_sum": None, "base_license": None}
    state, wanted = older_runs_lack | checkpoint.state, run_state(Progress(), identity, config)
    try:
        if state.keys() != wanted.keys() or not isinstance(state["options"], dict):
            raise ValueError
        progress = TypeAdapter(Progress).validate_python({key: state[key] for key in dataclasses.asdict(Progress())})
    except ValueError:  # or pydantic's, which is one
        remedy = "made by another version of papagaio, which alone can resume it; --overwrite begins anew"
        raise UserError(f"{checkpoint.path / 'state.json'}: {remedy}") from None
    found = state | state["options"] | checkpoint.model_fields | {"tokenizer": checkpoint.tokenizer.sha256}
    mine = dataclasses.asdict(identity) | wanted["options"] | dataclasses.asdict(model.config) | {"tokenizer": tokenizer.sha256}
    differing = [key for key, value in mine.items() if key in found and found[key] != value]
    if differing:
        changes = "; ".join(f"{key} was {found[key]!r:.60}, now it is {mine[key]!r:.60}" for key in differing)
        free = ", ".join(config.by_resume("free"))
        raise UserError(f"{checkpoint.path}: {changes}; resume as it was. What may change: {free}")
    if progress.step > config.max_steps:
        raise UserError(f"{checkpoint.path}: already beyond --max_steps={config.max_steps}")
    return progress


def refuse_full_disk(model: nn.Module, optimizers: list[torch.optim.Optimizer], config: RunOptions, step: int) -> None:
    """Raises MachineError if the disk has no room for the checkpoints that the run will keep at the same time."""
    weights = contents(model, [], {}).tensors
    each = sum(tensor.nbytes for named in weights.values() for tensor in named.values()) + moment_bytes(optimizers)
    saves = 1 + (config.max_steps - step) // min(config.eval_interval, config.checkpoint_interval or config.eval_interval)
    present = len(steps_saved(config.out_dir / "checkpoints"))
    count = max(0, min(saves, config.keep + 1) - present) + 1  # the newest ones, the best, and one that is being written
    checkpoints = config.out_dir / "checkpoints"  # perhaps a link to another disk
    free = shutil.disk_usage(checkpoints if checkpoints.exists() else config.out_dir).free
    if count * each > free:
        raise MachineError(
            f"{config.out_dir}: {count} more checkpoints of {each / 2**20:,.0f} MiB are to be there at once, and the disk has "
            f"{free / 2**20:,.0f} MiB free: make room, or lower --keep"
        )


def steps_saved(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints in a directory, in order."""
    steps = (path.name.removeprefix("step-") for path in checkpoints.glob("step-*"))
    return sorted(int(step) for step in steps if step.isdecimal())


def prune(checkpoints: Path, step: int, keep: int) -> None:
    """Delete the checkpoints up to `step`, except for the `keep` newest and those that last and best name. Those beyond it are
    damaged ones that a resumed run has passed over; each stays until its step is saved again."""
    for left in checkpoints.glob(".*.old"):  # by an interrupted deletion
        remove(left)
    files = (checkpoints / name for name in ("last", "best"))
    named = {path.read_text(encoding="utf-8").strip() for path in files if path.exists()}
    for old in [n for n in steps_saved(checkpoints) if n <= step][:-keep]:
        if f"step-{old}" not in named:
            discard(checkpoints / f"step-{old}")


def newest(config: RunOptions) -> Checkpoint | None:
    """The newest undamaged checkpoint of a run, or None if none was saved; damaged ones are reported and passed over. Raises
    UserError if all are damaged."""
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


def open_checkpoint(path: Path, base: Path | None = None, above: tuple[Path, ...] = ()) -> Checkpoint:
    """Open and verify a checkpoint directory, a `last` or `best` file, or a run: its best checkpoint if it was trained with
    patience, otherwise its last. `base` is the checkpoint to which adapters belong, by default that in their run's config.toml;
    `above` are the adapters whose base is being opened. Raises UserError."""
    checkpoint = read_checkpoint(resolve(path))
    if checkpoint.weights.name == ADAPTERS:
        checkpoint = dataclasses.replace(checkpoint, base=_open_base(checkpoint, base, (*above, checkpoint.path.resolve())))
    checkpoint.check_sizes()
    return checkpoint


def _open_base(checkpoint: Checkpoint, base: Path | None, above: tuple[Path, ...]) -> Checkpoint:
    """The checkpoint to which adapters belong. Raises UserError if it is not found, or is another one."""
    path, config = checkpoint.path, checkpoint.path.parent.parent / "config.toml"
    if base is None:
        with suppress(UserError, KeyError, TypeError):  # without a readable config.toml, --base is needed
            base = Path(load_toml(config)[1]["init_from"])
    if base is None or not base.exists():
        tried = f"; it is not at {base} any more" if base is not None else ""
        raise UserError(f"{path}: adapters alone; name the checkpoint that they were made for with --base{tried}")
    found = resolve(base)
    if found.resolve() in above:
        raise UserError(f"{path}: adapters for themselves, by way of {found}; name the checkpoint they were made for with --base")
    opened = open_checkpoint(found, None, above)
    if opened.weights_sha256 != checkpoint.state.get("base_sha256"):
        raise UserError(f"{path}: adapters for another base than {found}; name the one they were made for with --base")
    return opened


def resolve(path: Path) -> Path:
    """The checkpoint directory for a path: the path itself, or what a run or a `last` or `best` file refers to."""
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    if (path / "manifest.json").exists() and any(path.glob("val-*.npy")):
        raise UserError(f"{path}: a dataset, not a checkpoint; name a run or a checkpoint directory")
    if (path / "checkpoints").is_dir():
        patience = False
        with suppress(UserError):  # a damaged config.toml is reported by those who need it
            patience = load_toml(path / "config.toml")[1].get("patience")
        best = path / "checkpoints" / "best"
        path = best if patience and best.is_file() else best.with_name("last")
    if path.is_file() and path.name in ("last", "best"):
        name = read_text(path, "it must hold the name of a checkpoint beside it").strip()
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{path}: holds {name[:50]!r}, where the name of a checkpoint beside it is needed")
        path = path.parent / name
    if not (path / "manifest.json").exists():
        refuse_pickle(path, SAVE_TENSORS)
        raise UserError(f"{path}: not a checkpoint (no manifest.json); name a run, or a directory run/checkpoints/step-N")
    return path

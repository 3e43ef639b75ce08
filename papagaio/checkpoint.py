"""Checkpoint directories: complete without siblings, no pickle, verified by sha256, there whole or not at all.

run/checkpoints/step-1000/   model.safetensors, model.json, optimizer.safetensors, state.json, tokenizer/, manifest.json
run/checkpoints/last, best   small text files with the name of one of them

Of a run with adapters (papagaio/lora.py) a checkpoint holds adapter_model.safetensors and adapter_config.json in place of
model.safetensors, and its state names the base that they belong to by its sha256.
"""

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from papagaio.config import MachineError, UserError
from papagaio.files import file_sha256, flush_to_disk, sealed, to_json, write_whole
from papagaio.lora import adapter_state, adapters, load_adapters, merged
from papagaio.tokenizer import Tokenizer, load_tokenizer, save_tokenizer


class Contents(NamedTuple):
    """What a checkpoint holds beside its tokenizer: tensors by file and name, and the text of the JSON files."""

    tensors: dict[str, dict[str, torch.Tensor]]
    texts: dict[str, str]


def contents(
    model: nn.Module, model_fields: dict[str, Any], optimizers: list[torch.optim.Optimizer], state: dict[str, Any]
) -> Contents:
    """What is to be saved; the tensors are those that training goes on to change. Of a model with adapters these alone."""
    texts = {"model.json": to_json(model_fields), "state.json": to_json(state)}
    if adapters(model):
        weights, adapter_config = adapter_state(model)
        tensors = {"adapter_model.safetensors": weights}
        texts["adapter_config.json"] = to_json(adapter_config)
    else:
        tensors = {"model.safetensors": {name: t.contiguous() for name, t in model.state_dict().items()}}
    return Contents(tensors | {"optimizer.safetensors": _optimizer_tensors(model, optimizers)}, texts)


def write_checkpoint(final: Path, contents: Contents, tokenizer: Tokenizer) -> None:
    """Write a checkpoint directory, in a temporary one beside it which then gets its name. Equal contents give equal files.

    Raises OSError, or safetensors' own error, and leaves nothing, where the disk does not take it.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    discard(temporary)
    try:
        temporary.mkdir(parents=True)
        for name, text in contents.texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name, tensors in contents.tensors.items():
            metadata = {"format": "pt"} if name == "adapter_model.safetensors" else None  # as PEFT wants it
            save_file(tensors, temporary / name, metadata)
            shutil.copymode(temporary / "model.json", temporary / name)  # safetensors' own lets nobody else read it
        save_tokenizer(tokenizer, temporary / "tokenizer")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {"files": {str(path.relative_to(temporary)): file_sha256(path) for path in files}}
        for path in files:
            flush_to_disk(path)
        write_whole(temporary / "manifest.json", sealed(manifest))
        flush_to_disk(temporary / "tokenizer")
        discard(final)  # damaged, or of a run that went on from before it
        temporary.rename(final)
        flush_to_disk(final.parent)
    except (OSError, SafetensorError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def discard(path: Path) -> None:
    """Delete a directory; what a crash leaves half deleted does not bear its name any more."""
    if path.exists():
        condemned = path.with_name(f".{path.name.lstrip('.')}.old")
        shutil.rmtree(condemned, ignore_errors=True)
        path.rename(condemned)
        shutil.rmtree(condemned)


def steps_saved(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints in a directory, in order."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in checkpoints.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def prune(checkpoints: Path, step: int, keep: int) -> None:
    """Of the checkpoints up to `step` delete all but the `keep` newest, and those that last and best name.

    What is beyond the step is damaged: a run goes on from the newest that is not. It stays until its step is saved again.
    """
    for left in checkpoints.glob(".*.old"):  # by a deletion that was broken off
        shutil.rmtree(left)
    files = (checkpoints / name for name in ("last", "best"))
    named = {path.read_text(encoding="utf-8").strip() for path in files if path.exists()}
    for old in [n for n in steps_saved(checkpoints) if n <= step][:-keep]:
        if f"step-{old}" not in named:
            discard(checkpoints / f"step-{old}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose files have been verified: `GPT(GPTConfig(**checkpoint.model_fields))` is its model."""

    path: Path
    model_fields: dict[str, Any]
    state: dict[str, Any]
    tokenizer: Tokenizer
    weights_sha256: str  # of the file of weights, or of adapters
    base: "Checkpoint | None" = None  # what the adapters belong to, where it holds such

    def build(self, make: Callable[[dict[str, Any]], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model that `make` makes of model_fields, for generation: with the saved weights, matrices in dtype.

        No time or memory goes into initial weights, and what stays as it is in the file is mapped, not copied.
        """
        draws = nn.Embedding.reset_parameters
        nn.Embedding.reset_parameters = lambda self: None  # to draw normal numbers on this device, torch imports its compiler
        try:
            with torch.device("meta"):
                model = make(self.model_fields)
        finally:
            nn.Embedding.reset_parameters = draws
        self.load_model(model, dtype)
        return model.to(device).eval()

    def load_model(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Copy the saved weights into a model, or let them be the weights of one on the meta device, matrices in dtype.

        Adapters are added into the weights, or put into a model that has such itself. Raises UserError where the shapes differ,
        MachineError for weights that are not finite.
        """
        try:
            if self.base is not None and adapters(model):
                load_adapters(model, _load_tensors(self.path / "adapter_model.safetensors"))
                return
            tensors = self._tensors()
            if dtype is not None:
                tensors = {name: tensor.to(dtype) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
            model.load_state_dict(tensors, assign=next(model.parameters()).is_meta)
        except (UserError, MachineError):
            raise
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.path}: the weights do not fit the model: {error}") from None

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self.base is None:
            return _load_tensors(self.path / "model.safetensors")
        path = self.path / "adapter_config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            return merged(self.base._tensors(), _load_tensors(self.path / "adapter_model.safetensors"), config)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"{path}: not a configuration of adapters ({error!r})") from None

    def load_optimizers(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Restore what `save_checkpoint` stored of the optimizers. Raises UserError where they are others."""
        tensors = _load_tensors(self.path / "optimizer.safetensors")
        names = {p: name for name, p in model.named_parameters()}
        for i, optimizer in enumerate(optimizers):
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                prefix = f"{i}.{names[p]}."
                found = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
                optimizer.state[p] = {key: tensor.to(p.device) for key, tensor in found.items()}
        if tensors:
            raise UserError(f"{self.path}: made with another optimizer; resume with the run's own options")


def open_checkpoint(path: Path, base: Path | None = None) -> Checkpoint:
    """Open a checkpoint directory, a `last` or `best` file, or a run, and verify its files.

    Of a run it is the last checkpoint, of one with patience the best. Adapters need the checkpoint that they were made
    for: `base`, or what their run's config.toml names. Raises UserError where it is none of these, or damaged: the file is
    named.
    """
    path = resolve(path)
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, sha256 in files.items():
            if file_sha256(path / name) != sha256:
                raise UserError(f"{path / name}: changed or cut short since it was written; take another checkpoint")
        fields = json.loads((path / "model.json").read_text(encoding="utf-8"))
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        adapted = "adapter_model.safetensors" in files
        weights_sha256 = files["adapter_model.safetensors" if adapted else "model.safetensors"]
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}; a checkpoint has this file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a whole checkpoint ({error!r})") from None
    tokenizer = load_tokenizer(path / "tokenizer")
    return Checkpoint(path, fields, state, tokenizer, weights_sha256, _base(path, state, base) if adapted else None)


def _base(path: Path, state: dict[str, Any], base: Path | None) -> Checkpoint:
    """The checkpoint that the adapters in `path` were made for. Raises UserError where it is not to be found, or another."""
    config = path.parent.parent / "config.toml"
    if base is None and config.is_file():
        try:
            base = Path(tomllib.loads(config.read_text(encoding="utf-8"))["init_from"])
        except (ValueError, KeyError, TypeError):
            base = None
    if base is None or not base.exists():
        tried = f"; it is not at {base} any more" if base is not None else ""
        raise UserError(f"{path}: adapters alone; name the checkpoint that they were made for with --base{tried}")
    found = open_checkpoint(base)
    if found.weights_sha256 != state.get("base_sha256"):
        raise UserError(f"{path}: adapters for another base than {found.path}; name the one they were made for with --base")
    return found


def resolve(path: Path) -> Path:
    """The checkpoint directory that a path means: itself, or what a run's or a pointer file's name leads to."""
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    if (path / "manifest.json").exists() and not (path / "model.json").exists():
        raise UserError(f"{path}: a dataset, not a checkpoint; name a run or a checkpoint directory")
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / ("best" if _means_best(path) else "last")
    if path.is_file() and path.name in ("last", "best"):
        path = path.parent / path.read_text(encoding="utf-8").strip()
    if not (path / "manifest.json").exists():
        raise UserError(f"{path}: not a checkpoint (no manifest.json); name a run, or a directory run/checkpoints/step-N")
    return path


def _means_best(run: Path) -> bool:
    """Whether a run was to stop when it got no better. What cannot be read is named by who opens it."""
    try:
        patience = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).get("patience", 0)
        return bool(patience) and (run / "checkpoints" / "best").is_file()
    except (OSError, ValueError):
        return False


def _optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{i}.{names[p]}.{key}": tensor.contiguous()
        for i, optimizer in enumerate(optimizers)
        for p, tensors in optimizer.state.items()
        for key, tensor in tensors.items()
    }


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise MachineError(f"{path}: {name} holds numbers that are not finite")
    return tensors

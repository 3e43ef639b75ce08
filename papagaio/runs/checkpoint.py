"""Checkpoint directories: complete without siblings, no pickle, verified by sha256, there whole or not at all.

run/checkpoints/step-1000/   model.safetensors, model.json, optimizer.safetensors, state.json, tokenizer/, manifest.json
run/checkpoints/last, best   small text files with the name of one of them

With adapters (training/lora.py), a checkpoint holds adapter_model.safetensors and adapter_config.json in place of
model.safetensors, and its state names the base that they belong to by its sha256.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from papagaio.errors import MachineError, UserError
from papagaio.files import (
    SAVE_TENSORS,
    FileName,
    Manifest,
    Sha256,
    file_sha256,
    flush_to_disk,
    read_manifest,
    read_object,
    read_text,
    refuse_pickle,
    sealed,
    to_json,
    write_whole,
)
from papagaio.options import load_toml
from papagaio.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from papagaio.training.lora import adapter_state, adapters, expected, load_adapters, merged
from papagaio.training.optimizers import expected_state


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


class CheckpointManifest(Manifest):
    """manifest.json."""

    of: ClassVar[str] = "a whole checkpoint's manifest"

    files: dict[FileName, Sha256]


CURE = "take another checkpoint"
LONGEST_CONTEXT = 2**22  # tokens; beyond any that was ever trained


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose files have been verified: `GPT(GPTConfig(**checkpoint.model_fields))` is its model."""

    path: Path
    model_fields: dict[str, Any]
    state: dict[str, Any]
    tokenizer: Tokenizer
    weights_sha256: str  # of the file of weights, or of adapters
    base: "Checkpoint | None" = None  # what the adapters belong to, where it holds such

    def outline(self, make: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
        """The model that `make` makes of model_fields, on the meta device: no time or memory goes into weights.

        Raises UserError where it is none, or the saved weights are not its own.
        """
        draws = nn.Embedding.reset_parameters
        nn.Embedding.reset_parameters = lambda self: None  # to draw normal numbers on this device, torch imports its compiler
        try:
            with torch.device("meta"):
                model = make(self.model_fields)
        except (TypeError, ValueError, OverflowError, ZeroDivisionError, RuntimeError) as error:
            raise UserError(f"{self.path / 'model.json'}: {error}; {CURE}") from None
        finally:
            nn.Embedding.reset_parameters = draws
        self._compare(model.state_dict())
        return model

    def build(self, make: Callable[[dict[str, Any]], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model that `make` makes of model_fields, for generation: with the saved weights, matrices in dtype.

        What stays as it is in the file is mapped, not copied.
        """
        model = self.outline(make)
        self.load_model(model, dtype)
        return model.to(device).eval()

    def load_model(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Copy the saved weights into a model, or let them be the weights of one on the meta device, matrices in dtype.

        Adapters are added into the weights, or put into a model that has such itself. Raises UserError where names, types or
        shapes differ, before anything is read but headers; MachineError for weights that are not finite.
        """
        if self.base is not None and adapters(model):
            path = self.path / "adapter_model.safetensors"
            compare(path, adapter_state(model)[0], "the model with adapters", "they are of another rank or have other targets")
            load_adapters(model, _load_tensors(path))
            return
        self._compare(model.state_dict())
        tensors = self._tensors()
        if dtype is not None:
            tensors = {name: tensor.to(dtype) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
        model.load_state_dict(tensors, assign=next(model.parameters()).is_meta)

    def _compare(self, weights: Mapping[str, Tensor]) -> None:
        """Raises UserError unless the weights saved here, or in the base of what is saved here, are such as these."""
        if self.base is None:
            compare(self.path / "model.safetensors", weights)
            return
        self.base._compare(weights)
        path = self.path / "adapter_model.safetensors"
        compare(path, expected(weights, header(path), self._adapter_config()["r"]), "the model with adapters")

    def _tensors(self) -> dict[str, Tensor]:
        if self.base is None:
            return _load_tensors(self.path / "model.safetensors")
        return merged(self.base._tensors(), _load_tensors(self.path / "adapter_model.safetensors"), self._adapter_config())

    def _adapter_config(self) -> dict[str, Any]:
        path = self.path / "adapter_config.json"
        config = read_object(path, CURE)
        for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
            if type(config.get(key)) not in kinds or not 0 < config[key] < 2**31:
                raise UserError(f"{path}: {key} must be a positive number, not {config.get(key)!r}; {CURE}")
        return config

    def load_optimizers(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Restore what `write_checkpoint` stored of the optimizers. Raises UserError where they are others."""
        path = self.path / "optimizer.safetensors"
        names = {p: name for name, p in model.named_parameters()}
        found, wanted = header(path), {}
        for i, optimizer in enumerate(optimizers):
            for p, tensors in expected_state(optimizer).items():
                named = {f"{i}.{names[p]}.{key}": tensor for key, tensor in tensors.items()}
                if named.keys() & found.keys():  # else it has not made a step yet
                    wanted |= named
        compare(path, wanted, "this optimizer", "made with another optimizer? resume with the run's own options")
        saved = _load_tensors(path)
        for i, optimizer in enumerate(optimizers):
            for p, tensors in expected_state(optimizer).items():
                kept = {key: saved.get(f"{i}.{names[p]}.{key}") for key in tensors}
                optimizer.state[p] = {key: tensor.to(p.device) for key, tensor in kept.items() if tensor is not None}


def open_checkpoint(path: Path, base: Path | None = None) -> Checkpoint:
    """Open a checkpoint directory, a `last` or `best` file, or a run, and verify its files.

    Of a run it is the last checkpoint, of one with patience the best. Adapters need the checkpoint that they were made
    for: `base`, or what their run's config.toml names. Raises UserError where it is none of these, or damaged: the file is
    named.
    """
    return _open(resolve(path), base, ())


def _open(path: Path, base: Path | None, above: tuple[Path, ...]) -> Checkpoint:
    """`above` are the adapters whose base this is."""
    files = read_manifest(path / "manifest.json", CheckpointManifest, CURE)["files"]
    weights = "adapter_model.safetensors" if "adapter_model.safetensors" in files else "model.safetensors"
    needed = {weights, "model.json", "state.json", "optimizer.safetensors", "tokenizer/tokenizer.json"}
    if weights == "adapter_model.safetensors":
        needed.add("adapter_config.json")
    if missing := needed - files.keys():
        raise UserError(f"{path / 'manifest.json'}: does not name {min(missing)}, so that it cannot be verified; {CURE}")
    for name, sha256 in files.items():
        try:
            if file_sha256(path / name) != sha256:
                refuse_pickle(path / name, SAVE_TENSORS)
                raise UserError(f"{path / name}: changed or cut short since it was written; {CURE}")
        except OSError as error:
            raise UserError(f"{path / name}: {error.strerror}; a checkpoint has this file") from None
    fields, state = (read_object(path / name, CURE) for name in ("model.json", "state.json"))
    if type(state.get("step")) is not int:
        raise UserError(f"{path / 'state.json'}: step must be a whole number, not {state.get('step')!r}; {CURE}")
    tokenizer = load_tokenizer(path / "tokenizer")
    below = _base(path, state, base, above) if weights == "adapter_model.safetensors" else None
    checkpoint = Checkpoint(path, fields, state, tokenizer, files[weights], below)
    _refuse_absurd(checkpoint)
    return checkpoint


def _refuse_absurd(checkpoint: Checkpoint) -> None:
    """Raises UserError where the sizes in model.json are not those of the tokenizer and the weights: even a model without
    weights takes memory for each of its layers."""
    holder = checkpoint
    while holder.base is not None:
        holder = holder.base
    tensors = header(holder.path / "model.safetensors")
    largest = max((size for _, shape in tensors.values() for size in shape), default=1)
    tokens = checkpoint.tokenizer.vocab_size
    limits = {"vocab_size": (tokens, tokens), "n_layer": (1, len(tensors)), "n_embd": (1, largest)}
    for name, (least, most) in (limits | {"block_size": (1, LONGEST_CONTEXT)}).items():
        value = checkpoint.model_fields.get(name)
        if type(value) is not int or not least <= value <= most:
            known = f"{least:,}" if least == most else f"{least} to {most:,}"
            path = checkpoint.path / "model.json"
            raise UserError(f"{path}: {name} is {value!r}; the tokenizer and weights beside it allow {known}; {CURE}")


def _base(path: Path, state: dict[str, Any], base: Path | None, above: tuple[Path, ...]) -> Checkpoint:
    """The checkpoint that the adapters in `path` were made for. Raises UserError where it is not to be found, or another."""
    config = path.parent.parent / "config.toml"
    if base is None and config.is_file():
        try:
            base = Path(load_toml(config)[1]["init_from"])
        except (UserError, KeyError, TypeError):
            base = None
    if base is None or not base.exists():
        tried = f"; it is not at {base} any more" if base is not None else ""
        raise UserError(f"{path}: adapters alone; name the checkpoint that they were made for with --base{tried}")
    above, found = (*above, path.resolve()), resolve(base)
    if found.resolve() in above:
        raise UserError(f"{path}: adapters for themselves, by way of {found}; name the checkpoint they were made for with --base")
    opened = _open(found, None, above)
    if opened.weights_sha256 != state.get("base_sha256"):
        raise UserError(f"{path}: adapters for another base than {found}; name the one they were made for with --base")
    return opened


def resolve(path: Path) -> Path:
    """The checkpoint directory that a path means: itself, or what a run's or a pointer file's name leads to."""
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    if (path / "manifest.json").exists() and any(path.glob("val-*.npy")):
        raise UserError(f"{path}: a dataset, not a checkpoint; name a run or a checkpoint directory")
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / ("best" if _means_best(path) else "last")
    if path.is_file() and path.name in ("last", "best"):
        path = path.parent / _pointed_to(path)
    if not (path / "manifest.json").exists():
        refuse_pickle(path, SAVE_TENSORS)
        raise UserError(f"{path}: not a checkpoint (no manifest.json); name a run, or a directory run/checkpoints/step-N")
    return path


def _pointed_to(path: Path) -> str:
    """The name of the directory beside it that a `last` or `best` file holds."""
    name = read_text(path, "it must hold the name of a checkpoint beside it").strip()
    if Path(name).name != name or "\0" in name:
        raise UserError(f"{path}: holds {name[:50]!r}, where the name of a checkpoint beside it is needed")
    return name


def _means_best(run: Path) -> bool:
    """Whether a run was to stop when it got no better. What cannot be read is named by who opens it."""
    try:
        patience = load_toml(run / "config.toml")[1].get("patience", 0)
        return bool(patience) and (run / "checkpoints" / "best").is_file()
    except UserError:
        return False


def _optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{i}.{names[p]}.{key}": tensor.contiguous()
        for i, optimizer in enumerate(optimizers)
        for p, tensors in optimizer.state.items()
        for key, tensor in tensors.items()
    }


DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U8": "uint8"}
Kind = tuple[str, tuple[int, ...]]  # a tensor's type and shape


def header(path: Path) -> dict[str, Kind]:
    """What tensors are in a safetensors file, by name; of their content nothing is read. Raises UserError where it is none."""
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        refuse_pickle(path, SAVE_TENSORS)
        raise UserError(f"{path}: not a safetensors file: {error}; {CURE}") from None
    return {name: (DTYPES.get(dtype, dtype), shape) for name, (dtype, shape) in kinds.items()}


def compare(path: Path, wanted: Mapping[str, Tensor], who: str = "the model", cure: str = CURE) -> None:
    """Raises UserError unless a safetensors file has tensors of just these names, types and shapes, which `who` has."""
    found = header(path)
    for name in (*wanted, *(found.keys() - wanted.keys())):
        right = (str(wanted[name].dtype).removeprefix("torch."), tuple(wanted[name].shape)) if name in wanted else None
        if found.get(name) != right:
            raise UserError(f"{path}: {name} is {_shown(found.get(name))} where {who} has {_shown(right)}; {cure}")


def _shown(kind: Kind | None) -> str:
    return f"{kind[0]} {list(kind[1])}" if kind else "missing"


def _load_tensors(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise MachineError(f"{path}: {name} holds numbers that are not finite")
    return tensors

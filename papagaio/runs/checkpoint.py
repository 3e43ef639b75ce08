"""The checkpoint format: a directory that needs no other, without pickles, verified by sha256, written whole or not at all.

    step-1000/   model.safetensors, model.json, optimizer.safetensors, state.json, tokenizer/, manifest.json

With adapters (training/lora.py), adapter_model.safetensors and adapter_config.json replace model.safetensors, and state.json
holds the sha256 of the base's weights. runs/directory.py finds and opens the checkpoints of a run.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from papagaio import files
from papagaio.errors import UserError
from papagaio.files import SAVE_TENSORS, FileName, Manifest, Sha256, read_object, refuse_pickle, to_json
from papagaio.runs.tensors import CURE, compare, finite_tensors, read_tensors
from papagaio.tokenizer import Tokenizer
from papagaio.tokenizer_files import load_tokenizer, save_tokenizer
from papagaio.training.lora import adapter_state, adapters, expected, load_adapters, merged
from papagaio.training.optimizers import expected_state, own_state
from papagaio.training.sharding import local, part_for

WEIGHTS, ADAPTERS, MOMENTS = "model.safetensors", "adapter_model.safetensors", "optimizer.safetensors"
METADATA = {WEIGHTS: None, ADAPTERS: {"format": "pt"}, MOMENTS: None}  # PEFT asks for the format
LONGEST_CONTEXT = 2**22  # tokens; longer than that of any model so far
MakeModel = Callable[[dict[str, Any]], nn.Module]


class Contents(NamedTuple):
    """The content of a checkpoint besides the tokenizer: by file its tensors by name, or a function that writes it; and the text
    of the JSON files."""

    tensors: dict[str, dict[str, Tensor] | Callable[[Path], None]]
    texts: dict[str, str]


def contents(model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> Contents:
    """What a checkpoint of a model will hold: of a model with adapters, these alone. The tensors are not copied."""
    texts = {"model.json": to_json(dataclasses.asdict(model.config)), "state.json": to_json(state)}
    if adapters(model):
        weights, adapter_config = adapter_state(model)
        tensors = {ADAPTERS: weights}
        texts["adapter_config.json"] = to_json(adapter_config)
    else:
        tensors = {WEIGHTS: {name: tensor.contiguous() for name, tensor in model.state_dict().items()}}
    names = {p: name for name, p in model.named_parameters()}
    moments = {
        f"{i}.{names[p]}.{key}": tensor.contiguous()
        for i, optimizer in enumerate(optimizers)
        for p, kept in optimizer.state.items()
        for key, tensor in kept.items()
    }
    return Contents(tensors | {MOMENTS: moments}, texts)


def write_checkpoint(final: Path, contents: Contents, tokenizer: Tokenizer) -> None:
    """Write a checkpoint under a temporary name and rename it to `final`. Equal contents give equal files. Raises OSError or
    SafetensorError, and leaves nothing, if the disk fails."""
    temporary = final.with_name(f".{final.name}.tmp")
    files.discard(temporary)
    try:
        temporary.mkdir(parents=True)
        for name, text in contents.texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name, tensors in contents.tensors.items():
            tensors(temporary / name) if callable(tensors) else save_file(tensors, temporary / name, METADATA[name])
            shutil.copymode(temporary / "model.json", temporary / name)  # safetensors lets only the owner read its files
        save_tokenizer(tokenizer, temporary / "tokenizer")
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {"files": {str(path.relative_to(temporary)): files.file_sha256(path) for path in paths}}
        for path in paths:
            files.flush_to_disk(path)
        files.write_whole(temporary / "manifest.json", files.sealed(manifest))
        files.flush_to_disk(temporary / "tokenizer")
        files.discard(final)  # damaged, or from before the run was resumed at an earlier step
        temporary.rename(final)
        files.flush_to_disk(final.parent)
    except (OSError, SafetensorError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class CheckpointManifest(Manifest):
    """manifest.json."""

    of: ClassVar[str] = "a whole checkpoint's manifest"
    files: dict[FileName, Sha256]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose files have been verified: `GPT(GPTConfig(**checkpoint.model_fields))` is its model."""

    path: Path
    model_fields: dict[str, Any]
    state: dict[str, Any]
    tokenizer: Tokenizer
    weights: Path  # the file of weights, or of adapters
    weights_sha256: str
    base: "Checkpoint | None" = None  # for adapters: the checkpoint they belong to

    @property
    def is_chat(self) -> bool:
        """Whether the model was fine-tuned and answers questions, or continues text as pretraining left it."""
        return self.state.get("stage") == "finetune" or self.state.get("answers") is True

    @property
    def origin(self) -> dict[str, str | None]:
        """What the state of a run that starts from this checkpoint says of it."""
        return {"base_sha256": self.weights_sha256, "base_license": self.state.get("base_license")}

    def outline(self, make_model: MakeModel) -> nn.Module:
        """The model of model.json on the meta device, without weights (make_model: see `model_maker`). Raises UserError if
        model.json describes no model, or one that the saved weights do not fit."""
        try:
            with torch.device("meta"), _WithoutDraws():
                model = make_model(self.model_fields)
        except (TypeError, ValueError, OverflowError, ZeroDivisionError, RuntimeError) as error:
            raise UserError(f"{self.path / 'model.json'}: {error}; {CURE}") from None
        self._compare(model.state_dict())
        return model

    def build(self, make_model: MakeModel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model for generation: with the saved weights, matrices in dtype. Weights whose type is kept are memory-mapped."""
        model = self.outline(make_model)
        tensors = {name: tensor.to(dtype) if tensor.ndim > 1 else tensor for name, tensor in self.tensors().items()}
        model.load_state_dict(tensors, assign=True)
        return model.to(device).eval()

    def load_model(self, model: nn.Module) -> None:
        """Copy the saved weights into a model. Adapters are put into a model that has adapters, and are added to the weights of
        any other. Raises UserError if names, types or shapes differ, MachineError if weights are not finite."""
        if self.base is not None and adapters(model):
            compare(self.weights, adapter_state(model)[0], "the model with adapters", "they have another rank or other targets")
            load_adapters(model, finite_tensors(self.weights))
        else:
            self._compare(weights := model.state_dict())
            saved = self.tensors()
            for name, tensor in weights.items():
                local(tensor).copy_(part_for(saved[name], tensor))

    def _compare(self, weights: Mapping[str, Tensor]) -> None:
        """Raises UserError unless the saved weights have the names, types and shapes of `weights`, and the adapters fit them."""
        if self.base is None:
            compare(self.weights, weights)
            return
        self.base._compare(weights)
        wanted = expected(weights, read_tensors(self.weights), self._adapter_config())
        compare(self.weights, wanted, "the model with adapters")

    def tensors(self) -> dict[str, Tensor]:
        """The saved weights, with adapters added."""
        tensors = finite_tensors(self.weights)
        return tensors if self.base is None else merged(self.base.tensors(), tensors, self._adapter_config())

    def _adapter_config(self) -> dict[str, Any]:
        path = self.path / "adapter_config.json"
        config = read_object(path, CURE)
        for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
            if type(config.get(key)) not in kinds or not 0 < config[key] < 2**31:
                raise UserError(f"{path}: {key} must be a positive number, not {config.get(key)!r}; {CURE}")
        try:
            TypeAdapter(dict[str, list[NonNegativeInt]] | None).validate_python(
                config.get("trainable_token_indices"), strict=True
            )
        except ValidationError:
            raise UserError(f"{path}: trainable_token_indices must be lists of token ids by layer; {CURE}") from None
        return config

    def load_optimizers(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Restore the saved state of the optimizers. Raises UserError if they are other optimizers."""
        path = self.path / MOMENTS
        names = {p: name for name, p in model.named_parameters()}
        saved, wanted = finite_tensors(path), {}
        if any(tensor.ndim == 3 for tensor in saved.values()):
            remedy = "which alone can resume it; --overwrite begins anew"
            raise UserError(f"{path}: momenta in stacks, made by an older version of papagaio, {remedy}")
        for i, optimizer in enumerate(optimizers):
            for p, tensors in expected_state(optimizer).items():
                named = {key: f"{i}.{names[p]}.{key}" for key in tensors}
                if saved.keys() & named.values():  # otherwise it has made no step yet
                    wanted |= {named[key]: tensor for key, tensor in tensors.items()}
                    found = {key: saved[name] for key, name in named.items() if name in saved}
                    optimizer.state[p] = {key: own_state(optimizer, p, tensor) for key, tensor in found.items()}
        compare(path, wanted, "this optimizer", "made with another optimizer? resume with the run's own options")

    def check_sizes(self) -> None:
        """Raises UserError if sizes in model.json contradict the tokenizer or the weights: even meta layers take memory."""
        holder = self
        while holder.base is not None:
            holder = holder.base
        tensors = read_tensors(holder.weights)
        largest = max((size for tensor in tensors.values() for size in tensor.shape), default=1)
        tokens = self.tokenizer.vocab_size
        limits = {"vocab_size": (tokens, tokens), "n_layer": (1, len(tensors)), "n_embd": (1, largest)}
        for name, (least, most) in (limits | {"block_size": (1, LONGEST_CONTEXT)}).items():
            value = self.model_fields.get(name)
            if type(value) is not int or not least <= value <= most:
                place = f"{self.path / 'model.json'}: {name} is {value!r}"
                raise UserError(f"{place}; the tokenizer and weights beside it allow {least:,} to {most:,}; {CURE}")


class _WithoutDraws(TorchFunctionMode):
    """Skips nn.init.normal_, which on the meta device has nothing to draw, but would import torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def model_maker(model_class: type[nn.Module], config_class: type) -> MakeModel:
    """A function that builds `model_class(config_class(**fields))` from the fields of a model.json. It raises ValueError if a
    value has not the type that the dataclass declares."""

    def make_model(fields: dict[str, Any]) -> nn.Module:
        for field in dataclasses.fields(config_class):
            value, kind = fields.get(field.name, field.default), field.type
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind | int if kind is float else kind):
                raise ValueError(f"{field.name} must be {getattr(kind, '__name__', kind)}, not {value!r}")
        return model_class(config_class(**fields))

    return make_model


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint directory and read its small files. Raises UserError, which names the file concerned."""
    hashes = files.read_manifest(path / "manifest.json", CheckpointManifest, CURE)["files"]
    weights = ADAPTERS if ADAPTERS in hashes else WEIGHTS
    needed = {weights, "model.json", "state.json", MOMENTS, "tokenizer/tokenizer.json"}
    if missing := (needed | ({"adapter_config.json"} if weights == ADAPTERS else set())) - hashes.keys():
        raise UserError(f"{path / 'manifest.json'}: does not name {min(missing)}, so that it cannot be verified; {CURE}")
    for name, sha256 in hashes.items():
        try:
            if files.file_sha256(path / name) != sha256:
                refuse_pickle(path / name, SAVE_TENSORS)
                raise UserError(f"{path / name}: changed or cut short since it was written; {CURE}")
        except OSError as error:
            raise UserError(f"{path / name}: {error.strerror}; a checkpoint has this file") from None
    fields, state = (read_object(path / name, CURE) for name in ("model.json", "state.json"))
    if type(state.get("step")) is not int:
        raise UserError(f"{path / 'state.json'}: step must be a whole number, not {state.get('step')!r}; {CURE}")
    return Checkpoint(path, fields, state, load_tokenizer(path / "tokenizer"), path / weights, hashes[weights])

"""The tensors of a released model, which may lie in several safetensors files; they are read one at a time."""

from contextlib import ExitStack
from pathlib import Path
from typing import Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from papagaio.errors import UserError
from papagaio.files import read_object
from papagaio.runs.tensors import TYPES

INDEX = "model.safetensors.index.json"
CURE = "take the whole directory again from where it was made"


class TensorFiles:
    """The tensors of a directory's safetensors files, by name, memory-mapped: model.safetensors, or shards with an index."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError if the files are missing, damaged, or not those of the index."""
        self.stack, self.files, self.places = ExitStack(), {}, dict[str, Path]()
        single, index = directory / "model.safetensors", directory / INDEX
        listed: dict[str, str] | None = None
        if not single.is_file():
            if not index.is_file():
                raise UserError(_missing(directory))
            listed = read_object(index, CURE).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(n, str) and Path(n).name == n for n in listed.values()):
                raise UserError(f"{index}: weight_map must name a file beside it for each tensor; {CURE}")
        for path in [single] if listed is None else [directory / name for name in sorted(set(listed.values()))]:
            try:
                self.files[path] = self.stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: not a whole safetensors file: {error}; {CURE}") from None
            self.places |= dict.fromkeys(self.files[path].keys(), path)
        if listed is not None and (wrong := {n: directory / f for n, f in listed.items()}.items() ^ self.places.items()):
            raise UserError(f"{index}: {min(wrong)[0]} is not where it says; {CURE}")
        for name, path in self.places.items():
            if (code := self.files[path].get_slice(name).get_dtype()) not in TYPES:
                raise UserError(f"{path}: {name} is {code}; {', '.join(TYPES)} can be read: save the model in bfloat16")

    def shape(self, name: str) -> list[int]:
        return self.files[self.places[name]].get_slice(name).get_shape()

    def read(self, name: str) -> Tensor:
        return self.files[self.places[name]].get_tensor(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def _missing(directory: Path) -> str:
    if any(directory.glob("pytorch_model*.bin")):
        cure = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) of transformers writes model.safetensors"
        return f"{directory}: has its weights in pytorch_model.bin alone, a pickle, which can run code when it is loaded; {cure}"
    return f"{directory}: no model.safetensors and no {INDEX}: a directory with a model's weights has one of them"

"""The options of export.py, by command."""

from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from papagaio.options import Options, option

_files, _format = partial(option, group="Input and output"), partial(option, group="Format")


def _check_free(path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path}: is there already; name another one, or remove it")


class FromHfOptions(Options):
    """export.py from-hf SOURCE: a model of Hugging Face transformers becomes a run."""

    source: str = _files(..., "directory with config.json and safetensors files, or the name of a model on the hub")
    out_dir: Path = _files(..., "run directory to make")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_free(self.out_dir)
        return self


class FromGgufOptions(Options):
    """export.py from-gguf SOURCE: a model in GGUF becomes a run."""

    source: Path = _files(..., "GGUF file")
    out_dir: Path = _files(..., "run directory to make")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.source.is_file():
            raise ValueError(f"{self.source}: no such file; a model in GGUF is needed")
        _check_free(self.out_dir)
        return self


class _ToOptions(Options):
    source: Path = _files(..., "a run, or a checkpoint directory")
    base: Path | None = _files(None, "the checkpoint that adapters (LoRA) were trained for, if it has moved since")
    out: Path

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_free(self.out)
        return self


class ToHfOptions(_ToOptions):
    """export.py to-hf SOURCE: a checkpoint becomes a directory that transformers, vLLM and others load."""

    out: Path = _files(..., "directory to make")
    adapter: bool = _format(False, "write the adapters (LoRA) alone, for PEFT; otherwise they are added to the weights")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _format("auto", "of weights; auto: the smallest without loss")
    shard_bytes: int = _format(5_000_000_000, "largest safetensors file, in bytes", ge=1)


class ToGgufOptions(_ToOptions):
    """export.py to-gguf SOURCE: a checkpoint becomes a file that llama.cpp and Ollama run, with a Modelfile beside it."""

    out: Path = _files(..., "GGUF file to make")
    type: Literal["f32", "f16", "bf16", "q8_0"] = _format("f16", "of the matrices; vectors stay in float32")


COMMANDS: dict[str, type[Options]] = {
    "from-hf": FromHfOptions,
    "from-gguf": FromGgufOptions,
    "to-hf": ToHfOptions,
    "to-gguf": ToGgufOptions,
}

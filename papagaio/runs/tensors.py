"""safetensors files: read memory-mapped, compared with what is expected, and written one tensor at a time.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of the header, the header in JSON, the data. The
library writes only what is in memory as a whole; `write_tensors` writes the same bytes, of models that are larger than that.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from papagaio.errors import MachineError, UserError
from papagaio.files import SAVE_TENSORS, refuse_pickle

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # in the order in which the library writes them
CURE = "take another checkpoint"
Layout = Mapping[str, tuple[Sequence[int], torch.dtype]]  # shape and type of each tensor, by name


def in_file_order(layout: Layout) -> list[str]:
    """The names of tensors in the order in which a file holds them: by type, then by name."""
    kinds = list(TYPES.values())
    return sorted(layout, key=lambda name: (kinds.index(layout[name][1]), name))


def write_tensors(path: Path, layout: Layout, read: Callable[[str], Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors of these names, shapes and types; `read` gives them by name, one at a time, `in_file_order`."""
    codes = {dtype: code for code, dtype in TYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    names, offset = in_file_order(layout), 0
    for name in names:
        shape, dtype = layout[name]
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned to 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            shape, dtype = layout[name]
            tensor = read(name).to(dtype).contiguous()
            assert tensor.shape == torch.Size(shape), name
            file.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, memory-mapped: only what is used is read. Raises UserError if it is none."""
    try:
        return load_file(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        refuse_pickle(path, SAVE_TENSORS)
        raise UserError(f"{path}: not a safetensors file: {error}; {CURE}") from None


def compare(path: Path, wanted: Mapping[str, Tensor], who: str = "the model", cure: str = CURE) -> None:
    """Raises UserError unless a safetensors file has exactly the names, types and shapes of `wanted`, which `who` has."""
    found = read_tensors(path)
    for name in (*wanted, *(found.keys() - wanted.keys())):
        is_, has = (
            "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            for tensor in (found.get(name), wanted.get(name))
        )
        if is_ != has:
            raise UserError(f"{path}: {name} is {is_} where {who} has {has}; {cure}")


def finite_tensors(path: Path) -> dict[str, Tensor]:
    """Like `read_tensors`, but raises MachineError for numbers that are not finite."""
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise MachineError(f"{path}: {name} holds numbers that are not finite")
    return tensors

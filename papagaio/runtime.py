"""The machine: device, precision, seeds, and what the chip could do at best."""

import contextlib
import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self

import torch

from papagaio.errors import STOP_SIGNALS, UserError

# Peak of dense bfloat16 matrix products in FLOP/s, from the makers' data sheets (without sparsity), by a part of the name
# that torch.cuda.get_device_name gives. First match wins: the longer name stands first.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
}


def pick_device(name: str) -> torch.device:
    """The device of that name; auto takes CUDA, then MPS, then the CPU. Raises UserError where this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device={name}: this machine has {torch.cuda.device_count()} CUDA devices; --device=cpu always works")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={name}: this machine has no MPS device; --device=cpu always works")
    return device


@functools.cache
def computes_bfloat16(device_type: str) -> bool:
    """True where the hardware multiplies bfloat16 matrices itself: most GPUs, and CPUs with AVX512-BF16 or AMX."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Type of the matrix products. auto: bfloat16 where the hardware computes it, float16 on older GPUs, else float32."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if computes_bfloat16(device.type) else torch.float16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Run matrix products in `dtype`; weights, sums and the loss stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    # What stays in float32 under autocast may still use the tensor cores' TF32.
    torch.set_float32_matmul_precision("high")
    return torch.autocast(device.type, dtype)


def compile_in_place(model: torch.nn.Module, device: torch.device) -> None:
    """Have torch compile the model at its first call; where this machine cannot, say why and leave it as it is.

    In place, so that parameter names stay as they are. What torch fails at later runs uncompiled, with torch's own warning.
    """
    if reason := why_not_compiled(device):
        print(f"not compiled, training goes on without: {reason}", file=sys.stderr)
        return
    torch._dynamo.config.suppress_errors = True
    model.compile()


def why_not_compiled(device: torch.device) -> str:
    """What torch's compiler lacks on this machine; empty where it works."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))  # needs the compiler: C++ on a CPU, Triton on a GPU
    except Exception as error:  # whatever the backend raises: a compiler that is missing, too old, or broken
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ""


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout is off inside, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def keep_memory() -> None:
    """Let freed memory stay with the process, for the next step to use.

    A step frees and asks again for hundreds of MiB; glibc hands large pieces back to the system each time, whose pages then
    have to be mapped and zeroed anew: a tenth of a training step on a CPU, half of an evaluation (LOG.md, 2026-11-23).
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
        for parameter, value in ((-3, 32 * 2**20), (-1, 2**31 - 1), (-2, 64 * 2**20)):  # mmap, trim threshold; top pad
            mallopt(parameter, value)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get the memory it asked for, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, None where the chip is not in the table: then no MFU is reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given: before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopped(BaseException):
    """A signal has come while `StopSignal.at_once` was in force."""


class StopSignal:
    """While active, SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) are noted in `received`: training ends its step and saves.

    A second signal ends the process at once; what has been saved is whole whenever that is.
    """

    received: int | None = None
    raises = False

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is inside changes nothing that is kept, so a signal breaks it off where it is. Raises Stopped."""
        self.raises = True
        if self.received is not None:
            raise Stopped
        yield
        self.raises = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)  # nothing is waited for
        self.received = number
        if self.raises:
            raise Stopped

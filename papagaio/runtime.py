"""The machine: device, precision, memory, signals, and the peak speed of known GPUs."""

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

from papagaio.errors import UserError, catch_signals

# Peak of dense bfloat16 matrix products in FLOP/s, from the makers' data sheets (without sparsity), by a part of the name
# that torch.cuda.get_device_name gives. The first match counts: longer names stand first.
PEAK_FLOPS = (
    *(("GB200", 2.5e15), ("B200", 2.25e15), ("H200 NVL", 835e12), ("H200", 989e12), ("GH200", 989e12)),
    *(("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("H800", 989e12), ("A100", 312e12), ("A800", 312e12)),
    *(("L40S", 362e12), ("A10G", 70e12), ("A10", 125e12), ("L4", 121e12)),
    *(("RTX 5090", 209.5e12), ("RTX 4090", 165.2e12), ("RTX 3090", 71e12), ("RTX A6000", 154.8e12)),
)


def pick_device(name: str) -> torch.device:
    """The device of that name; auto takes CUDA, then MPS, then the CPU. Raises UserError if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 1)
    if (device.index or 0) >= count:
        kind = device.type.upper()
        raise UserError(f"--device={name}: this machine has {count} {kind} devices; --device=cpu always works")
    return device


@functools.cache
def computes_bfloat16(device_type: str) -> bool:
    """Whether the hardware multiplies bfloat16 matrices: most GPUs, and CPUs with AVX512-BF16 or AMX."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Type of the matrix products. auto: bfloat16 if the hardware computes it, otherwise float16 on a GPU, float32 on a CPU."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if computes_bfloat16(device.type) else torch.float16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Compute matrix products in `dtype`; weights, sums and the loss stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    # Products that stay in float32 under autocast may use the tensor cores' TF32.
    torch.set_float32_matmul_precision("high")
    return torch.autocast(device.type, dtype)


def compile_in_place(model: torch.nn.Module, device: torch.device) -> None:
    """Have torch compile the model at its first call, in place, so that parameter names do not change. If this machine cannot
    compile, print why. Parts that fail to compile later run uncompiled, with torch's own warning."""
    if reason := why_not_compiled(device):
        print(f"not compiled, training goes on without: {reason}", file=sys.stderr)
    else:
        torch._dynamo.config.suppress_errors = True
        model.compile()


def compilation_notice() -> str:
    """What the compiler could not do, once for each reason, in the steps since the last call; empty if all is one graph.

    torch keeps silent about breaks, and after eight kinds of input it runs the model uncompiled: a step is then several times
    slower.
    """
    from torch._dynamo.utils import counters

    breaks = {str(reason).splitlines()[0] for reason in counters["graph_break"]}
    failed = counters["frames"]["total"] - counters["frames"]["ok"]
    found = breaks | ({f"{failed} functions run uncompiled"} if failed else set())
    new = sorted(found - _noticed)
    _noticed.update(found)
    return f"the compiled step is not one graph, and slower than it could be: {'; '.join(new)}" if new else ""


_noticed: set[str] = set()


def be_deterministic() -> None:
    """Have torch take only algorithms that give the same bits each time: on a GPU, sums of attention's gradient and cuBLAS."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def why_not_compiled(device: torch.device) -> str:
    """The reason why torch's compiler does not work on this machine; empty if it works."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))  # needs a compiler: C++ on a CPU, Triton on a GPU
    except Exception as error:  # whatever the backend raises if its compiler is missing, too old, or broken
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off inside, and restore the model's mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def keep_memory() -> None:
    """Let freed memory stay with the process. glibc returns large pieces to the system, and mapping and zeroing their pages again
    takes a tenth of a training step on a CPU, half of an evaluation (LOG.md, 2026-11-23)."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
        for parameter, value in ((-3, 32 * 2**20), (-1, 2**31 - 1), (-2, 64 * 2**20)):  # mmap, trim threshold; top pad
            mallopt(parameter, value)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s; None if it is not in the table, and then no MFU is reported."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue, before a clock is read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Stopped(BaseException):
    """A signal has arrived inside `StopSignal.at_once`."""


class StopSignal:
    """While active, the first of errors.STOP_SIGNALS is stored in `received`: training finishes its step and saves. A second
    signal ends the process at once; checkpoints on the disk are whole at any moment.

    One of several processes keeps the signal in `noted`, until all have agreed on the step: TrainingStep then sets `received`. A
    second signal is ignored, because launchers send the first one again."""

    received: int | None = None
    noted: int | None = None
    raises = False

    def __init__(self, alone: bool = True) -> None:
        self.alone = alone

    def __enter__(self) -> Self:
        self.before = catch_signals(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that changes nothing permanent: a signal breaks it off immediately. Raises Stopped."""
        self.raises = self.alone
        if self.received is not None:
            raise Stopped
        yield
        self.raises = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = self.noted or number
        if not self.alone:
            return
        if self.received is not None:
            os._exit(128 + number)  # without waiting for anything
        self.received = number
        if self.raises:
            raise Stopped

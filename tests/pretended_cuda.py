"""The CUDA branches of training without a GPU: devices, dtypes, shapes, graph breaks, number of operations. Run by test_cuda.py.

torch's CPU build lacks two things, which a few lines of C++ give it before it is loaded: a device guard for CUDA, here one that
does nothing, and an isAccelerator that says no, so that autograd asks for no streams. FakeTensorMode does the rest: tensors
without memory. Speed, numbers and the choice of an attention kernel are not seen this way.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TORCH = Path(importlib.util.find_spec("torch").origin).parent
SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10::impl;
static DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
namespace at::accelerator { __attribute__((visibility("default"))) bool isAccelerator(c10::DeviceType) { return false; } }
"""


def load_guard() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(SOURCE)
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{TORCH}/include", f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib"]
        subprocess.run(["g++", source, *flags, "-lc10", "-o", library], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # before torch, so that its symbol is found first


if __name__ == "__main__":
    load_guard()

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import GPT, PRESETS, GPTConfig
from papagaio import kernels, runtime
from papagaio.batches import preferences
from papagaio.batches.windows import Batch, likelihood
from papagaio.training.dry_run import memory_parts
from papagaio.training.lora import TARGETS, add_adapters
from papagaio.training.optimizers import make_optimizers
from papagaio.training.options import RunOptions
from train import RECIPES

CUDA = torch.device("cuda")
B, T = 3, 256


class Count(TorchDispatchMode):
    """Counts the operations that are called inside."""

    n = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return function(*args, **(kwargs or {}))


def make(preset: str, **shape: Any) -> GPT:
    sizes = dict(vocab_size=500, block_size=T, n_layer=2, n_head=4, n_embd=128)
    return GPT(GPTConfig(**sizes | PRESETS[preset] | shape)).train()


def batch(documents: bool) -> Batch:
    ids = torch.zeros(B, T, dtype=torch.int64)
    return Batch(ids, ids, torch.ones(B, T), ids if documents else None)


def step(model: GPT, run: Callable[..., Tensor], preset: str, batch: Any, objective: Any = likelihood) -> None:
    optimizers = make_optimizers(model, RunOptions(out_dir=Path("none"), **RECIPES[preset]))
    with runtime.autocast(CUDA, torch.bfloat16):
        loss = objective(run, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert (loss.dtype, loss.device.type) == (torch.float32, "cuda")
    assert all((p.grad.device, p.grad.dtype) == (p.device, p.dtype) for p in trained)
    assert all(p.is_cuda for p in model.parameters())
    assert all(t.is_cuda for optimizer in optimizers for state in optimizer.state.values() for t in state.values())


def pretraining(preset: str, documents: bool, **shape: Any) -> None:
    model = kernels.accelerate(make(preset, **shape))
    step(model, model, preset, batch(documents))


def one_graph(preset: str, documents: bool, **shape: Any) -> None:
    model = kernels.accelerate(make(preset, **shape))
    run, given = torch.compile(model, backend="eager", fullgraph=True), batch(documents)
    step(model, run, preset, given)
    with torch.no_grad(), runtime.evaluating(model), runtime.autocast(CUDA, torch.bfloat16):
        losses = run(given.ids, given.targets, doc_ids=given.doc_ids, reduction="none")
    assert (losses.shape, losses.device.type) == ((B, T), "cuda")


def checkpointed(preset: str, documents: bool) -> None:
    model = kernels.accelerate(make(preset))
    kernels.checkpoint_activations(model)
    step(model, model, preset, batch(documents))


def adapters(preset: str, documents: bool) -> None:
    model = make(preset)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    add_adapters(model, [name for name in TARGETS if name in names], 4, 8.0)
    step(model, kernels.accelerate(model), preset, batch(documents))


def pairs(preset: str, documents: bool) -> None:
    model, ids = kernels.accelerate(make(preset)), torch.zeros(B, 2, T, dtype=torch.int64)
    pair_batch = preferences.PairBatch(ids, ids, torch.ones(B), torch.zeros(B, 2))
    step(model, model, preset, pair_batch, preferences.objective(0.1))


def any_number_of_rows(preset: str, documents: bool) -> None:
    """Packed fine-tuning has another number of rows at each step: torch compiles for the first, and then once for all."""
    counters.clear()
    model = kernels.accelerate(make(preset, n_layer=1))
    run = torch.compile(model, backend="eager", fullgraph=True)
    first, *others = (
        Batch(*(None if part is None else part[:1].expand(rows, T) for part in batch(documents))) for rows in (3, 5, 4)
    )
    step(model, run, preset, first)
    for other in others:
        with runtime.autocast(CUDA, torch.bfloat16):
            likelihood(run, other)
    assert counters["stats"]["unique_graphs"] == 2, counters["stats"]


def dry_run_memory(preset: str, documents: bool) -> None:
    """It makes fake tensors by itself."""
    config = RunOptions(out_dir=Path("none"), device="cuda", dtype="bfloat16", **RECIPES[preset])
    with torch.device("cpu"):
        parts = memory_parts(lambda: make(preset), likelihood, config, batch(documents), CUDA)
    assert all(size > 0 for size in parts.values()), parts


def gpt2_loss_in_few_operations() -> None:
    """Head and loss of 32 rows of GPT-2, each piece's element-wise part compiled to a few kernels, here counted one by one."""
    rows, table = torch.zeros(32 * 1024, 768), torch.zeros(50304, 768)
    targets, weights = torch.zeros(32 * 1024, dtype=torch.int64), torch.ones(32 * 1024)
    with Count() as count:
        kernels._loss_and_gradients._init_fn(rows, table, targets, weights, 50257, 15.0, torch.bfloat16, True)
    assert count.n < 400, f"{count.n} operations"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # else torch.autocast("cuda") switches itself off
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    flex = torch.compile(flex_attention, backend="aot_eager")  # Inductor would ask for the GPU
    kernels._flex = lambda: (flex, create_block_mask)
    kernels._fused = lambda: kernels.losses_and_gradient
    cases: list[tuple[Callable[..., None], dict[str, Any]]] = [(gpt2_loss_in_few_operations, {})]
    for preset, documents in itertools.product(PRESETS, (False, True)):
        common = {"preset": preset, "documents": documents}
        cases += [(pretraining, common | shape) for shape in ({}, {"n_kv_head": 2})]
        cases += [(one_graph, common | {"dropout": 0.1})]
        cases += [(check, common) for check in (checkpointed, adapters)]
        cases += [(any_number_of_rows if documents else pairs, common), (dry_run_memory, common)]
    failed = 0
    for check, options in cases:
        torch._dynamo.reset()
        try:
            with contextlib.nullcontext() if check is dry_run_memory else FakeTensorMode(), CUDA:
                check(**options)
        except Exception:
            failed += 1
            print(check.__name__, options, file=sys.stderr)
            traceback.print_exc()
    print(f"{len(cases) - failed} of {len(cases)} passed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

"""What a run would cost, before it is begun: memory by parts, computed without using any; FLOPs, epochs, time."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from papagaio import runtime
from papagaio.batches.windows import Batch, Loader
from papagaio.errors import UserError
from papagaio.training.optimizers import make_optimizers, moment_bytes
from papagaio.training.options import RunOptions


def largest_micro_batch(batches: list[Batch], size: int) -> Batch:
    """Of a step's forward passes, the one with the most tokens: it decides the peak of memory."""
    return max((micro for batch in batches for micro in batch.split(size)), key=lambda micro: micro.ids.numel())


def memory_parts(make_model: Callable[[], nn.Module], config: RunOptions, micro: Batch, device: torch.device) -> dict[str, int]:
    """Bytes of a step by what they are for. Nothing is allocated or computed: shapes alone go through the model.

    activations: what the forward pass keeps for the gradient; logits: the largest piece of them, several times over.
    """
    dtype = runtime.pick_dtype(config.dtype, device)
    kept: dict[Any, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True) as fake, device:
        model = make_model()
        model.recompute = config.activation_checkpointing
        weights = {p.untyped_storage()._cdata: p.numel() * p.element_size() for p in model.parameters()}
        inputs = [None if tensor is None else fake.from_tensor(tensor).to(device) for tensor in micro]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), runtime.autocast(device, dtype):
            model(*inputs)
        moments = moment_bytes(make_optimizers(model, config))
    chunk = min(2**19, micro.ids.numel() * model.config.vocab_size)
    return {
        "weights": sum(weights.values()),
        "gradients": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "optimizer": moments,
        "activations": sum(size for key, size in kept.items() if key not in weights),
        "logits": 3 * 4 * chunk,
    }


def dry_run(make_model: Callable[[], nn.Module], loader: Loader, config: RunOptions, device: torch.device) -> None:
    """Print what a run would cost: memory first, then the time of three steps that are thrown away.

    Raises UserError where the run does not fit into what memory the device has left.
    """
    batches = loader(0)
    size = config.micro_batch_size or config.batch_size
    parts = memory_parts(make_model, config, largest_micro_batch(batches, size), device)
    need, free = sum(parts.values()), runtime.free_memory(device)
    listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    with torch.device("meta"):
        model = make_model()
    print(f"parameters: {model.num_parameters():,}")
    print(f"memory: about {need / 2**20:,.0f} MiB at its peak: {listed}" + (f"; {free / 2**20:,.0f} free" if free else ""))
    if free is not None and need > free:
        raise UserError(
            f"this run needs about {need / 2**20:,.0f} MiB and {device} has {free / 2**20:,.0f} MiB free: lower micro_batch_size "
            "or block_size, add --activation_checkpointing, or choose a smaller model"
        )
    tokens = sum(batch.ids.numel() for batch in batches)
    total = config.max_steps * tokens
    print(f"FLOPs: {model.flops_per_token():.3g} a token, {model.flops_per_token() * total:.3g} in all")
    print(f"epochs: {loader.epochs(config.max_steps):.2f}, {total:,} tokens in all")
    sys.stdout.flush()
    seconds = seconds_per_step(make_model().to(device), loader, config)
    print(f"time: about {seconds * config.max_steps / 60:,.1f} minutes, {tokens / seconds:,.0f} tokens/s on {device}")


def seconds_per_step(model: nn.Module, loader: Loader, config: RunOptions, steps: int = 3) -> float:
    """The time of the fastest of some steps; the model is changed by them."""
    device = next(model.parameters()).device
    dtype = runtime.pick_dtype(config.dtype, device)
    runtime.keep_memory()
    optimizers = make_optimizers(model, config)
    model.recompute = config.activation_checkpointing
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        for batch in loader(step):
            for micro in batch.split(config.micro_batch_size or config.batch_size):
                with runtime.autocast(device, dtype):
                    loss = model(*micro.to(device))
                loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        runtime.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)

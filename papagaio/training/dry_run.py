"""The cost of a run before it starts: memory by parts, computed without allocating any; FLOPs, epochs and time."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from papagaio import kernels, runtime
from papagaio.batches.windows import Loader, Objective
from papagaio.errors import UserError
from papagaio.training.dial import busy_notice, steady_speed
from papagaio.training.metrics import flops_per_token
from papagaio.training.optimizers import make_optimizers, moment_bytes
from papagaio.training.options import RunOptions
from papagaio.training.progress import Progress
from papagaio.training.step import TrainingStep, prepare_model

MakeModel = Callable[..., nn.Module]  # a GPT with these fields of its configuration changed: make_model(n_layer=1)
LARGEST_MEASURED = 30e6  # parameters of a model that is measured as a whole
MEASURED_TOKENS, MEASURED_FLOPS = 8192, 1.5e11  # of one measured micro-batch, at most: about a second


def dry_run(
    make_model: MakeModel,
    loader: Loader,
    objective: Objective,
    config: RunOptions,
    device: torch.device,
    evaluation_tokens: int,
    speed: float | None = None,
    ranks: int = 1,
) -> None:
    """Print what a run would cost. `evaluation_tokens` is the length of one evaluation; `speed` is in tokens per second, and is
    measured until two measurements agree if it is not given. Of several ranks, `loader` gives one's part of each batch.

    Raises UserError if the run does not fit into the memory that the device has left.
    """
    batches = loader(0)
    parts = memory_parts(make_model, objective, config, _largest_micro_batch(batches, config), device)
    if config.parallel == "fsdp":
        parts |= {name: parts[name] // ranks for name in ("weights", "gradients", "optimizer")}
    need, free = sum(parts.values()), runtime.free_memory(device)
    listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    with torch.device("meta"):
        model = make_model()
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    print(f"memory: about {need / 2**20:,.0f} MiB at its peak: {listed}" + (f"; {free / 2**20:,.0f} free" if free else ""))
    tokens = ranks * _count_tokens(batches)
    total, flops = config.max_steps * tokens, flops_per_token(model)
    print(f"FLOPs: {flops:.3g} per token, {flops * total:.3g} in all")
    print(f"epochs: {loader.epochs(config.max_steps):.2f}, {total:,} tokens in all", flush=True)
    if free is not None and need > free:
        raise UserError(
            f"this run needs about {need / 2**20:,.0f} MiB and {device} has {free / 2**20:,.0f} MiB free: lower micro_batch_size "
            "or block_size, add --activation_checkpointing, or choose a smaller model"
        )
    if speed is None:
        speed, steady = steady_speed(lambda: tokens / seconds_per_step(make_model, loader, objective, config, device))
        if notice := busy_notice(steady):
            print(notice, file=sys.stderr)
    seconds = tokens / speed
    evaluations = 1 + math.ceil(config.max_steps / config.eval_interval)
    evaluating = evaluations * evaluation_tokens * seconds / tokens / 3  # a forward pass is a third of a training step
    print(
        f"time: about {(seconds * config.max_steps + evaluating) / 60:,.1f} minutes, {evaluating / 60:,.1f} of them for "
        f"{evaluations} evaluations of {evaluation_tokens:,} tokens; {tokens / seconds:,.0f} tokens/s on {device}"
        + (f", if {ranks} processes of one machine or more do not wait for each other" if ranks > 1 else "")
    )


def memory_parts(
    make_model: MakeModel, objective: Objective, config: RunOptions, micro: Any, device: torch.device
) -> dict[str, int]:
    """Bytes at the peak of a step by use. Nothing is allocated or computed: only shapes go through the model."""
    kept: dict[Any, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True) as fake, device:
        model = kernels.accelerate(make_model())
        if device.type == "cuda":  # FlexAttention needs the compiler, which does not work here, and keeps what attention keeps
            model.attention_mask = lambda *_: None
        if config.activation_checkpointing:
            kernels.checkpoint_activations(model)
        weights = {p.untyped_storage()._cdata: p.nbytes for p in model.parameters()}
        inputs = type(micro)(*(None if tensor is None else fake.from_tensor(tensor).to(device) for tensor in micro))
        dtype = runtime.pick_dtype(config.dtype, device)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), runtime.autocast(device, dtype):
            objective(model, inputs)
        moments, vocab_size = moment_bytes(make_optimizers(model, config)), model.config.vocab_size
    return {
        "weights": sum(weights.values()),
        "gradients": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "optimizer": moments,
        "activations": sum(size for key, size in kept.items() if key not in weights),  # that are kept for the gradient
        "logits": 3 * 4 * min(kernels.chunk_rows(device, vocab_size), micro.ids.numel()) * vocab_size,  # the largest piece
    }


def seconds_per_step(
    make_model: MakeModel, loader: Loader, objective: Objective, config: RunOptions, device: torch.device
) -> float:
    """The measured time of an optimizer step, not compiled. A large step is measured on a part and extrapolated.

    The part is one micro-batch of some thousand tokens, and of a large model one layer of at most 1,024 channels with a small
    vocabulary. The gradient's time grows with the FLOPs, the optimizer's with the parameters.
    """
    config = config.model_copy(update={"compile": False})
    with torch.device("meta"):
        whole = make_model()
    whole_size, part = sum(p.numel() for p in whole.parameters()), {}
    if whole_size > LARGEST_MEASURED:
        c = whole.config
        n_head = min(c.n_head, max(1, 1024 // c.head_size))
        part = {"n_layer": 1, "vocab_size": min(c.vocab_size, 2048), "n_head": n_head, "n_embd": n_head * c.head_size}
        part["n_kv_head"] = math.gcd(c.kv_heads, n_head)
    model = make_model(**part).to(device)
    prepare_model(model, config)
    step = TrainingStep(model, make_optimizers(model, config), objective, config, Progress())

    def timed(batches: Sequence[Any]) -> float:
        start = time.perf_counter()
        step(list(batches))
        runtime.synchronize(device)
        return time.perf_counter() - start

    batches = loader(0)
    micro = _largest_micro_batch(batches, config)
    tokens = min(MEASURED_TOKENS, MEASURED_FLOPS / flops_per_token(model))
    piece = next(micro.split(max(1, int(tokens * len(micro.ids) / micro.ids.numel()))))
    if not part and piece.ids.numel() == _count_tokens(batches):
        return min(timed(loader(number)) for number in range(2))  # the first call is slower
    vocab_size = model.config.vocab_size
    piece = piece._replace(ids=piece.ids % vocab_size, targets=piece.targets.where(piece.targets < 0, piece.targets % vocab_size))
    once, twice = (min(timed([piece] * count) for _ in range(2)) for count in (1, 2))
    gradient = max(twice - once, once / 10)
    flops = flops_per_token(whole) * _count_tokens(batches) / (flops_per_token(model) * piece.ids.numel())
    return flops * gradient + max(once - gradient, 0) * whole_size / sum(p.numel() for p in model.parameters())


def _largest_micro_batch(batches: Sequence[Any], config: RunOptions) -> Any:
    """The micro-batch with the most tokens: it decides the peak of memory."""
    size = config.micro_batch_size or config.batch_size
    return max((micro for batch in batches for micro in batch.split(size)), key=lambda micro: micro.ids.numel())


def _count_tokens(batches: Sequence[Any]) -> int:
    return sum(batch.ids.numel() for batch in batches)

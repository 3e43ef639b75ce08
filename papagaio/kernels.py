"""Faster equivalents of model.py's operations: the same values and gradients in less time or memory.

Each is compared with the operation that it replaces, value and gradient, in tests/test_kernels.py. LOG.md has the measurements.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the target that is not predicted
CPU_LOGITS = 2**19  # that are computed at a time: 2 MiB, which stay in a CPU's cache
CPU_ROWS = 32  # but at least those of this many tokens: each piece adds to the gradient of the whole table
GPU_ROWS = 2**13  # rows whose logits are computed at a time: enough for fast products, 0.8 GB in bfloat16 for GPT-2's vocabulary


def accelerate(model: nn.Module) -> nn.Module:
    """Let a GPT compute with the operations below, in place, as far as its device gains from them; returns it. Call it when the
    model has its weights and device, before it is compiled."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    operations = {"squared_relu": squared_relu, "project": project, "attention": attention, "next_token_loss": next_token_loss}
    if on_cpu:
        operations["rms_norm"] = rms_norm
    elif model.config.dropout == 0:  # FlexAttention has no dropout
        operations["attention_mask"] = block_mask
    for module in model.modules():
        for name, operation in operations.items():
            if hasattr(module, name):
                setattr(module, name, operation)
    return model


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only what enters a block for the gradient, and compute its inside again: less memory, a third more time."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class RMSNorm(torch.autograd.Function):
    """F.rms_norm on a CPU is a chain of small operations, and so is its gradient: this one takes a quarter of the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float = 1e-6) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        return torch.addcmul(grad, y, (grad * y).mean(-1, keepdim=True), value=-1).mul_(scale), None


class SquaredReLU(torch.autograd.Function):
    """relu(x) ** 2 with a gradient of two operations, 2 relu(x); autograd's own takes four times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return (grad * y).mul_(2)


rms_norm, squared_relu = RMSNorm.apply, SquaredReLU.apply


def project(x: Tensor, *layers: nn.Module) -> Tensor:
    """The outputs of several linear layers for the same x (..., C), side by side: one product instead of several."""
    if any(type(layer) is not nn.Linear for layer in layers):  # an adapter, for example, is more than its weight
        return torch.cat([layer(x) for layer in layers], dim=-1)
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(x, torch.cat([layer.weight for layer in layers]), bias)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
    """Attention of q (B, H, T, D) over k and v (B, K, S, D); the mask is None, a tensor or FlexAttention's block mask."""
    grouped = k.size(1) != q.size(1)
    if mask is not None and not isinstance(mask, Tensor):
        return _flex()[0](q, k, v, block_mask=mask, enable_gqa=grouped)
    if q.is_cpu and q.dtype == torch.bfloat16 and 1 < q.size(2) == k.size(2) <= 512:
        if grouped:
            k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
        return plain_attention(q, k, v, mask, dropout)
    options = {"attn_mask": mask, "is_causal": mask is None and q.size(2) > 1, "dropout_p": dropout, "enable_gqa": grouped}
    return F.scaled_dot_product_attention(q, k, v, **options)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k' / sqrt(D)) v, computed as it is written. All T x T probabilities are in memory, but in bfloat16 on a CPU the
    gradient of torch's fused attention takes 2 to 10 times as long up to T = 512 (LOG.md, 2026-11-23)."""
    B, H, T, D = q.shape
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    if bias.ndim == 4:
        bias = bias.expand(B, H, T, T).reshape(B * H, T, T)
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    probabilities = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(-1)  # (B H, T, T)
    return (F.dropout(probabilities, dropout) @ v).view(B, H, T, D)


def block_mask(T: int, window: int | None, doc_ids: Tensor | None, device: torch.device) -> Any:
    """model.py's attention_mask as FlexAttention's block mask (arXiv:2412.05496): blocks that are masked out cost nothing."""
    if doc_ids is None and (window is None or window >= T):
        return None

    def may_attend(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i >= j) & (i - j < (window or T))
        return near if doc_ids is None else near & (doc_ids[b, i] == doc_ids[b, j])

    return _flex()[1](may_attend, None if doc_ids is None else len(doc_ids), None, T, T, device)


@functools.cache
def _flex() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), create_block_mask


def next_token_loss(model: Any, x: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Head, soft-cap and cross-entropy, some rows at a time: all logits of a batch would take most of the memory."""
    vocab_size, cap = model.config.vocab_size, model.config.logit_softcap
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    head = model.embed if model.head is None else model.head
    # The product of a head with an adapter is that of a wider one (papagaio/training/lora.py).
    rows, table = head.widen(x.flatten(0, 1)) if hasattr(head, "widen") else (x.flatten(0, 1), head.weight)
    flat = targets.flatten()
    if weights is not None and torch.is_grad_enabled() and (rows.requires_grad or table.requires_grad):
        return _loss_and_gradients(rows, table, flat, weights.flatten(), vocab_size, cap, dtype, table.requires_grad)[0]
    if torch.is_grad_enabled() and rows.requires_grad:
        size = chunk_rows(rows.device, vocab_size)
        pieces = zip(rows.split(size), flat.split(size), strict=True)
        parts = [checkpoint(_losses, *piece, table, vocab_size, cap, dtype, use_reentrant=False) for piece in pieces]
        losses = torch.cat(parts).view_as(targets)
    else:
        losses = _all_losses(rows, table, flat, vocab_size, cap, dtype).view_as(targets)
    return losses if weights is None else (losses * weights).sum()


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    """Rows whose logits `next_token_loss` has in memory at a time."""
    return GPU_ROWS if device.type == "cuda" else max(CPU_ROWS, CPU_LOGITS // vocab_size)


def _losses(rows: Tensor, targets: Tensor, table: Tensor, vocab_size: int, cap: float, dtype: torch.dtype) -> Tensor:
    """Nats (N,) of targets (N,) after hidden states rows (N, C); 0 for ignored targets."""
    if rows.device.type == "cuda":
        return _fused()(F.linear(rows.to(dtype), table.to(dtype)), targets, None, vocab_size, cap)[0]
    logits = F.linear(rows.to(dtype), table[:vocab_size].to(dtype)).float()
    if cap:
        logits = torch.tanh(logits / cap) * cap
    target = targets.clamp_min(0)[:, None]
    return (logits.logsumexp(-1, keepdim=True) - logits.gather(1, target)).squeeze(1).masked_fill(targets == IGNORED, 0)


def losses_and_gradient(
    products: Tensor, targets: Tensor, weights: Tensor | None, vocab_size: int, cap: float
) -> tuple[Tensor, Tensor | None]:
    """Nats (N,) of targets (N,) given products (N, padded V) of hidden states and head, before the soft-cap; and, given weights
    (N,), the gradient of the weighted sum by the products, in their dtype.

    For torch.compile, which makes one kernel of it per result: the logits are read three times and the gradient is written once.
    Columns beyond the vocabulary count as -inf: cutting them off would give the matrix products an odd size, which is slow.
    """
    columns = torch.arange(products.size(1), device=products.device)
    x = products.float()
    tanh = torch.tanh(x / cap) if cap else x
    logits = torch.where(columns < vocab_size, tanh * cap if cap else x, -math.inf)
    total, ignored = logits.logsumexp(-1, keepdim=True), targets == IGNORED  # (N, 1), (N,)
    hit = columns == targets[:, None]
    losses = (total.squeeze(1) - torch.where(hit, logits, 0).sum(1)).masked_fill(ignored, 0)
    if weights is None:
        return losses, None
    grad = ((logits - total).exp() - hit.float()) * weights.masked_fill(ignored, 0)[:, None]
    return losses, (grad * (1 - tanh.square()) if cap else grad).to(products.dtype)


@functools.cache
def _fused() -> Any:
    return torch.compile(losses_and_gradient)


# Custom operators, so that torch.compile sees one operation each: it would unroll their loops, or break the graph at them.
@torch.library.custom_op("papagaio::losses", mutates_args=())
def _all_losses(rows: Tensor, table: Tensor, targets: Tensor, vocab_size: int, cap: float, dtype: torch.dtype) -> Tensor:
    size = chunk_rows(rows.device, vocab_size)
    pieces = zip(rows.split(size), targets.split(size), strict=True)
    return torch.cat([_losses(*piece, table, vocab_size, cap, dtype) for piece in pieces])


@_all_losses.register_fake
def _(rows: Tensor, table: Tensor, targets: Tensor, vocab_size: int, cap: float, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(len(rows), dtype=torch.float32)


@torch.library.custom_op("papagaio::loss_and_gradients", mutates_args=())
def _loss_and_gradients(
    rows: Tensor, table: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, cap: float, dtype: torch.dtype, trained: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows (N, C), table (padded V, C), targets, weights (N,) -> (weighted sum of the losses, its gradients by rows and by table
    if this is `trained`, both but for a factor, this factor).

    The gradient of a weighted sum needs nothing from later operations but a factor, so it is computed along with the loss.
    """
    on_gpu = rows.device.type == "cuda"
    head = (table if on_gpu else table[:vocab_size]).to(dtype)  # (V, C); a GPU is slow at odd sizes
    largest = weights.max().clamp_min(1e-30)  # multiplied at the end: a gradient of 1 / (B T) is too small for float16
    weights = weights / largest
    losses, grad_rows = rows.new_zeros(len(rows), dtype=torch.float32), torch.zeros_like(rows)
    grad_table = torch.zeros_like(table) if trained else table.new_empty(0)  # a frozen head needs none
    size, differentiate = chunk_rows(rows.device, vocab_size), _fused() if on_gpu else _losses_and_gradient_in_place
    # Fine-tuning has weights for the answers alone; a GPU would wait until their number is known.
    everything = (slice(i, i + size) for i in range(0, len(rows), size))
    for part in everything if on_gpu else weights.nonzero().squeeze(1).split(size):
        xi = rows[part].to(dtype)
        losses[part], grad = differentiate(F.linear(xi, head), targets[part], weights[part], vocab_size, cap)
        grad_rows[part] = (grad @ head).to(grad_rows.dtype)
        if trained:
            grad_table[: len(head)] += grad.T @ xi
    loss = (losses * weights).sum() * largest  # a dot product would be rounded to bfloat16 under autocast
    return loss, grad_rows, grad_table, largest


def _losses_and_gradient_in_place(
    products: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, cap: float
) -> tuple[Tensor, Tensor]:
    """losses_and_gradient of products (N, V), for a CPU: uncompiled, in few passes over memory that stays in the cache."""
    ignored, target = targets == IGNORED, targets.clamp_min(0)[:, None]  # (N,), (N, 1)
    logits = products.float()
    if cap:
        tanh = logits.div_(cap).tanh_()
        logits = tanh * cap
    total = logits.logsumexp(-1, keepdim=True)  # (N, 1)
    losses = (total - logits.gather(1, target)).squeeze(1).masked_fill(ignored, 0)
    grad = logits.sub_(total).exp_()  # probabilities, and 1 less at the target: the gradient by the logits
    grad.scatter_add_(1, target, torch.full_like(total, -1)).mul_(weights.masked_fill(ignored, 0)[:, None])
    if cap:
        grad.mul_(tanh.square_().neg_().add_(1))
    return losses, grad.to(products.dtype)


@_loss_and_gradients.register_fake
def _(rows: Tensor, table: Tensor, *options: Any) -> tuple[Tensor, ...]:
    scalar = rows.new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(rows), torch.empty_like(table) if options[-1] else table.new_empty(0), scalar.clone()


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.trained = inputs[-1]


def _scale_gradients(ctx: Any, factor: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_rows, grad_table, largest = ctx.saved_tensors
    factor = factor * largest
    return grad_rows * factor, grad_table * factor if ctx.trained else None, *[None] * 6


_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)

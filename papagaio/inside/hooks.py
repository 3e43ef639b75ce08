"""What a model computes on the way, and what it computes when a part is taken out or replaced: by hooks, without a second model.

    seen = observe(model, ids)          # seen.hidden[i] (B, T, C), seen.attention[i] (B, H, T, T), seen.logits (B, T, V)
    with without(model.blocks[3].mlp):
        loss = model(ids, targets)

Shapes as in model.py; L layers. All of it works for every preset, because the model's own operations are used.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Seen(NamedTuple):
    """What a model computed for ids (B, T)."""

    hidden: list[Tensor]  # L + 1 times (B, T, C): the residual stream before the first block and after each
    attention: list[Tensor]  # L times (B, H, T, T): row i holds the weights of the tokens j <= i
    logits: Tensor  # (B, T, V)


@contextmanager
def attention_as(layer: Any, change: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, an attention layer computes `change(operation, q, k, v, mask, dropout)`, where `operation` is its own operation."""
    before, operation = vars(layer).get("attention"), layer.attention
    layer.attention = lambda *args: change(operation, *args)
    try:
        yield
    finally:
        if before is None:
            del layer.attention
        else:
            layer.attention = before


@torch.no_grad()
def observe(model: Any, ids: Tensor) -> Seen:
    """Run a GPT on ids (B, T). The attention weights are what its own operation returns for values that are unit vectors:
    softmax(q k') I."""
    hidden: list[Tensor] = []
    attention: list[Tensor] = []

    def record(operation: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
        units = torch.eye(k.size(2), dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)  # (B, K, T, T)
        attention.append(operation(q, k, units, mask, dropout))
        return operation(q, k, v, mask, dropout)

    with ExitStack() as stack:
        stack.enter_context(model.blocks[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0])))
        for block in model.blocks:
            stack.enter_context(block.register_forward_hook(lambda _, args, x: hidden.append(x)))
            stack.enter_context(attention_as(block.attn, record))
        return Seen(hidden, attention, model(ids))


def without(part: nn.Module) -> RemovableHandle:
    """A context in which an attention layer or an MLP adds nothing to the residual stream."""
    return part.register_forward_hook(lambda _, args, output: torch.zeros_like(output))


def without_head(layer: Any, head: int) -> Any:
    """A context in which one head of an attention layer, counted from 0, gathers nothing."""

    def silence(operation: Callable[..., Tensor], *args: Any) -> Tensor:
        y = operation(*args).clone()  # (B, H, T, D)
        y[:, head] = 0
        return y

    return attention_as(layer, silence)


def replaced(model: Any, layer: int, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """A context in which the residual stream x (B, T, C) after `layer` blocks is `change(x)`; 0: before the first block."""
    if layer == 0:
        return model.blocks[0].register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    return model.blocks[layer - 1].register_forward_hook(lambda _, args, x: change(x))

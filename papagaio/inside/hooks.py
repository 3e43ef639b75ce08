"""What a model computes on the way, and what it computes when a part is taken out or replaced: by hooks, without a second model.

    seen = observe(model, ids)          # seen.hidden[i] (B, T, C), seen.attention[i] (B, H, T, T), seen.logits (B, T, V)
    with without(model.blocks[3].mlp):
        loss = model(ids, targets)

Shapes as in model.py; L layers. All of it works for every preset, because the model's own operations are used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from papagaio.batches.conversations import Message, render_prompt
from papagaio.errors import UserError
from papagaio.generation.engine import Engine


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

    handles = [model.blocks[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))]
    handles += [block.register_forward_hook(lambda _, args, x: hidden.append(x)) for block in model.blocks]
    seams = [attention_as(block.attn, record) for block in model.blocks]
    try:
        for seam in seams:
            seam.__enter__()
        logits = model(ids)
    finally:
        for seam in seams:
            seam.__exit__(None, None, None)
        for handle in handles:
            handle.remove()
    return Seen(hidden, attention, logits)


@contextmanager
def without(part: nn.Module) -> Iterator[None]:
    """Inside, an attention layer or an MLP adds nothing to the residual stream."""
    handle = part.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


def without_head(layer: Any, head: int) -> Any:
    """A context in which one head of an attention layer, counted from 0, gathers nothing."""

    def silence(operation: Callable[..., Tensor], *args: Any) -> Tensor:
        y = operation(*args).clone()  # (B, H, T, D)
        y[:, head] = 0
        return y

    return attention_as(layer, silence)


@contextmanager
def replaced(model: Any, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the residual stream x (B, T, C) after `layer` blocks is `change(x)`; 0: before the first block."""
    if layer == 0:
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    else:
        handle = model.blocks[layer - 1].register_forward_hook(lambda _, args, x: change(x))
    try:
        yield
    finally:
        handle.remove()


def prompt_ids(engine: Engine, text: str | None, question: str | None, more: int = 0) -> list[int]:
    """Ids of a text as the beginning of a document, or of a question in the chat template. Raises UserError if they, with `more`
    tokens behind, do not fit into the context."""
    ids = engine.encode(text) if text else render_prompt(engine.tokenizer, [Message(role="user", content=question or "")])
    if len(ids) + more > engine.block_size:
        raise UserError(
            f"the text has {len(ids) + more} tokens, the model's context only {engine.block_size}: give a shorter one"
        )
    return ids


def check_layer(layer: int, count: int, option: str = "--layer") -> None:
    """Raises UserError unless the model, which has `count` of them, has this layer (or head, counted from 1)."""
    if not 0 <= layer <= count:
        raise UserError(f"{option}={layer}: this model has {count}")


def spell(engine: Engine, token: int) -> str:
    """A token for people: blanks as ·, line breaks as ↵."""
    return engine.tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


def span(engine: Engine, ids: list[int], part: str) -> slice:
    """The tokens of ids that spell the last occurrence of `part`, whole or in part. Raises UserError if there is none."""
    pieces = [engine.tokenizer.decode_bytes([token]) for token in ids]
    begin = b"".join(pieces).rfind(part.encode())
    if begin < 0:
        raise UserError(f"{part!r} does not occur in the text")
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    inside = [i for i, end in enumerate(ends) if end > begin and end - len(pieces[i]) < begin + len(part.encode())]
    return slice(inside[0], inside[-1] + 1)

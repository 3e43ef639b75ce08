"""Positional encodings: their tables as pictures, similarity by distance, and what the order of words is worth in bits."""

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from papagaio.errors import UserError
from papagaio.evaluation import evaluate_loss, text_batches
from papagaio.generation.engine import Engine
from papagaio.inside import drawing
from papagaio.terminal import progress

Fragments = list[tuple[str, bool]]  # texts, and whether each begins a document, as evaluation.text_batches takes them


def table(model: Any) -> Tensor | None:
    """The numbers (T, columns) that tell a place: added to embeddings (learned, sinusoidal), or the cosines and sines of the
    angles by which queries and keys are turned (rope). None without positions."""
    kind = model.config.position
    if kind == "none":
        return None
    if kind == "learned":
        return model.pos_embed.weight.detach().cpu()
    angles = torch.arange(model.config.block_size)[:, None] * model.frequencies.cpu()  # (T, half)
    return torch.cat((angles.cos(), angles.sin()) if kind == "rope" else (angles.sin(), angles.cos()), dim=-1)


def similarity(table: Tensor) -> Tensor:
    """Mean cosine between rows by their distance 0, 1, ... (T,). For rope: how much of the product of a query and an equal key,
    equal in all pairs of channels, is left."""
    unit = F.normalize(table.float(), dim=-1)
    products = unit @ unit.T
    return torch.stack([products.diagonal(distance).mean() for distance in range(len(unit))])


def shuffled(text: str, rng: random.Random) -> str:
    """The words of a text in random order, each with the blanks behind it: as many bytes as before."""
    words = re.findall(r"\S+\s*|^\s+", text)
    rng.shuffle(words)
    return "".join(words)


class Order(NamedTuple):
    """Bits per byte of one text."""

    name: str
    position: str
    in_order: float
    shuffled: float


def some(fragments: Iterable[tuple[str, bool]], engine: Engine, windows: int) -> Fragments:
    """The first fragments that fill this many windows (0: all of them)."""
    found, tokens = [], 0
    for text, first in fragments:
        found.append((text, first))
        tokens += len(engine.tokenizer.encode(text)) + first
        if windows and tokens >= windows * engine.block_size:
            break
    if not found:
        raise UserError("there is no text to measure")
    return found


def measure(engine: Engine, name: str, fragments: Fragments, seed: int) -> Order:
    """Bits per byte of texts, and of the same texts with their words shuffled."""
    rng = random.Random(seed)
    mixed = [(shuffled(text, rng), first) for text, first in fragments]
    bits = []
    for texts in (fragments, mixed):
        batches = text_batches(texts, engine.tokenizer, engine.block_size, 16)
        bits.append(evaluate_loss(engine.model, progress(list(batches), name), engine.tokenizer, engine.dtype)["val_bpb"])
    return Order(name, engine.model.config.position, *bits)


def draw(kind: str, numbers: Tensor) -> Any:
    """The table, and similarity by distance."""
    picture = drawing.figure(11, 4.2)
    left, right = picture.subplots(1, 2, width_ratios=(1.2, 1))
    limit = float(numbers.abs().quantile(0.995)) if numbers.numel() < 2**24 else float(numbers.abs().max())
    drawing.heatmap(left, numbers, diverging=True, limit=limit, bar="", size=8)
    left.figure.colorbar(left.images[0], ax=left, shrink=0.9)
    half = numbers.size(1) // 2
    names = {"rope": f"cosine of pairs 1 to {half}, then sine", "sinusoidal": f"sines of {half} frequencies, then cosines"}
    left.set_xlabel(names.get(kind, "channel"))
    left.set_ylabel("position")
    left.set_title(
        {"rope": "angles by which queries and keys are turned"}.get(kind, "what is added to the embedding"), fontsize=9
    )
    right.plot(similarity(numbers), color=drawing.COLOURS[0])
    right.axhline(0, color="grey", linewidth=0.8)
    right.set_xlabel("distance (tokens)")
    right.set_ylabel("mean cosine of two positions")
    right.grid(alpha=0.3)
    right.set_title("near places are alike", fontsize=9)
    picture.suptitle(f"positional encoding: {kind}", fontsize=11)
    return picture


def draw_order(found: Sequence[Order]) -> Any:
    """Bits per byte in order and shuffled, a pair of bars a model."""
    picture = drawing.figure(max(5.0, 1.5 * len(found) + 2), 3.8)
    axes = picture.subplots()
    for shift, values, label, colour, hatch in (
        (-0.2, [order.in_order for order in found], "in order", drawing.COLOURS[0], ""),
        (0.2, [order.shuffled for order in found], "words shuffled", drawing.COLOURS[1], "//"),
    ):
        bars = axes.bar(
            [i + shift for i in range(len(found))], values, 0.38, color=colour, hatch=hatch, edgecolor="white", label=label
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(found)), [f"{order.position}\n{drawing.clip_left(order.name, 22)}" for order in found], fontsize=8)
    axes.set_ylabel("bits per byte (less is better)")
    axes.margins(y=0.12)
    picture.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.set_title("what the order of words is worth", fontsize=10)
    return picture

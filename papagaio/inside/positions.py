"""Positional encodings: their tables as pictures, similarity by distance, and what the order of words is worth in bits."""

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from papagaio.corpus.dataset import Dataset
from papagaio.errors import UserError
from papagaio.evaluation import dataset_texts, evaluate_loss, text_batches
from papagaio.generation.engine import Engine
from papagaio.inside import drawing
from papagaio.inside.opening import make_engine
from papagaio.inside.options import PositionsOptions
from papagaio.inside.page import Found
from papagaio.runs.checkpoint import MakeModel
from papagaio.runs.directory import open_checkpoint
from papagaio.terminal import progress

Fragments = list[tuple[str, bool]]  # texts, and whether each begins a document, as evaluation.text_batches takes them


def look(config: PositionsOptions, make: MakeModel) -> Found:
    """The table of each model, and what order is worth to each."""
    paths = (config.checkpoint, *config.beside)
    engines = [make_engine(open_checkpoint(path, config.base), make, config.device) for path in paths]
    found = Found()
    for number, (path, engine) in enumerate(zip(paths, engines, strict=True)):
        kind, numbers = engine.model.config.position, table(engine.model)
        if numbers is None:
            found.lines.append(f"{path}: {kind}: no positional encoding; order comes from the causal mask alone")
            continue
        near = similarity(numbers)
        cosines = ", ".join(f"{i}: {float(near[i]):.2f}" for i in (1, 4, 16, 64, 256) if i < len(near))
        found.lines.append(f"{path}: {kind}: mean cosine of two positions by distance: {cosines}")
        found.pictures[f"positions_{number + 1}_{kind}" if number else f"positions_{kind}"] = draw(kind, numbers)
    if config.data:
        fragments = some(dataset_texts(Dataset(config.data)), engines[0], config.windows)
        orders = [measure(engine, str(path), fragments) for path, engine in zip(paths, engines, strict=True)]
        found.lines.append(f"bits per byte of {sum(len(text.encode()) for text, _ in fragments):,} bytes:")
        found.lines.append(f"{'in order':>10}  {'shuffled':>10}  {'order pays':>10}  position")
        for one in orders:
            pays = one.shuffled - one.in_order
            found.lines.append(f"{one.in_order:>10.4f}  {one.shuffled:>10.4f}  {pays:>10.4f}  {one.position}: {one.name}")
        found.pictures["positions_order"] = draw_order(orders)
    return found


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


def measure(engine: Engine, name: str, fragments: Fragments) -> Order:
    """Bits per byte of texts, and of the same texts with their words shuffled."""
    rng = random.Random(1337)
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
    drawing.heatmap(left, numbers, diverging=True, limit=limit)
    left.figure.colorbar(left.images[0], ax=left, shrink=0.9)
    half = numbers.size(1) // 2
    columns = {"rope": f"cosine of pairs 1 to {half}, then sine", "sinusoidal": f"sines of {half} frequencies, then cosines"}
    use = "angles by which queries and keys are turned" if kind == "rope" else "what is added to the embedding"
    left.set(xlabel=columns.get(kind, "channel"), ylabel="position", title=use)
    right.plot(similarity(numbers), color=drawing.COLOURS[0])
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="distance (tokens)", ylabel="mean cosine of two positions", title="near places are alike")
    right.grid()
    picture.suptitle(f"positional encoding: {kind}")
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
    axes.set_xticks(range(len(found)), [f"{order.position}\n{drawing.clip_left(order.name, 22)}" for order in found])
    axes.set(ylabel="bits per byte (less is better)", title="what the order of words is worth")
    axes.margins(y=0.12)
    picture.legend(loc="outside lower center", ncols=2)
    return picture

"""Tokens: how a text is cut, beside other tokenizers, and how an id becomes a vector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from papagaio.inside import drawing
from papagaio.runs.directory import open_checkpoint
from papagaio.tokenizer import Tokenizer, load_tokenizer


class Cut(NamedTuple):
    """A text in tokens."""

    name: str
    ids: list[int]
    pieces: list[bytes]  # whose concatenation is the text

    @property
    def bytes_per_token(self) -> float:
        return sum(map(len, self.pieces)) / max(1, len(self.ids))


def cut(name: str, tokenizer: Tokenizer, text: str) -> Cut:
    """`understanding` -> ids of `understand` and `ing`."""
    ids = tokenizer.encode(text)
    return Cut(name, ids, [tokenizer.token_bytes(token) for token in ids])


def find_tokenizer(path: Path, base: Path | None = None) -> Tokenizer:
    """The tokenizer in a tokenizer directory, a dataset, a checkpoint or a run. Raises UserError."""
    for directory in (path, path / "tokenizer"):
        if (directory / "tokenizer.json").is_file():
            return load_tokenizer(directory)
    return open_checkpoint(path, base).tokenizer


def show(piece: bytes) -> str:
    """A piece for people: bytes that are no characters by themselves as \\xe9."""
    return piece.decode("utf-8", errors="backslashreplace").replace("\n", "↵").replace("\t", "⇥")


def one_hot_product(table: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """A one-hot row (V,), and its product with a table (V, C): row `token` of the table, which is why a look-up does."""
    row = F.one_hot(torch.tensor(token), len(table)).to(table.dtype)
    return row, row @ table


def worked_example(table: Tensor, pieces: Sequence[tuple[int, str]]) -> list[str]:
    """The product on small numbers: the rows of the first four tokens, three channels of each."""
    some = list(dict(pieces).items())[:4]
    small = table[[token for token, _ in some], :3].float().cpu()
    token = len(some) - 1
    row, product = one_hot_product(small, token)
    lines = ["one-hot row x table = row of the table (three channels of the model's own table):"]
    for i, (id_, piece) in enumerate(some):
        numbers = "  ".join(f"{value:6.2f}" for value in small[i].tolist())
        lines.append(f"  {int(row[i])} x  {numbers}   row of {id_} {piece!r}")
    lines.append("  =    " + "  ".join(f"{value:6.2f}" for value in product.tolist()))
    return lines


def draw(cuts: Sequence[Cut]) -> Any:
    """The pieces in a row of boxes, a tokenizer a block; each box has its id below."""
    width = 96  # characters of a line
    blocks = [_lines(one, width) for one in cuts]
    height = sum(len(block) + 1 for block in blocks)
    picture = drawing.figure(12, 0.48 * height + 0.3)
    axes = picture.subplots()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    y = 0.5
    for one, block in zip(cuts, blocks, strict=True):
        title = f"{drawing.clip(one.name, 50)}: {len(one.ids)} tokens, {one.bytes_per_token:.2f} bytes per token"
        axes.text(0, y, title, fontsize=10, fontweight="bold", va="center")
        y += 1
        for line in block:
            for x, size, text, token, number in line:
                colour = drawing.COLOURS[(0, 1, 2, 4, 5)[number % 5]]
                axes.add_patch(_box(x, y - 0.42, size - 0.15, 0.52, colour))
                axes.text(x + size / 2, y - 0.16, drawing.literal(text), fontsize=8, ha="center", va="center", family="monospace")
                axes.text(x + size / 2, y + 0.26, str(token), fontsize=5.5, ha="center", va="center", color="dimgrey")
            y += 1
    return picture


def _box(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.15", facecolor=colour, alpha=0.3, linewidth=0
    )


def _lines(one: Cut, width: int) -> list[list[tuple[float, float, str, int, int]]]:
    """(x, size, text, id, number) of the boxes, by line."""
    lines: list[list[tuple[float, float, str, int, int]]] = [[]]
    x = 0.0
    for number, (token, piece) in enumerate(zip(one.ids, one.pieces, strict=True)):
        text = show(piece).replace(" ", "·")
        size = max(len(text), len(str(token)) * 0.62) + 0.9
        if x + size > width and lines[-1]:
            lines.append([])
            x = 0.0
        lines[-1].append((x, size, text, token, number))
        x += size
    return lines

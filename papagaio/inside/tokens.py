"""Tokens: how a text is cut, beside other tokenizers, and how an id becomes a vector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from papagaio.inside import drawing
from papagaio.inside.opening import open_engine
from papagaio.inside.options import TokensOptions
from papagaio.inside.page import Found
from papagaio.runs.checkpoint import MakeModel
from papagaio.runs.directory import open_checkpoint
from papagaio.tokenizer import Tokenizer
from papagaio.tokenizer_files import load_tokenizer


def look(config: TokensOptions, make: MakeModel) -> Found:
    """The text in the model's tokens, and in those of --beside."""
    engine = open_engine(config, make)
    cuts = [cut(str(config.checkpoint), engine.tokenizer, config.text)]
    cuts += [cut(str(path), find_tokenizer(path), config.text) for path in config.beside]
    found = Found(pictures={"tokens": draw(cuts)})
    for one in cuts:
        found.lines += [f"{one.name}: {len(one.ids)} tokens, {one.bytes_per_token:.2f} bytes per token"]
        found.lines += ["  " + "|".join(map(show, one.pieces)), "  " + " ".join(map(str, one.ids))]
    found.lines += ["", *worked_example(engine.model.embed.weight, cuts[0])]
    return found


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


def find_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer directory, a dataset, a checkpoint or a run. Raises UserError."""
    for directory in (path, path / "tokenizer"):
        if (directory / "tokenizer.json").is_file():
            return load_tokenizer(directory)
    return open_checkpoint(path).tokenizer


def show(piece: bytes) -> str:
    """A piece for people: bytes that are no characters by themselves as \\xe9."""
    return piece.decode("utf-8", errors="backslashreplace").replace("\n", "↵").replace("\t", "⇥")


def one_hot_product(table: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """A one-hot row (V,), and its product with a table (V, C): row `token` of the table, which is why a look-up does."""
    row = F.one_hot(torch.tensor(token), len(table)).to(table.dtype)
    return row, row @ table


def worked_example(table: Tensor, cut: Cut) -> list[str]:
    """The product on small numbers: the rows of the first four tokens, three channels of each."""
    some = list(dict(zip(cut.ids, map(show, cut.pieces), strict=True)).items())[:4]
    small = table[[token for token, _ in some], :3].float().cpu()
    row, product = one_hot_product(small, len(some) - 1)

    def numbers(values: Tensor) -> str:
        return "  ".join(f"{value:6.2f}" for value in values.tolist())

    lines = ["one-hot row x table = row of the table (three channels of the model's own table):"]
    lines += [f"  {int(row[i])} x  {numbers(small[i])}   row of {token} {piece!r}" for i, (token, piece) in enumerate(some)]
    return [*lines, f"  =    {numbers(product)}"]


def draw(cuts: Sequence[Cut]) -> Any:
    """The pieces in a row of boxes, a tokenizer a block; each box has its id below."""
    from matplotlib.patches import FancyBboxPatch

    width = 96.0  # characters of a line
    picture = drawing.figure(12, 1)
    axes = picture.subplots()
    y = 0.5
    for one in cuts:
        title = f"{drawing.clip(one.name, 50)}: {len(one.ids)} tokens, {one.bytes_per_token:.2f} bytes per token"
        axes.text(0, y, title, fontsize=10, fontweight="bold", va="center")
        x, y = 0.0, y + 1
        for number, (token, piece) in enumerate(zip(one.ids, one.pieces, strict=True)):
            text = show(piece).replace(" ", "·")
            size = max(len(text), len(str(token)) * 0.62) + 0.9
            if x and x + size > width:
                x, y = 0.0, y + 1
            colour = drawing.COLOURS[(0, 1, 2, 4, 5)[number % 5]]
            box = {"boxstyle": "round,pad=0,rounding_size=0.15", "facecolor": colour, "alpha": 0.3, "linewidth": 0}
            axes.add_patch(FancyBboxPatch((x, y - 0.42), size - 0.15, 0.52, **box))
            axes.text(x + size / 2, y - 0.16, drawing.literal(text), fontsize=8, ha="center", va="center", family="monospace")
            axes.text(x + size / 2, y + 0.26, str(token), fontsize=5.5, ha="center", va="center", color="dimgrey")
            x += size
        y += 1
    axes.set_xlim(0, width)
    axes.set_ylim(y - 0.5, 0)
    axes.axis("off")
    picture.set_figheight(0.48 * (y - 0.5) + 0.3)
    return picture

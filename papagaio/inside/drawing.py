"""Pictures with matplotlib, in colours that colour-blind people can tell apart: cividis, PuOr, and Okabe and Ito's eight."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito, "Color Universal Design" (2008); yellow stands last, since it is pale on white paper. With a marker each.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vP*X"
SEQUENTIAL, DIVERGING = "cividis", "PuOr"
DPI = 110  # dots per inch
STYLE = {
    **dict.fromkeys(("axes.titlesize", "axes.labelsize", "figure.labelsize"), 9.0),  # points
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8.0),
    "figure.titlesize": 11.0,
    "grid.alpha": 0.3,
}


def figure(width: float, height: float) -> Any:
    """A matplotlib figure of width x height inches."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen and takes longer to import

    rcParams.update(STYLE)

    return Figure(figsize=(width, height), layout="constrained")


def save(picture: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Says how many characters the fonts lack, which are drawn as boxes."""
    temporary = path.with_name(f".{path.name}.tmp")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
    temporary.replace(path)
    missing = {str(warning.message) for warning in caught if str(warning.message).startswith("Glyph")}
    if missing:
        print(f"{path}: {len(missing)} characters are not in matplotlib's fonts, and are drawn as boxes", file=sys.stderr)


def heatmap(
    axes: Any,
    values: Any,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    diverging: bool = False,
    limit: float | None = None,
    texts: Sequence[Sequence[str]] = (),
    bar: str = "",
    size: float = 7,
) -> None:
    """Draw a matrix (rows, columns): from 0 to `limit`, or with `diverging` from -limit to limit. `texts` stand in the cells,
    `bar` labels the colour bar, `size` is that of the letters in points."""
    values = np.asarray(values, dtype=float)
    limit = limit or float(np.abs(values).max()) or 1.0
    options = {"cmap": DIVERGING if diverging else SEQUENTIAL, "vmin": -limit if diverging else 0, "vmax": limit}
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
    if rows:
        axes.set_yticks(range(len(rows)), rows, fontsize=size)
    if columns:
        axes.set_xticks(range(len(columns)), columns, fontsize=size, rotation=60, ha="right", rotation_mode="anchor")
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            shade = abs(values[i, j]) / limit
            pale = shade < 0.55 if diverging else shade > 0.55
            axes.text(j, i, text, ha="center", va="center", fontsize=size, color="black" if pale else "white")
    if bar:
        axes.figure.colorbar(image, ax=axes, label=bar, shrink=0.9)


def layers(count: int) -> list[str]:
    """Labels of the residual stream: before the first block, and after each."""
    return ["embedding", *(f"layer {i}" for i in range(1, count))]


def style(number: int) -> tuple[str, str]:
    """Colour and marker of the group of this number; the first 49 differ."""
    return COLOURS[number % 7], MARKERS[(number + number // 7) % 7]


class Room:
    """The places of a picture that are not taken yet, by points or labels (x, y, width, height)."""

    def __init__(self, taken: list[tuple[float, float, float, float]]) -> None:
        self.taken = taken

    def take(self, x: float, y: float, width: float, height: float) -> bool:
        """Take a rectangle whose lower left corner is at (x, y); False if a part of it is taken."""
        if any(x < a + w and a < x + width and y < b + h and b < y + height for a, b, w, h in self.taken):
            return False
        self.taken.append((x, y, width, height))
        return True


def literal(text: str) -> str:
    """The text with $ written so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def clip(text: str, length: int) -> str:
    """The text on one line, its end cut off if it is longer than `length` characters."""
    text = text.replace("\n", "↵")
    return text if len(text) <= length else text[: length - 1] + "…"


def clip_left(text: str, length: int) -> str:
    """The same for paths: the beginning is cut off."""
    return text if len(text) <= length else "…" + text[1 - length :]

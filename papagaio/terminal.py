"""Colours in a terminal."""

import os
from typing import TextIO


def colours(stream: TextIO) -> bool:
    """Whether the stream is a terminal that shows colours, and the user has not switched them off (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def dim(text: str, stream: TextIO) -> str:
    """The text in a paler colour, if the stream shows colours."""
    return f"\x1b[2m{text}\x1b[0m" if colours(stream) else text


def coloured(text: str, probability: float) -> str:
    """The text in a colour from red (improbable) over yellow to green (certain), out of the 256 of every terminal."""
    steps = (196, 202, 208, 214, 220, 226, 190, 154, 118, 46)
    return f"\x1b[38;5;{steps[min(int(probability * len(steps)), len(steps) - 1)]}m{text}\x1b[0m"

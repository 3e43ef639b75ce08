"""What stands on a terminal or another console: colours, progress, and keys that are typed while an answer is printed."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

ItemT = TypeVar("ItemT")
PROGRESS_SECONDS = 30.0  # between two lines of progress, where there is no terminal


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


def progress(items: Iterable[ItemT], what: str) -> Iterator[ItemT]:
    """The items, while their number is shown on standard error: a bar in a terminal, else a line every 30 seconds."""
    total = len(items) if isinstance(items, Sized) else None
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, what, total, leave=False)
        return
    shown = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            print(f"{what}: {number:,}{'' if total is None else f' of {total:,}'}", file=sys.stderr, flush=True)
        yield item


def print_json(row: dict[str, Any], file: TextIO | None = None) -> None:
    """Print an object as a line of JSON, in ASCII if the encoding of `file` (standard output) lacks some of its characters."""
    file = file or sys.stdout
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode(file.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(row)
    print(text, file=file, flush=True)


@contextlib.contextmanager
def without_echo(stream: TextIO) -> Iterator[None]:
    """Keys that are typed into a terminal inside the block are not shown, and are thrown away at its end. Ctrl-C still works."""
    if not stream.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(stream)
    during = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(stream, termios.TCSANOW, during)
    try:
        yield
    finally:
        termios.tcsetattr(stream, termios.TCSAFLUSH, before)  # FLUSH: what was typed is thrown away

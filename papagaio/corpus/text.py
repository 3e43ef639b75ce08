"""Text files as streams: unpacked, decoded, cut into records, a few megabytes at a time.

A large file is read by several workers: each begins at the first boundary after its part's first byte and ends at the first
after its last one, so that neighbours agree and nothing is lost or read twice.
"""

import codecs
import gzip
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from papagaio.errors import UserError
from papagaio.tokenizer import stretches

BLOCK_BYTES = 2**20  # read at a time
LONG_RECORD = 2**22  # characters from which a line or document comes in several fragments
SEPARATOR_BYTES = 1024  # longest separator between documents, but for blanks


class Fragment(NamedTuple):
    """A part of a document: `first` where the document begins, `last` where it ends."""

    text: str
    first: bool
    last: bool


def open_stream(path: str) -> BinaryIO:
    """The bytes of a file, unpacked where its name ends in .gz or .zst."""
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        return _zstd().open(path, "rb")
    return open(path, "rb")


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def blocks_of(path: str, start: int, stop: int) -> Iterator[bytes]:
    """A file's bytes from `start` to `stop` (-1: to its end), in blocks. Raises UserError for a damaged compressed file."""
    damaged: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if path.lower().endswith(".zst"):
        damaged += (_zstd().ZstdError,)
    left = stop - start if stop >= 0 else sys.maxsize
    try:
        with open_stream(path) as stream:
            stream.seek(start)
            while left > 0 and (block := stream.read(min(left, BLOCK_BYTES))):
                left -= len(block)
                yield block
    except damaged as error:
        raise UserError(f"{path}: cut short or damaged: {error}") from None


def decoded(path: str, start: int, stop: int, encoding: str, errors: str) -> Iterator[str]:
    """The text of a part of a file, in blocks. Raises UserError naming the line of what cannot be decoded, and of NULs."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    position = start  # in the file, of the next byte to decode
    for block in chain(blocks_of(path, start, stop), [b""]):
        if position == 0 and codecs.lookup(encoding).name == "utf-8" and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path}:1: begins like UTF-16; --encoding utf-16 reads it")
        waiting = len(decoder.getstate()[0])  # bytes of a character that the last block ended in
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = position - waiting + error.start
            raise UserError(
                f"{path}:{line_of(path, place)}: not {encoding} at byte {place}; name its --encoding, or choose --errors replace"
            ) from None
        if position == 0:
            text = text.removeprefix("\ufeff")  # a byte-order mark is not text
        if "\0" in text and errors == "strict":
            place = position - waiting + len(text[: text.index("\0")].encode(encoding))
            raise UserError(
                f"{path}:{line_of(path, place)}: a NUL byte. Not text? A pattern ('dir/**/*.txt') chooses files; "
                "or name its --encoding, or choose --errors replace"
            )
        position += len(block)
        if text:
            yield text.replace("\0", "\ufffd")


def line_of(path: str, position: int) -> int:
    """The line in which a byte of the (unpacked) file stands, counted from 1."""
    return 1 + sum(block.count(b"\n") for block in blocks_of(path, 0, position))


def cut(blocks: Iterable[str], between: str) -> Iterator[Fragment]:
    """The records of a text: what stands between matches of a regular expression. A long one comes in fragments."""
    find = re.compile(between).finditer
    buffer, first = "", True
    for block in chain(blocks, [""]):
        buffer, start = buffer + block, 0
        certain = len(buffer.rstrip()) if block else sys.maxsize  # a separator that only blanks follow may go on
        for match in find(buffer):
            if match.end() >= certain:
                break
            yield Fragment(buffer[start : match.start()], first, True)
            start, first = match.end(), True
        buffer = buffer[start:]
        if len(buffer) > LONG_RECORD:
            keep = SEPARATOR_BYTES + len(buffer) - len(buffer.rstrip())  # where a separator may have begun
            if buffer[:-keep]:
                yield Fragment(buffer[:-keep], first, False)
                buffer, first = buffer[-keep:], False
    if buffer or not first:
        yield Fragment(buffer, first, True)


def whole(blocks: Iterable[str], first: bool, last: bool) -> Iterator[Fragment]:
    """Blocks of one document as its fragments; `first` and `last` tell whether they begin and end it."""
    waiting = None
    for text in blocks:
        if waiting is not None:
            yield Fragment(waiting, first, False)
            first = False
        waiting = text
    yield Fragment(waiting or "", first, last)


def trimmed(fragments: Iterable[Fragment]) -> Iterator[Fragment]:
    """Documents without the line breaks at their beginning and end, which belong to the separator; what is left empty stays."""
    for text, first, last in fragments:
        text = text.lstrip("\r\n") if first else text
        yield Fragment(text.rstrip("\r\n") if last else text, first, last)


def record_boundary(path: str, position: int, between: str) -> int:
    """Where the first record begins that follows a separator after `position`."""
    status = os.stat(path)
    size, question = status.st_size, (path, between, status.st_size, status.st_mtime_ns)
    if position <= 0 or position >= size:
        return max(0, min(position, size))
    known = _found.get(question)
    if known and known[0] <= position <= known[1]:
        return known[2]
    find = re.compile(between.encode()).finditer
    asked, buffer = position, b""
    for block in chain(blocks_of(path, position, -1), [b""]):
        buffer += block
        certain = len(buffer.rstrip()) if block else sys.maxsize  # as in `cut`
        match = next((match for match in find(buffer) if match.end() < certain), None)
        if match:
            _found[question] = asked, position + match.start(), position + match.end()
            return position + match.end()
        keep = SEPARATOR_BYTES + len(buffer) - len(buffer.rstrip())
        position += max(0, len(buffer) - keep)
        buffer = buffer[-keep:]
    _found[question] = asked, size, size
    return size


# For a file and separator: the place that was asked for last, and where the next separator begins and ends. In a record of
# a gigabyte every span has the same answer, which is not to be looked for a thousand times.
_found: dict[tuple[str, str, int, int], tuple[int, int, int]] = {}


def document_boundary(path: str, position: int) -> int:
    """The first place from `position` on where a text may be cut without changing its tokens, see tokenizer.stretches."""
    size = os.path.getsize(path)
    if position <= 0 or position >= size:
        return max(0, min(position, size))
    with open(path, "rb") as file:
        file.seek(position)
        data = file.read(2**18)  # a stretch has up to 65,536 characters of 4 bytes
    while data and data[0] & 0xC0 == 0x80:  # not the first byte of a character
        data, position = data[1:], position + 1
    text = data.decode("utf-8", errors="ignore")
    return position + len(next(iter(stretches(text)), "").encode())

"""Text files as streams: decompressed, decoded and cut into records, a few megabytes at a time.

Several workers may share a large file: each begins at the first boundary after the start of its span and ends at the first
boundary after the end of it, so that no text is lost or read twice.
"""

import codecs
import gzip
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, AnyStr

from papagaio.corpus.spans import Fragment
from papagaio.errors import UserError
from papagaio.tokenizer import text_chunks

BLOCK_BYTES = 2**20  # read at a time
LONG_RECORD = 2**22  # characters; a longer line or document comes in several fragments
SEPARATOR_BYTES = 1024  # longest separator between documents, not counting whitespace


def blocks_of(path: str, start: int, stop: int) -> Iterator[bytes]:
    """Bytes [start, stop) of a file (stop -1: to its end) in blocks; .gz and .zst files are decompressed.

    Raises UserError for a damaged compressed file.
    """
    open_file: Callable[..., Any] = open
    damaged: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if path.lower().endswith(".gz"):
        open_file = gzip.open
    elif path.lower().endswith(".zst"):
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        open_file, damaged = zstd.open, (*damaged, zstd.ZstdError)
    left = stop - start if stop >= 0 else sys.maxsize
    try:
        with open_file(path, "rb") as stream:
            stream.seek(start)
            while left > 0 and (block := stream.read(min(left, BLOCK_BYTES))):
                left -= len(block)
                yield block
    except damaged as error:
        raise UserError(f"{path}: cut short or damaged: {error}") from None


def decoded(path: str, start: int, stop: int, encoding: str, errors: str) -> Iterator[str]:
    """The text of a part of a file, in blocks. Raises UserError with the line of a byte that is not text."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    position = start  # in the file, of the next byte to decode
    for block in chain(blocks_of(path, start, stop), [b""]):
        if position == 0 and codecs.lookup(encoding).name == "utf-8" and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path}:1: begins like UTF-16; --encoding utf-16 reads it")
        place = position - len(decoder.getstate()[0])  # the decoder keeps the bytes of an incomplete character
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place += error.start
            cure = "give its --encoding, or use --errors replace"
            raise UserError(f"{path}:{line_of(path, place)}: not {encoding} at byte {place}; {cure}") from None
        if position == 0:
            text = text.removeprefix("\ufeff")  # a byte-order mark is not text
        if "\0" in text and errors == "strict":
            place += len(text[: text.index("\0")].encode(encoding))
            raise UserError(
                f"{path}:{line_of(path, place)}: a NUL byte. Not text? A pattern ('dir/**/*.txt') selects files; "
                "or give its --encoding, or use --errors replace"
            )
        position += len(block)
        if text:
            yield text.replace("\0", "\ufffd")


def line_of(path: str, position: int) -> int:
    """The line, counted from 1, of a byte of the (decompressed) file."""
    return 1 + sum(block.count(b"\n") for block in blocks_of(path, 0, position))


def split(blocks: Iterable[AnyStr], separator: AnyStr) -> Iterator[tuple[AnyStr, AnyStr | None]]:
    """Each text between matches of a regular expression, and the match behind it: empty at the end, None in a long text."""
    find, buffer = re.compile(separator).finditer, separator[:0]
    for block in chain(blocks, [separator[:0]]):
        buffer, start = buffer + block, 0
        # A separator that only whitespace follows may continue in the next block.
        certain = len(buffer.rstrip()) if block else sys.maxsize
        for match in find(buffer):
            if match.end() >= certain:
                break
            yield buffer[start : match.start()], match[0]
            start = match.end()
        buffer = buffer[start:]
        if len(buffer) > LONG_RECORD:
            keep = SEPARATOR_BYTES + len(buffer) - len(buffer.rstrip())  # may hold the beginning of a separator
            if buffer[:-keep]:
                yield buffer[:-keep], None
                buffer = buffer[-keep:]
    yield buffer, separator[:0]


def records(blocks: Iterable[str], separator: str) -> Iterator[Fragment]:
    """The texts between matches of a regular expression. A long one comes in several fragments."""
    first = True
    for text, match in split(blocks, separator):
        if text or match or not first:  # nothing follows a separator at the very end
            yield Fragment(text, first, match is not None)
        first = match is not None


def one_document(blocks: Iterable[str], first: bool, last: bool) -> Iterator[Fragment]:
    """Blocks of one document as fragments; `first` and `last` tell whether the document begins and ends in them."""
    before = ""
    for text in blocks:
        if before:
            yield Fragment(before, first, False)
            first = False
        before = text
    yield Fragment(before, first, last)


def without_outer_newlines(fragments: Iterable[Fragment]) -> Iterator[Fragment]:
    """Documents without the line breaks at their beginning and end, which belong to the separator."""
    for text, first, last in fragments:
        text = text.lstrip("\r\n") if first else text
        yield Fragment(text.rstrip("\r\n") if last else text, first, last)


# For a file and separator: the last position asked for, and start and end of the separator found. All spans inside a record of a
# gigabyte have the same answer, which must not be searched for a thousand times.
_found: dict[tuple[str, str, int, int], tuple[int, int, int]] = {}


def boundary(path: str, position: int, separator: str | None) -> int:
    """The first position from `position` on at which a part of a file may begin.

    That is behind the next separator or, if the file is one document, where a cut does not change the tokens.
    """
    status = os.stat(path)
    if not 0 < position < status.st_size:
        return min(position, status.st_size)
    if separator is None:
        with open(path, "rb") as file:
            file.seek(position)
            data = file.read(2**18)  # a chunk has up to 65,536 characters of 4 bytes
        text = data.lstrip(bytes(range(0x80, 0xC0)))  # from the first byte of a character on
        chunk = next(iter(text_chunks(text.decode("utf-8", errors="ignore"))), "")
        return position + len(data) - len(text) + len(chunk.encode())
    key = (path, separator, status.st_size, status.st_mtime_ns)
    known = _found.get(key)
    if not known or not known[0] <= position <= known[1]:
        start = position
        for skipped, match in split(blocks_of(path, position, -1), separator.encode()):
            start += len(skipped)
            if match is not None:
                break
        known = _found[key] = position, start, start + len(match)
    return known[2]

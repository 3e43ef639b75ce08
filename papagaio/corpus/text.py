"""Text files as streams: decompressed, decoded and cut into records, a few megabytes at a time.

Several workers may share a large file: each begins at the first boundary after the start of its span and ends at the first
boundary after the end of it, so that no text is lost or read twice.
"""

import bz2
import codecs
import functools
import gzip
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, AnyStr

from papagaio.corpus.spans import BadInput, Fragment
from papagaio.errors import UserError
from papagaio.report import Report
from papagaio.tokenizer import text_chunks

BLOCK_BYTES = 2**20  # read at a time
LONG_RECORD = 2**22  # characters; a longer line or document comes in several fragments
SEPARATOR_BYTES = 1024  # longest separator between documents, not counting whitespace
# Tried for --encoding auto. cp1252 contains the letters of Latin-1.
ENCODINGS = ["cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp850", "mac_roman", "koi8_r"]
ENCODINGS += ["cp932", "euc_jp", "gb18030", "big5", "cp949"]
SAMPLE_BYTES = 2**18  # from which an encoding is guessed


def blocks_of(path: str, start: int, stop: int) -> Iterator[bytes]:
    """Bytes [start, stop) of a file (stop -1: to its end) in blocks; .gz, .zst, .bz2 and .xz files are decompressed.

    Raises BadInput for a damaged compressed file.
    """
    open_file: Callable[..., Any] = open
    damaged: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if path.lower().endswith(".gz"):
        open_file = gzip.open
    elif path.lower().endswith(".bz2"):  # which raises OSError for damage, and so for nothing else after opening
        open_file, damaged = bz2.open, (*damaged, OSError)
    elif path.lower().endswith(".xz"):
        open_file, damaged = lzma.open, (*damaged, lzma.LZMAError)
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
        if isinstance(error, OSError) and error.errno:
            raise
        raise BadInput(path, "cut short or damaged", f": {error}") from None


def decoded(path: str, start: int, stop: int, encoding: str, errors: str) -> Iterator[str]:
    """The text of a part of a file, in blocks. Raises BadInput with the line of a byte that is not text.

    With the error handler surrogateescape, `fault` finds the text that is wrong.
    """
    encoding = detect_encoding(path) if encoding == "auto" else encoding
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    position = start  # in the file, of the next byte to decode
    for block in chain(blocks_of(path, start, stop), [b""]):
        if position == 0 and codecs.lookup(encoding).name == "utf-8" and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise BadInput(f"{path}:1", "begins like UTF-16", "; --encoding utf-16 reads it, and auto finds it for each file")
        place = position - len(decoder.getstate()[0])  # the decoder keeps the bytes of an incomplete character
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place += error.start
            cure = "; --encoding names another, auto finds it for each file, --errors replace puts U+FFFD"
            raise BadInput(f"{path}:{line_of(path, place)}", f"not {encoding}", f" at byte {place}{cure}") from None
        if position == 0:
            text = text.removeprefix("\ufeff")  # a byte-order mark is not text
        if "\0" in text and errors == "strict":
            place += len(text[: text.index("\0")].encode(encoding))
            cure = ". Not text? --exclude and patterns ('dir/**/*.txt') select files. In another --encoding? auto finds it"
            raise BadInput(f"{path}:{line_of(path, place)}", "a NUL byte", cure)
        position += len(block)
        if text:
            yield text.replace("\0", "\ufffd") if errors == "replace" else text


def fault(text: str) -> str:
    """What is wrong with a text that was decoded with surrogateescape; "" if nothing is."""
    if "\0" in text:
        return "a NUL byte"
    return "not in the --encoding" if not text.isascii() and re.search("[\ud800-\udfff]", text) else ""


def check_encoding(name: str) -> None:
    """Raises UserError if there is no such encoding."""
    try:
        if name != "auto":
            codecs.lookup(name)
    except LookupError:
        raise UserError(f"--encoding={name}: no such encoding; utf-8, utf-16, latin-1 and auto are common ones") from None


def detect_encoding(path: str) -> str:
    """The encoding of a text file: UTF-16 by its byte-order mark, UTF-8 if all of it is, else charset-normalizer's guess.

    Raises BadInput if there is none: the file is not text.
    """
    status = os.stat(path)
    return _detect_encoding(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _detect_encoding(path: str, size: int, changed: int) -> str:
    decoder, sample = codecs.getincrementaldecoder("utf-8")(), b""
    for number, block in enumerate(chain(blocks_of(path, 0, -1), [b""])):
        if number == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        if not sample:
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # its object begins with the bytes that the decoder has kept
                sample = error.object[error.object.rfind(b"\n", 0, error.start) + 1 :]
        elif len(sample) < SAMPLE_BYTES:
            sample += block
        else:
            break
    if not sample:
        return "utf-8"
    from charset_normalizer import from_bytes

    # Much ASCII makes every encoding look like text: it is left out but for what precedes other characters in a line.
    sample = b"\n".join(re.findall(rb"[\t -\x7f]{0,100}[\x80-\xff][^\n]*", sample)) + b"\n"
    if len(sample) > SAMPLE_BYTES:  # whole lines, so that no character is cut
        sample = sample[: sample.rfind(b"\n", 0, SAMPLE_BYTES) + 1] or sample[:SAMPLE_BYTES]
    guesses = from_bytes(sample, cp_isolation=ENCODINGS)
    # It often prefers cp1250 for Portuguese and English, where both encodings look like text; it rules cp1252 out for Polish.
    names = [name for guess in guesses for name in guess.could_be_from_charset]
    if not names:
        raise BadInput(path, "text in no known encoding", "; give its --encoding, or --exclude it")
    return "cp1252" if "cp1252" in names else guesses[0].encoding


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


def records(blocks: Iterable[str], separator: str) -> Iterator[tuple[int, Fragment]]:
    """The texts between matches of a regular expression, and the number of line breaks before each.

    A long text comes in several fragments.
    """
    first, line = True, 0
    for text, match in split(blocks, separator):
        if text or match or not first:  # nothing follows a separator at the very end
            yield line, Fragment(text, first, match is not None)
        first = match is not None
        line += text.count("\n") + (match.count("\n") if match else 0)


def without_faults(records: Iterable[tuple[int, Fragment]], place: Callable[[int], str], bad: Report) -> Iterator[Fragment]:
    """The records without those in which `fault` finds something; they are noted in `bad`. `place` gives the place of a line.

    Of a record that comes in several fragments, the fragments before the fault have been given already: the record ends there.
    """
    wrong = ""
    for line, fragment in records:
        if fragment.first:
            wrong = ""
        if not wrong and (wrong := fault(fragment.text)):
            bad.note(f"left out, {wrong}", place(line))
            if not fragment.first:
                yield Fragment("", False, True)
        if not wrong:
            yield fragment


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

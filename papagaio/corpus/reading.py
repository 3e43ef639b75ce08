"""Corpora: what there is to read, cut into spans that workers can share, and a span's documents as a stream of text.

    spans = list_spans(("texts/", "more.jsonl.gz"), config)
    for fragment in read(spans[0], config): ...                 Fragment("Once upon", first=True, last=False), ...

A document comes in fragments of a few megabytes at most, so that none ever stands in memory as a whole; most documents are
one fragment, first and last at once. How text files are read stands in textfiles.py; JSON, Parquet and hub in tables.py.
"""

import codecs
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from papagaio.corpus.text import Fragment, cut, decoded, document_boundary, record_boundary, trimmed, whole
from papagaio.errors import UserError
from papagaio.files import GIVE_TEXT, refuse_pickle
from papagaio.options import Options, option

LEAF_BYTES = 2**20  # of a large text that is one document: hashed by themselves, encoded by one worker
MAX_SPANS = 2**14  # spans grow with the corpus, to 64 MiB, so that there are not too many of them


class ReadingOptions(Options):
    """How the input is to be understood."""

    format: Literal["auto", "text", "jsonl", "parquet"] = option("auto", "of the input files; auto goes by their names")
    text_key: str = option("text", "key or column of the text in .jsonl and .parquet files")
    split_documents: str = option(
        "none", "cut text files into documents: none, blank_line, or the TEXT that stands between them", max_length=256
    )
    encoding: str = option("utf-8", "of text and .jsonl files")
    errors: Literal["strict", "replace"] = option("strict", "what cannot be decoded stops the run, or becomes U+FFFD")


class Span(NamedTuple):
    """A part of the input: bytes [start, stop) of a file, row groups of a .parquet file, or a shard of a hub dataset.

    `stop` is -1 for a file that has to be read from its beginning. `size` is in bytes, 0 if unknown.
    """

    path: str
    kind: Literal["text", "jsonl", "parquet", "hub"]
    start: int
    stop: int
    size: int


def list_spans(inputs: tuple[str, ...], config: ReadingOptions) -> list[Span]:
    """The spans of all inputs, in order: files, directories (all files in them, by name), patterns, hf://NAME[:CONFIG][:SPLIT].

    Raises UserError for what does not exist or cannot be read.
    """
    separator(config)
    try:
        codecs.lookup(config.encoding)
    except LookupError:
        raise UserError(f"--encoding={config.encoding}: no such encoding; utf-8, utf-16 and latin-1 are common ones") from None
    files = {name: list_files(name) for name in inputs if not name.startswith("hf://")}
    total = sum(os.path.getsize(file) for found in files.values() for file in found)
    span_bytes = LEAF_BYTES
    while span_bytes < 2**26 and total > MAX_SPANS * span_bytes:
        span_bytes *= 2
    spans: list[Span] = []
    for name in inputs:
        if name.startswith("hf://"):
            from papagaio.corpus.tables import hub_spans

            spans += hub_spans(name)
        else:
            spans += [span for file in files[name] for span in split_file(file, span_bytes, config)]
    return spans


def list_files(name: str) -> list[str]:
    """The files that an input stands for. Hidden ones inside a directory are left out."""
    path = Path(name)
    if path.is_dir():
        inside = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        found = [str(p) for p in sorted(inside) if not p.is_dir()]
        if not found:
            raise UserError(f"{name}: a directory without files; --input needs text")
    elif glob.has_magic(name) and not path.exists():
        found = sorted(p for p in glob.glob(name, recursive=True) if not os.path.isdir(p))
        if not found:
            raise UserError(f"{name}: no file has a name like that")
    else:
        found = [name]
    for file in found:
        if not os.path.lexists(file):
            raise UserError(f"{file}: no such file or directory")
        if not os.path.isfile(file) or not os.access(file, os.R_OK):
            raise UserError(f"{file}: cannot be read; --input takes readable regular files, and - for standard input")
    return found


def split_file(path: str, span_bytes: int, config: ReadingOptions) -> list[Span]:
    """The spans of one file: a large one is shared by several workers where they can begin in the middle of it."""
    refuse_pickle(Path(path), GIVE_TEXT)
    name = path.lower()
    size = os.path.getsize(path)
    compressed = name.endswith((".gz", ".zst"))
    stem = name.rsplit(".", 1)[0] if compressed else name
    kind = config.format
    if kind == "auto":
        kind = "jsonl" if stem.endswith((".jsonl", ".ndjson")) else "parquet" if stem.endswith(".parquet") else "text"
    if kind == "parquet":
        from papagaio.corpus.tables import parquet_spans

        return [Span(path, kind, start, stop, n_bytes) for start, stop, n_bytes in parquet_spans(path, span_bytes)]
    as_it_is = codecs.lookup(config.encoding).name == "utf-8" and config.errors == "strict"
    if compressed or size <= LEAF_BYTES or not as_it_is:
        return [Span(path, kind, 0, -1, size)]
    starts = range(0, size, span_bytes)
    return [Span(path, kind, start, min(start + span_bytes, size), min(span_bytes, size - start)) for start in starts]


def separator(config: ReadingOptions) -> str | None:
    """Regular expression for what stands between documents of a text file; None where the file is one document."""
    text = config.split_documents
    if text == "none":
        return None
    if text == "blank_line":
        return r"\n(?:[ \t\r\f\v]*\n)+"
    if not text:
        raise UserError("--split_documents: the text between documents cannot be empty")
    if any(text.startswith(text[i:]) for i in range(1, len(text))):
        raise UserError(f"--split_documents={text!r}: begins as it ends, so that where it stands is not certain; choose another")
    return re.escape(text)


def leaves(span: Span, config: ReadingOptions) -> list[Span]:
    """The leaves of a span inside a text file that is one document; [span] itself for every other one."""
    if not inside_document(span, config):
        return [span]
    starts = range(span.start, span.stop, LEAF_BYTES)
    return [span._replace(start=start, stop=min(start + LEAF_BYTES, span.stop)) for start in starts]


def inside_document(span: Span, config: ReadingOptions) -> bool:
    """True for a part of a text file that is a single document."""
    return span.kind == "text" and span.stop >= 0 and separator(config) is None


def read(span: Span, config: ReadingOptions) -> Iterator[Fragment]:
    """The documents of a span, in fragments. Raises UserError naming the file and the line (or row) at fault."""
    from papagaio.corpus import tables

    if span.kind == "parquet":
        return tables.read_parquet(span.path, span.start, span.stop, config)
    if span.kind == "hub":
        return tables.read_hub(span.path, span.start, config)
    between = r"\n" if span.kind == "jsonl" else separator(config)
    if span.stop < 0:
        start, stop = 0, -1
    elif between is None:
        start, stop = document_boundary(span.path, span.start), document_boundary(span.path, span.stop)
    else:
        start, stop = record_boundary(span.path, span.start, between), record_boundary(span.path, span.stop, between)
    blocks = decoded(span.path, start, stop, config.encoding, config.errors)
    if span.kind == "jsonl":
        return tables.read_json_lines(cut(blocks, between), span.path, start, config)
    if between is None:
        ends = span.stop < 0 or span.stop == os.path.getsize(span.path)
        return whole(blocks, first=span.start == 0, last=ends)
    return trimmed(cut(blocks, between))

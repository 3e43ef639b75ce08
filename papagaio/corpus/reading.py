"""Reads a corpus: lists its spans, which workers can share, and gives the documents of a span as a stream.

    spans = list_spans(("texts/", "more.jsonl.gz"), config)
    for fragment in read(spans[0], config): ...                 Fragment("Once upon", first=True, last=False), ...

A document comes in fragments of a few megabytes at most, and most documents are a single fragment. text.py reads text files,
tables.py reads JSON lines, Parquet files and hub datasets.
"""

import codecs
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from papagaio.corpus import tables, text
from papagaio.corpus.options import ReadingOptions
from papagaio.corpus.spans import LEAF_BYTES, Fragment, Span
from papagaio.errors import UserError
from papagaio.files import GIVE_TEXT, refuse_pickle

MAX_SPANS = 2**14  # spans grow with the corpus, up to 64 MiB, so that there are not many more of them


def list_spans(inputs: tuple[str, ...], config: ReadingOptions) -> list[Span]:
    """The spans of all inputs in order: files, directories (their files by name), patterns, hf://NAME[:CONFIG][:SPLIT].

    Raises UserError if an input does not exist or cannot be read.
    """
    document_separator(config)
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
            spans += [Span(name, "hub", i, i + 1, 0) for i in range(tables.hub_dataset(name).num_shards)]
        else:
            spans += [span for file in files[name] for span in split_file(file, span_bytes, config)]
    return spans


def list_files(name: str) -> list[str]:
    """The files that an input stands for. Hidden files inside a directory are left out."""
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
    """The spans of one file: several for a large one that can be read from the middle."""
    refuse_pickle(Path(path), GIVE_TEXT)
    name, size, kind = path.lower(), os.path.getsize(path), config.format
    stem = name.removesuffix(".gz").removesuffix(".zst")
    if kind == "auto":
        kind = "jsonl" if stem.endswith((".jsonl", ".ndjson")) else "parquet" if stem.endswith(".parquet") else "text"
    if kind == "parquet":
        return tables.parquet_spans(path, span_bytes)
    plain_utf8 = stem == name and codecs.lookup(config.encoding).name == "utf-8" and config.errors == "strict"
    if size <= LEAF_BYTES or not plain_utf8:
        return [Span(path, kind, 0, -1, size)]
    starts = range(0, size, span_bytes)
    return [Span(path, kind, start, min(start + span_bytes, size), min(span_bytes, size - start)) for start in starts]


def document_separator(config: ReadingOptions) -> str | None:
    """Regular expression for what stands between the documents of a text file; None if the file is one document."""
    between = config.split_documents
    if between == "none":
        return None
    if between == "blank_line":
        return r"\n(?:[ \t\r\f\v]*\n)+"
    if not between:
        raise UserError("--split_documents: the text between documents cannot be empty")
    if any(between.startswith(between[i:]) for i in range(1, len(between))):
        raise UserError(f"--split_documents={between!r}: begins as it ends, which makes its place ambiguous; choose another")
    return re.escape(between)


def leaves(span: Span, config: ReadingOptions) -> list[Span]:
    """A span of a text file that is a single document, cut into leaves of LEAF_BYTES. Empty for every other span."""
    if span.kind != "text" or span.stop < 0 or document_separator(config) is not None:
        return []
    starts = range(span.start, span.stop, LEAF_BYTES)
    return [span._replace(start=start, stop=min(start + LEAF_BYTES, span.stop)) for start in starts]


def read(span: Span, config: ReadingOptions) -> Iterator[Fragment]:
    """The documents of a span, in fragments. Raises UserError that begins with the file and the line (or row) at fault."""
    if span.kind == "parquet":
        return tables.read_parquet(span, config)
    if span.kind == "hub":
        return tables.read_hub(span, config)
    path, start, stop = span.path, 0, -1
    separator = r"\n" if span.kind == "jsonl" else document_separator(config)
    if span.stop >= 0:
        start, stop = (text.boundary(path, position, separator) for position in (span.start, span.stop))
    blocks = text.decoded(path, start, stop, config.encoding, config.errors)
    if separator is None:
        return text.one_document(blocks, first=span.start == 0, last=span.stop < 0 or span.stop == os.path.getsize(path))
    found = text.records(blocks, separator)
    return tables.read_json_lines(found, path, start, config) if span.kind == "jsonl" else text.without_outer_newlines(found)

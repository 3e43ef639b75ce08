"""Reads a corpus: lists its spans, which workers can share, and gives the documents of a span as a stream.

    spans = list_spans(("texts/", "more.jsonl.gz"), config, report)
    for fragment in read(spans[0], config): ...                 Fragment("Once upon", first=True, last=False), ...

A document comes in fragments of a few megabytes at most, and most documents are a single fragment. folders.py finds the files,
text.py reads text files, tables.py and rows.py read JSON, CSV, Parquet and hub datasets.
"""

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from papagaio.corpus import folders, rows, tables, text
from papagaio.corpus.options import ReadingOptions
from papagaio.corpus.spans import LEAF_BYTES, BadInput, Fragment, Span
from papagaio.corpus.workers import in_parallel
from papagaio.errors import UserError
from papagaio.files import GIVE_TEXT, printable, refuse_pickle
from papagaio.report import Report

MAX_SPANS = 2**14  # spans grow with the corpus, up to 64 MiB, so that there are not many more of them


def list_spans(inputs: Sequence[str], config: ReadingOptions, report: Report | None = None) -> list[Span]:
    """The spans of all inputs in order: files, directories (their files by name), patterns, hf://NAME[:CONFIG][:SPLIT].

    Files that are passed over are noted in `report`. Raises UserError if an input does not exist or cannot be read.
    """
    document_separator(config)
    text.check_encoding(config.encoding)
    report = Report() if report is None else report
    files = folders.find_files(inputs, report, config.exclude, config.format == "text", config.encoding)
    total = sum(os.path.getsize(file) for file in files if not file.startswith("hf://"))
    span_bytes = LEAF_BYTES
    while span_bytes < 2**26 and total > MAX_SPANS * span_bytes:
        span_bytes *= 2
    spans: list[Span] = []
    for file in files:
        if file.startswith("hf://"):
            spans += [Span(file, "hub", i, i + 1, 0) for i in range(tables.hub_dataset(file).num_shards)]
            continue
        found = split_file(file, span_bytes, config)
        if why := unusable(found, config, file in inputs):
            report.note(*why)
        else:
            spans += found
    if not spans:
        passed = "; ".join(report.lines())
        raise UserError(f"{', '.join(map(printable, inputs))}: nothing to read{f' ({passed})' if passed else ''}")
    return spans


def took(spans: Sequence[Span]) -> str:
    """`took 3 .parquet files, 1 .txt file`: what directories and patterns have given."""
    counts = Counter(rows.uncompressed_suffix(path) or "unnamed" for path in dict.fromkeys(span.path for span in spans))
    return "took " + ", ".join(f"{n:,} {suffix} file{'s' * (n > 1)}" for suffix, n in counts.most_common())


def unusable(spans: list[Span], config: ReadingOptions, named: bool) -> tuple[str, str] | None:
    """Why a file is passed over, and the place; None if it can be used.

    A JSON or CSV file that a directory happens to hold has no text under the key, as its first row tells. With skip_bad, a text
    file that cannot be decoded is left out as a whole, which has to be known before parts of it are encoded.
    """
    if not spans:
        return None
    path, kind = spans[0].path, spans[0].kind
    try:
        if rows.uncompressed_suffix(path) in (".json", ".csv", ".tsv") and not named and config.format == "auto":
            first = next(rows.read_rows(path, config.encoding, kind, config.errors), None)
            if first is None or (not first.error and tables.text_under(first.value, config.text_key) is tables.MISSING):
                reason = f'passed over, JSON or CSV without the key "{config.text_key}" (--text_key names another)'
                return reason, printable(path)
        if kind == "text" and config.skip_bad and document_separator(config) is None:
            for _ in text.decoded(path, 0, -1, config.encoding, config.errors):
                pass
    except BadInput as problem:
        return (f"left out, {problem.reason}", problem.place) if config.skip_bad else None
    return None


def split_file(path: str, span_bytes: int, config: ReadingOptions) -> list[Span]:
    """The spans of one file: several for a large one that can be read from the middle."""
    refuse_pickle(Path(path), GIVE_TEXT)
    size, kind = os.path.getsize(path), config.format
    try:
        kind = (rows.detect_format(path, config.encoding) or "text") if kind == "auto" else kind
    except BadInput:  # a damaged compressed file, which reading will report
        kind = "text"
    if kind == "parquet":
        return tables.parquet_spans(path, span_bytes)
    plain = kind in ("text", "jsonl") and not path.lower().endswith(rows.COMPRESSED) and config.errors == "strict"
    if size <= LEAF_BYTES or not plain or not is_utf8(path, config.encoding):
        return [Span(path, kind, 0, -1, size)]
    starts = range(0, size, span_bytes)
    return [Span(path, kind, start, min(start + span_bytes, size), min(span_bytes, size - start)) for start in starts]


def is_utf8(path: str, encoding: str) -> bool:
    try:
        return codecs.lookup(text.detect_encoding(path) if encoding == "auto" else encoding).name == "utf-8"
    except BadInput:
        return False


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


def read(span: Span, config: ReadingOptions, bad: Report | None = None) -> Iterator[Fragment]:
    """The documents of a span, in fragments. With config.skip_bad, rows that cannot be read are left out and noted in `bad`;
    otherwise BadInput is raised, which begins with the file and the line (or row) at fault."""
    if config.skip_bad and bad is None:
        bad = Report()
    found: Iterator[Any]
    if span.kind == "parquet":
        found = tables.read_parquet(span, config)
    elif span.kind == "hub":
        found = tables.read_hub(span, config)
    elif span.kind in ("json", "csv"):
        found = tables.read_whole_table(span, config)
    else:
        path, start, stop = span.path, 0, -1
        separator = r"\n" if span.kind == "jsonl" else document_separator(config)
        if span.stop >= 0:
            start, stop = (text.boundary(path, position, separator) for position in (span.start, span.stop))
        if separator is None:
            blocks = text.decoded(path, start, stop, config.encoding, config.errors)
            last = span.stop < 0 or span.stop == os.path.getsize(path)
            return skip_rest(text.one_document(blocks, first=span.start == 0, last=last), bad)
        # With surrogateescape, a record that cannot be decoded does not end the reading of the others.
        errors = "surrogateescape" if bad is not None and config.errors == "strict" else config.errors
        records = text.records(text.decoded(path, start, stop, config.encoding, errors), separator)
        first_line = cache(lambda: text.line_of(path, start))

        def place_of(line: int) -> str:
            return f"{path}:{first_line() + line}"

        if span.kind == "text":
            good = (fragment for _, fragment in records) if bad is None else text.without_faults(records, place_of, bad)
            return skip_rest(text.without_outer_newlines(good), bad)
        found = tables.read_json_lines(records, place_of, check=errors == "surrogateescape")
    return skip_rest(tables.read_table(found, config, bad), bad)


def skip_rest(fragments: Iterator[Fragment], bad: Report | None) -> Iterator[Fragment]:
    """The fragments up to a fault of the file, which ends the document and is noted in `bad`, or raised without it."""
    inside = False
    try:
        for fragment in fragments:
            inside = not fragment.last
            yield fragment
    except BadInput as problem:
        if bad is None:
            raise
        bad.note(f"left out, {problem.reason}", problem.place)
        if inside:
            yield Fragment("", False, True)


def all_that_is_bad(first: BadInput, spans: Sequence[Span], config: ReadingOptions, workers: int) -> UserError:
    """One error for everything in these spans that cannot be read, of which `first` was met first."""
    report = survey(spans, config, workers)
    if sum(report.counts.values()) < 2:
        return first
    found = "; ".join(line.removeprefix("left out, ") for line in report.lines())
    cures = ["--skip_bad leaves out what cannot be read", "--exclude PATTERN passes files over"]
    if config.encoding != "auto":
        cures.append("--encoding auto finds the encoding of each file")
    if "under the key" in found or "column" in found:
        cures.append("--text_key names the key of the text")
    return UserError(f"{first}. In all, this cannot be read: {found}. {', '.join(cures)}")


def survey(spans: Sequence[Span], config: ReadingOptions, workers: int) -> Report:
    """All that cannot be read in these spans. Nothing is encoded."""
    whole = {span.path: span._replace(start=0, stop=-1) if span.kind in ("text", "jsonl") else span for span in spans}
    parts = [span for span in spans if span.kind == "parquet"]  # a dataset of the hub is not loaded once more
    parts += [span for span in whole.values() if span.kind not in ("parquet", "hub")]
    report = Report()
    jobs = [(_survey, number, span, config) for number, span in enumerate(parts)]
    found = dict(in_parallel(jobs, workers, [os.path.getsize(span.path) for span in parts]))
    for number in sorted(found):
        report.merge(found[number])
    return report


def _survey(number: int, span: Span, config: ReadingOptions) -> tuple[int, Report]:
    bad = Report()
    for _ in read(span, config, bad):
        pass
    return number, bad

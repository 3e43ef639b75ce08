"""Documents in tables: JSON lines, JSON arrays, CSV, Parquet, datasets of the Hugging Face hub; the text is under one key."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from papagaio.corpus.options import ReadingOptions
from papagaio.corpus.rows import json_row, open_parquet, parquet_rows, read_rows
from papagaio.corpus.spans import BadInput, Fragment, Span
from papagaio.corpus.text import LONG_RECORD, fault
from papagaio.errors import MachineError, UserError
from papagaio.report import Report

LONGEST_LINE = 2**28  # characters of a line of JSON, which is parsed as a whole
MISSING = object()


def text_under(row: Any, key: str) -> Any:
    """The value under a key, or under a path of keys such as `translation.en`; MISSING if there is none."""
    if not isinstance(row, dict):
        return MISSING
    if key in row or "." not in key:
        return row.get(key, MISSING)
    outer, _, inner = key.partition(".")
    found = row.get(outer, MISSING)
    return None if found is None else text_under(found, inner)


def document(value: Any, place: Callable[[], str], config: ReadingOptions, row: Any = None) -> Iterator[Fragment]:
    """The fragments of the document that a row of a table holds; none is an empty one. Raises BadInput if it is not text that
    UTF-8 can encode."""
    if value is None:
        value = ""
    if value is MISSING:
        keys = f"; it has {', '.join(map(str, row))}"[:100] if isinstance(row, dict) and row else ""
        raise BadInput(place(), f'no text under the key "{config.text_key}"', f"; --text_key names another{keys}")
    if not isinstance(value, str):
        kind = {dict: "an object", list: "a list", bool: "true or false"}.get(type(value), "a number")
        raise BadInput(place(), f'under the key "{config.text_key}" is {kind}, not text', "; --text_key names another")
    if not value.isascii() or "\0" in value:
        wrong = "a NUL character in the text" if "\0" in value else ""
        try:
            value.encode()
        except UnicodeEncodeError:
            wrong = "half a surrogate pair in the text"
        if wrong and config.errors == "strict":
            raise BadInput(place(), wrong, "; --errors replace puts U+FFFD in its place")
        if wrong:
            value = re.sub("[\0\ud800-\udfff]", "\ufffd", value)
    for start in range(0, len(value) or 1, LONG_RECORD):
        yield Fragment(value[start : start + LONG_RECORD], start == 0, start + LONG_RECORD >= len(value))


def read_table(
    rows: Iterable[tuple[Callable[[], str], Any, str]], config: ReadingOptions, bad: Report | None
) -> Iterator[Fragment]:
    """The documents of rows (place, value, error). A row that cannot be read is noted in `bad`, or without it raises BadInput."""
    for place, row, error in rows:
        try:
            if error:  # the numbers in it are no part of the reason
                reason = re.split(r"[:;]|, not \d", error)[0]
                raise BadInput(place(), reason, error.removeprefix(reason))
            yield from document(text_under(row, config.text_key), place, config, row)
        except BadInput as problem:
            if bad is None:
                raise
            bad.note(f"left out, {problem.reason}", problem.place)


def read_json_lines(
    lines: Iterable[tuple[int, Fragment]], place_of: Callable[[int], str], check: bool
) -> Iterator[tuple[Callable[[], str], Any, str]]:
    """Lines of JSON as rows. Blank lines are skipped. `place_of` gives the place of a line by its number from 0.

    `check` says that lines may have faults, because they were decoded with surrogateescape.
    """
    line, too_long = "", False
    for number, (part, first, last) in lines:
        too_long = not first and (too_long or len(line) + len(part) > LONGEST_LINE)
        line = part if first else "" if too_long else line + part
        place = partial(place_of, number)
        if last and too_long:
            yield place, None, f"a line of more than {LONGEST_LINE:,} characters; make several documents of it"
        elif last and line.strip():
            wrong = fault(line) if check else ""
            row = None if wrong else json_row(line, "")
            yield place, row and row.value, row.error if row else wrong


def read_whole_table(span: Span, config: ReadingOptions) -> Iterator[tuple[Callable[[], str], Any, str]]:
    """The rows of a JSON array or of a CSV file."""
    for place, value, error, _ in read_rows(span.path, config.encoding, span.kind, config.errors):
        yield lambda place=place: place, value, error


def parquet_spans(path: str, span_bytes: int) -> list[Span]:
    """The spans of a .parquet file: its row groups, small ones together. A damaged file is one span, and reading it says so."""
    try:
        file = open_parquet(path)
    except BadInput:
        return [Span(path, "parquet", 0, -1, os.path.getsize(path))]
    with file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    spans, start = [], 0
    for stop in range(1, len(sizes) + 1):
        size = sum(sizes[start:stop])
        if size >= span_bytes or stop == len(sizes):
            spans.append(Span(path, "parquet", start, stop, size))
            start = stop
    return spans


def read_parquet(span: Span, config: ReadingOptions) -> Iterator[tuple[Callable[[], str], Any, str]]:
    """The rows of some row groups, with the column of the text alone."""
    import pyarrow

    path, column = span.path, config.text_key
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            column = column.partition(".")[0]
        if column not in names:
            raise BadInput(path, f"no column {config.text_key!r}", f" among {', '.join(names)}; --text_key names another")
        kind = file.schema_arrow.field(column).type
        for key in config.text_key.split(".")[1:] if column != config.text_key else []:
            if not pyarrow.types.is_struct(kind) or key not in [field.name for field in kind]:
                reason = f"no {key!r} inside column {column!r}"
                raise BadInput(path, reason, f", which holds {kind}; --text_key names another")
            kind = kind.field(key).type
        if str(kind) not in ("string", "large_string", "string_view"):
            raise BadInput(path, f"column {config.text_key!r} holds {kind}, not text", "; --text_key names another")
    for place, row, _, _ in parquet_rows(path, [column], range(span.start, span.stop), 64):
        yield lambda place=place: place, row if row else {config.text_key: None}, ""


def hub_dataset(name: str) -> Any:
    """hf://NAME[:CONFIG][:SPLIT] as a streaming dataset. A single word after the name is a configuration if one is called that.

    Raises UserError if the library is missing or the hub has no such dataset, MachineError if the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: reading from the hub needs the datasets library: pip install datasets") from None
    import httpx

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no line for each of its retries
    repository, *rest = name.removeprefix("hf://").split(":")
    try:
        if len(rest) == 1:
            rest = [*rest, "train"] if rest[0] in datasets.get_dataset_config_names(repository) else [None, *rest]
        config, split = rest or (None, "train")
        return datasets.load_dataset(repository, config, split=split, streaming=True)
    except (ConnectionError, TimeoutError, httpx.TransportError) as error:
        raise MachineError(f"{name}: the hub cannot be reached ({type(error).__name__}); is there a network?") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{name}: {error}") from None


def hub_rows(name: str, dataset: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a streaming dataset, numbered from 1. Raises MachineError if the hub goes away."""
    import httpx

    try:
        yield from enumerate(dataset, 1)
    except (ConnectionError, TimeoutError, httpx.TransportError) as error:
        raise MachineError(f"{name}: the hub cannot be reached any more ({type(error).__name__}); run it again") from None


def read_hub(span: Span, config: ReadingOptions) -> Iterator[tuple[Callable[[], str], Any, str]]:
    """The rows of one shard of a hub dataset."""
    name, dataset = span.path, hub_dataset(span.path)
    for number, row in hub_rows(name, dataset.shard(dataset.num_shards, span.start)):
        if number == 1 and text_under(row, config.text_key) is MISSING and config.text_key.partition(".")[0] not in row:
            raise UserError(f"{name}: no column {config.text_key!r} among {', '.join(row)}; --text_key names another")
        yield lambda number=number: f"{name} (shard {span.start}):row {number}", row, ""

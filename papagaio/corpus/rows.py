"""The rows of a table, whatever its format: JSON lines, a JSON array, several JSON objects, CSV, Parquet.

    for place, value, error, typed in read_rows("qa.csv"): ...       "qa.csv:2", {"question": "Who?", "answer": "She."}, "", False

The format is recognised by the content; of the name, only .csv and .tsv count, because prose has commas too.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from papagaio.corpus.spans import BadInput
from papagaio.corpus.text import blocks_of, check_encoding, detect_encoding
from papagaio.errors import UserError
from papagaio.files import GIVE_TEXT, parse_json, printable, refuse_pickle

RowFormat = Literal["jsonl", "json", "csv", "parquet"]
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
HEAD_BYTES = 2**16  # in which a format is recognised
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
DELIMITERS = (",", ";", "\t")


class Row(NamedTuple):
    """A row of a table."""

    place: str  # file:line, or file:row N
    value: Any
    error: str = ""  # why the row could not be read; its value is None then
    typed: bool = True  # False: every value is text, as in CSV


def uncompressed_suffix(path: str) -> str:
    """`a/B.JSON.gz` -> `.json`."""
    name = os.path.basename(path).lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return os.path.splitext(name)[1]


def detect_format(path: str, encoding: str = "utf-8") -> RowFormat | None:
    """The format of the table in a file; None if it looks like plain text."""
    head = b"".join(blocks_of(path, 0, HEAD_BYTES))
    if head.startswith(b"PAR1"):
        return "parquet"
    suffix = uncompressed_suffix(path)
    if suffix in (".csv", ".tsv"):
        return "csv"
    text = decode(head, "utf-8" if encoding == "auto" else encoding, "ignore").lstrip()
    if re.match(r"\[\s*[\[{\"\]]", text) and (suffix in (".json", ".jsonl", ".ndjson") or begins_with_object(text[1:])):
        return "json"  # and not a text that begins with [[a link]] or ["a quotation"]
    if re.match(r"\{\s*[\"}]", text):
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):  # cut off, or not JSON
            if len(head) >= HEAD_BYTES or suffix in (".json", ".jsonl", ".ndjson"):
                return "json" if re.match(r"\{\s*\n", text) else "jsonl"
            return None
        return "json" if "\n" in text[:end] or re.match(r"[ \t,]*\{", text[end:]) else "jsonl"  # several lines, several in one
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}.get(suffix)


def begins_with_object(text: str) -> bool:
    """Whether a text begins with a whole JSON object."""
    try:
        return isinstance(json.JSONDecoder().raw_decode(text.lstrip())[0], dict)
    except (ValueError, RecursionError):
        return False


def byte_order_mark(head: bytes) -> str | None:
    """The encoding that the first bytes of a file tell."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)


def read_rows(path: str, encoding: str = "utf-8", format: RowFormat | None = None, errors: str = "strict") -> Iterator[Row]:
    """The rows of a file, also those that cannot be read, with the reason. A file of unknown format is read as JSON lines.

    Raises UserError if the file as a whole cannot be read.
    """
    refuse_pickle(Path(path), GIVE_TEXT)
    try:
        format = format or detect_format(path, encoding) or "jsonl"
        if format == "parquet":
            yield from parquet_rows(path)
            return
        text = read_whole(path, encoding, errors)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a file of rows is needed") from None
    if format == "csv":
        yield from csv_rows(path, text)
    elif format == "json":
        yield from json_values(path, text)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield json_row(line, f"{path}:{number}")


def read_whole(path: str, encoding: str, errors: str = "strict") -> str:
    """The text of a file; a byte-order mark tells its encoding. Raises UserError naming the line of what is not text."""
    data = b"".join(blocks_of(path, 0, -1))
    if encoding == "auto":
        encoding = detect_encoding(path)
    try:
        text = decode(data, encoding, errors)
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        line = data.count(b"\n", 0, error.start) + 1
        name = encoding.upper() if encoding.lower().startswith("utf") else encoding
        cure = "--encoding names another, auto finds it"
        raise BadInput(f"{path}:{line}", f"not {name}", f" at byte {error.start - start} of the line; {cure}") from None
    if text[:1024].count("\0") * 3 > len(text[:1024]):
        raise BadInput(f"{path}:1", "every second byte is 0", ", as in UTF-16; --encoding utf-16-le or utf-16-be reads it")
    return text


def decode(data: bytes, encoding: str, errors: str) -> str:
    """Bytes as text; a byte-order mark tells another encoding. Raises UserError for an encoding that does not exist."""
    check_encoding(encoding)
    return data.decode(byte_order_mark(data) or encoding, errors)


def json_row(line: str, place: str) -> Row:
    """A line of JSON as a row."""
    try:
        return Row(place, parse_json(line, lambda: ""))
    except UserError as error:
        problem = str(error).removeprefix(": ")
        if re.search(r"[}\]]\s*,\s*$", line):
            problem += "; a comma follows the value, and JSON lines have none between them"
        elif re.search(r",\s*[}\]]", line):
            problem += ", perhaps a comma before a closing bracket"
        return Row(place, None, problem)


def json_values(path: str, text: str) -> Iterator[Row]:
    """The elements of a JSON array, or JSON values one after another, each with the line on which it begins."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    end = len(text) - len(text.lstrip())
    array = text.startswith("[", end)
    if array:
        try:
            parse_json(text, Path(path))
        except UserError as error:
            place, _, problem = str(error).partition(": ")
            if re.search(r",\s*[}\]]", text):
                problem += ", perhaps a comma before a closing bracket"
            yield Row(place, None, f"{problem}; nothing of this array can be read")
            return
        end += 1
    line, counted = 1, 0
    while (start := between.match(text, end).end()) < len(text) and not (array and text[start] == "]"):
        line, counted = line + text.count("\n", counted, start), start
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            problem = getattr(error, "msg", "nested too deep")
            yield Row(f"{path}:{getattr(error, 'lineno', line)}", None, f"not JSON: {problem}; nothing after it can be read")
            return
        yield Row(f"{path}:{line}", value)


def csv_rows(path: str, text: str) -> Iterator[Row]:
    """The rows of a table whose first line names the columns, which a comma, semicolon or tab separates."""
    csv.field_size_limit(2**24)
    header = re.sub('"[^"]*"', "", text.split("\n", 1)[0])
    delimiter = max(DELIMITERS, key=header.count)
    spaced = f"{delimiter} " in header  # `Question, Answer`: the cells have a blank before them, too
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    line = 1  # on which the row begins that is read next
    try:
        columns = next(reader, [])
        columns = [name if name not in columns[:i] else f"{name} (column {i + 1})" for i, name in enumerate(columns)]
        line = reader.line_num + 1
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(columns):
                yield Row(place, None, f"{len(columns)} columns are needed, as in the first line, not {len(cells)}", False)
            else:
                yield Row(place, dict(zip(columns, cells, strict=True)), "", False)
    except csv.Error as error:
        yield Row(f"{path}:{line}", None, f"not CSV: {error}; nothing after it can be read", False)


def open_parquet(path: str) -> Any:
    """A pyarrow.parquet.ParquetFile. Raises UserError if it is not one."""
    import pyarrow
    import pyarrow.parquet

    try:
        # pyarrow opens only names that are UTF-8 itself.
        source = path if path == printable(path) else open(path, "rb")  # noqa: SIM115 - closed with the ParquetFile
        return pyarrow.parquet.ParquetFile(source, buffer_size=2**20, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(path, "not a whole .parquet file", f": {error}") from None


def parquet_rows(
    path: str, columns: list[str] | None = None, groups: range | None = None, batch_size: int = 1024
) -> Iterator[Row]:
    """The rows of a .parquet file without the columns that hold nothing (null) in them; some columns, some row groups, or all."""
    import pyarrow

    with open_parquet(path) as file:
        groups = range(file.num_row_groups) if groups is None else groups
        number = before = sum(file.metadata.row_group(i).num_rows for i in range(groups.start))
        batches = file.iter_batches(batch_size, row_groups=groups, columns=columns)
        try:
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), before + 1):
                yield Row(f"{path}:row {number}", {key: value for key, value in row.items() if value is not None})
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path}:row {number + 1}", "damaged", f" near this row: {error}") from None

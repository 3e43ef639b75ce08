"""Documents in tables: .jsonl files, .parquet files, and datasets of the Hugging Face hub; the text is under one key."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from papagaio.corpus.options import ReadingOptions
from papagaio.corpus.spans import Fragment, Span
from papagaio.corpus.text import BLOCK_BYTES, LONG_RECORD, line_of
from papagaio.errors import MachineError, UserError
from papagaio.files import parse_json

LONGEST_LINE = 2**28  # characters of a line of JSON, which is parsed as a whole


def document(value: Any, place: Callable[[], str], config: ReadingOptions) -> Iterator[Fragment]:
    """The fragments of the document that a table holds. Raises UserError if it is not text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise UserError(f'{place()}: no text under the key "{config.text_key}"; --text_key names another')
    if not value.isascii() or "\0" in value:
        wrong = "a NUL character" if "\0" in value else ""
        try:
            value.encode()
        except UnicodeEncodeError:
            wrong = "half a surrogate pair"
        if wrong and config.errors == "strict":
            raise UserError(f"{place()}: {wrong} in the text; --errors replace puts U+FFFD in its place")
        if wrong:
            value = re.sub("[\0\ud800-\udfff]", "\ufffd", value)
    for start in range(0, len(value) or 1, LONG_RECORD):
        yield Fragment(value[start : start + LONG_RECORD], start == 0, start + LONG_RECORD >= len(value))


def read_json_lines(lines: Iterable[Fragment], path: str, start: int, config: ReadingOptions) -> Iterator[Fragment]:
    """The texts of JSON objects, one per line. Blank lines are skipped. `start` is the position of the first line in the file."""
    number, line = -1, ""

    def place() -> str:
        return f"{path}:{line_of(path, start) + number}"

    for part, first, last in lines:
        number += first
        line = part if first else line + part
        if len(line) > LONGEST_LINE:
            raise UserError(f"{place()}: a line of more than {LONGEST_LINE:,} characters; make several documents of it")
        if last and line.strip():
            value = parse_json(line, place)
            yield from document(value.get(config.text_key) if isinstance(value, dict) else None, place, config)


def parquet_spans(path: str, span_bytes: int) -> list[Span]:
    """The spans of a .parquet file: its row groups, small ones together."""
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    spans, start = [], 0
    for stop in range(1, len(sizes) + 1):
        size = sum(sizes[start:stop])
        if size >= span_bytes or stop == len(sizes):
            spans.append(Span(path, "parquet", start, stop, size))
            start = stop
    return spans


def open_parquet(path: str) -> Any:
    """A pyarrow.parquet.ParquetFile. Raises UserError if it is not one."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole .parquet file: {error}") from None


def read_parquet(span: Span, config: ReadingOptions) -> Iterator[Fragment]:
    """The rows of some row groups, one document each; a row without text (null) is an empty document."""
    import pyarrow

    path, key = span.path, config.text_key
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if key not in names:
            raise UserError(f"{path}: no column {key!r} among {', '.join(names)}; --text_key names another")
        if (kind := str(file.schema_arrow.field(key).type)) not in ("string", "large_string", "string_view"):
            raise UserError(f"{path}: column {key!r} holds {kind}, not text; --text_key names another")
        row = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
        try:
            for batch in file.iter_batches(64, row_groups=range(span.start, span.stop), columns=[key]):
                for value in batch.column(0):
                    row += 1
                    yield from document(value.as_py() or "", lambda row=row: f"{path}:row {row}", config)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged near row {row + 1}: {error}") from None


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


def read_hub(span: Span, config: ReadingOptions) -> Iterator[Fragment]:
    """The rows of one shard of a hub dataset, one document each."""
    import httpx

    name, key, dataset = span.path, config.text_key, hub_dataset(span.path)
    try:
        for row, example in enumerate(dataset.shard(dataset.num_shards, span.start), 1):
            if key not in example:
                raise UserError(f"{name}: no column {key!r} among {', '.join(example)}; --text_key names another")
            value, place = example[key], f"{name} (shard {span.start}):row {row}"
            yield from document("" if value is None else value, lambda place=place: place, config)
    except (ConnectionError, TimeoutError, httpx.TransportError) as error:
        raise MachineError(f"{name}: the hub cannot be reached any more ({type(error).__name__}); run it again") from None

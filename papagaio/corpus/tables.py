"""Documents in tables: a JSON object a line, .parquet files, datasets of the Hugging Face hub; their text under a key."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from papagaio.corpus.text import BLOCK_BYTES, Fragment, line_of
from papagaio.errors import MachineError, UserError
from papagaio.files import parse_json

if TYPE_CHECKING:
    from papagaio.corpus.reading import ReadingOptions, Span


def read_json_lines(lines: Iterable[Fragment], path: str, start: int, config: "ReadingOptions") -> Iterator[Fragment]:
    """The texts of JSON objects, one a line; blank lines are passed over."""
    number = 0

    def place() -> str:
        return f"{path}:{line_of(path, start) + number - 1}"

    lines = iter(lines)
    for line in lines:
        number += 1
        if not line.last:
            rest = chain([line.text], (f.text for f in until_last(lines)))
            for text, first, last in long_json(rest, config.text_key, place):
                yield Fragment(checked(text, place, config), first, last)
        elif line.text.strip():
            value = parse_json(line.text, place)
            text = value.get(config.text_key) if isinstance(value, dict) else None
            if not isinstance(text, str):
                raise UserError(no_text(place(), config.text_key))
            yield Fragment(checked(text, place, config), True, True)


def no_text(place: str, text_key: str) -> str:
    return f'{place}: no text under the key "{text_key}"; --text_key names another'


def until_last(fragments: Iterator[Fragment]) -> Iterator[Fragment]:
    """The fragments up to the end of the record that they are in."""
    for fragment in fragments:
        yield fragment
        if fragment.last:
            return


_SURROGATES = re.compile("[\ud800-\udfff]")


def checked(text: str, place: Callable[[], str], config: "ReadingOptions") -> str:
    """The text if it can be written as UTF-8 and holds no NUL; else with --errors replace U+FFFD in their places."""
    if text.isascii() and "\0" not in text:
        return text
    try:
        text.encode()
        wrong = "a NUL character" if "\0" in text else ""
    except UnicodeEncodeError:
        wrong = "half a surrogate pair"
    if wrong and config.errors == "strict":
        raise UserError(f"{place()}: {wrong} in the text; --errors replace puts U+FFFD in its place")
    return _SURROGATES.sub("\ufffd", text).replace("\0", "\ufffd") if wrong else text


# What a JSON string holds up to its closing quote, or up to an escape that may go on in the next block: a backslash and a
# character, \uXXXX, or two of these that make one character beyond U+FFFF (the first of them from \uD800 on).
_HIGH = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
_ANY = r"\\u[0-9a-fA-F]{4}"
_ESCAPE = rf"(?:{_HIGH}{_ANY}|{_HIGH}(?=[^\\]|\\[^u])|(?!{_HIGH}){_ANY}|\\[^u])"
_CONTENT = re.compile(rf'([^"\\]*+(?:{_ESCAPE}[^"\\]*+)*+)(")?')
_KEY = re.compile(r'("(?:[^"\\]|\\.)*")\s*:\s*\Z')
_LONGEST_REST = 2**24


def long_json(blocks: Iterable[str], text_key: str, place: Callable[[], str]) -> Iterator[Fragment]:
    """The text of one JSON object that is too long to be parsed at once, in fragments.

    What each string holds is taken out (and given, if it is the text), so that what remains of the line is small; that is
    parsed at the end, to see that it was JSON. Raises UserError where it was not, or has no text.
    """
    blocks = iter(blocks)
    buffer, remains, string, depth, found, wanted = "", "", None, 0, 0, False
    longest_key = 6 * len(text_key)  # every character may be written as \uXXXX
    for block in blocks:
        buffer += block
        while buffer:
            if string is None:  # between strings
                outside, quote, buffer = buffer.partition('"')
                depth += sum(map(outside.count, "{[")) - sum(map(outside.count, "}]"))
                remains += outside
                if quote:
                    key = _KEY.search(remains[-longest_key - 64 :]) if depth == 1 else None
                    wanted, string = key is not None and parse_json(key[1], place) == text_key, ""
                    found += wanted
                    if wanted:
                        yield Fragment("", True, False)
                continue
            content, closed = _CONTENT.match(buffer).groups()
            buffer = buffer[len(content) + bool(closed) :]
            if wanted:
                yield Fragment(parse_json(f'"{content}"', place), False, False)
            elif len(string) <= longest_key:
                string += content  # it may be a key
            if closed:
                remains += json.dumps("") if wanted or len(string) > longest_key else f'"{string}"'
                string = None
            elif len(buffer) < 12:
                break  # the rest of an escape comes with the next block
            else:
                raise UserError(f"{place()}: not JSON: {buffer[:6]!r} in a string")
        if len(remains) > _LONGEST_REST:
            raise UserError(f"{place()}: a line with more than {_LONGEST_REST:,} characters outside of texts")
    value = parse_json(remains, place)
    if not isinstance(value, dict) or found != 1:
        raise UserError(no_text(place(), text_key))
    yield Fragment("", False, True)


# Parquet files and datasets of the Hugging Face hub


def parquet_spans(path: str, span_bytes: int) -> list[tuple[int, int, int]]:
    """Row groups of a .parquet file: (first, one behind the last, bytes), several together where they are small."""
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    spans, start = [], 0
    for stop in range(1, len(sizes) + 1):
        if sum(sizes[start:stop]) >= span_bytes or stop == len(sizes):
            spans.append((start, stop, sum(sizes[start:stop])))
            start = stop
    return spans


def open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole .parquet file: {error}") from None


def read_parquet(path: str, start: int, stop: int, config: "ReadingOptions") -> Iterator[Fragment]:
    """The rows of row groups [start, stop), a document each; a row without text (null) is an empty one."""
    import pyarrow

    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if config.text_key not in names:
            raise UserError(f"{path}: no column {config.text_key!r} among {', '.join(names)}; --text_key names another")
        kind = file.schema_arrow.field(config.text_key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
            raise UserError(f"{path}: column {config.text_key!r} holds {kind}, not text; --text_key names another")
        row = sum(file.metadata.row_group(i).num_rows for i in range(start))
        try:
            for batch in file.iter_batches(64, row_groups=range(start, stop), columns=[config.text_key]):
                for value in batch.column(0):
                    row += 1
                    yield from one_text(value.as_py(), f"{path}:row {row}", config)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged near row {row + 1}: {error}") from None


def one_text(value: Any, place: str, config: "ReadingOptions") -> Iterator[Fragment]:
    if value is not None and not isinstance(value, str):
        raise UserError(no_text(place, config.text_key))
    yield Fragment(checked(value or "", lambda: place, config), True, True)


def hub_dataset(name: str) -> Any:
    """hf://NAME[:CONFIG][:SPLIT] as a streaming dataset; a single word after the name is a configuration if there is one such.

    Raises UserError where the library is missing or the hub has no such dataset, MachineError where it cannot be reached.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: reading from the hub needs the datasets library: pip install datasets") from None
    import httpx

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # not a line for each of its retries
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


def hub_spans(name: str) -> list["Span"]:
    from papagaio.corpus.reading import Span

    return [Span(name, "hub", i, i + 1, 0) for i in range(hub_dataset(name).num_shards)]


def read_hub(name: str, shard: int, config: "ReadingOptions") -> Iterator[Fragment]:
    """The rows of one shard of a hub dataset, a document each."""
    import httpx

    dataset = hub_dataset(name)
    try:
        for row, example in enumerate(dataset.shard(dataset.num_shards, shard), 1):
            if config.text_key not in example:
                raise UserError(f"{name}: no column {config.text_key!r} among {', '.join(example)}; --text_key names another")
            yield from one_text(example[config.text_key], f"{name} (shard {shard}):row {row}", config)
    except (ConnectionError, TimeoutError, httpx.TransportError) as error:
        raise MachineError(f"{name}: the hub cannot be reached any more ({type(error).__name__}); run it again") from None

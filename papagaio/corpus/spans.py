"""What all readers share: the options of reading, spans (parts of the input) and fragments (parts of a document)."""

from functools import partial
from typing import Literal, NamedTuple

from papagaio.options import Options, option

LEAF_BYTES = 2**20  # a text file that is one document is cut into leaves of this size, each hashed and encoded by itself
_reading = partial(option, group="Reading")


class ReadingOptions(Options):
    """How input files are read."""

    format: Literal["auto", "text", "jsonl", "parquet"] = _reading("auto", "format of the files; auto: by their names")
    text_key: str = _reading("text", "key or column that holds the text in .jsonl and .parquet files")
    split_documents: str = _reading(
        "none", "split text files into documents: none, blank_line, or the TEXT that stands between them", max_length=256
    )
    encoding: str = _reading("utf-8", "encoding of text and .jsonl files")
    errors: Literal["strict", "replace"] = _reading("strict", "what cannot be decoded stops the run, or becomes U+FFFD")


class Span(NamedTuple):
    """A part of the input: bytes [start, stop) of a file, row groups of a .parquet file, or a shard of a hub dataset.

    `stop` is -1 for a file that can only be read as a whole. `size` is in bytes, 0 if unknown.
    """

    path: str
    kind: Literal["text", "jsonl", "parquet", "hub"]
    start: int
    stop: int
    size: int


class Fragment(NamedTuple):
    """A part of a document: `first` is True if the document begins with it, `last` if the document ends with it."""

    text: str
    first: bool
    last: bool

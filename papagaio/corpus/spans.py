"""What all readers share: spans (parts of the input) and fragments (parts of a document)."""

from typing import Literal, NamedTuple

from papagaio.errors import UserError
from papagaio.files import printable

LEAF_BYTES = 2**20  # a text file that is one document is cut into leaves of this size, each hashed and encoded by itself


class Span(NamedTuple):
    """A part of the input: bytes [start, stop) of a file, row groups of a .parquet file, or a shard of a hub dataset.

    `stop` is -1 for a file that can only be read as a whole. `size` is in bytes, 0 if unknown.
    """

    path: str
    kind: Literal["text", "jsonl", "json", "csv", "parquet", "hub"]
    start: int
    stop: int
    size: int


class Fragment(NamedTuple):
    """A part of a document: `first` is True if the document begins with it, `last` if the document ends with it."""

    text: str
    first: bool
    last: bool


class BadInput(UserError):
    """A file or a row that cannot be read. `reason` is the same for all that have the same fault."""

    def __init__(self, place: str, reason: str, detail: str = "") -> None:
        super().__init__(printable(place), reason, detail)  # all of them, so that a worker process can send it
        self.place, self.reason, _ = self.args

    def __str__(self) -> str:
        return "{}: {}{}".format(*self.args)

"""Assembles pieces into the shards of a dataset: removes duplicates, splits the documents, writes the shards.

Duplicates and the split depend on all documents. They are decided from the indexes alone, when all pieces are there.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from papagaio.corpus.dataset import SPLITS, ShardWriter, Split, token_dtype
from papagaio.corpus.encoding import INDEX, piece_paths
from papagaio.corpus.options import PrepareOptions
from papagaio.corpus.split import combined_hash, held_out_below
from papagaio.errors import UserError
from papagaio.tokenizer import Tokenizer

IN_MEMORY = 2**22  # tokens or documents at a time


class Documents(NamedTuple):
    """Some documents in order: (N,) arrays of their hashes, bytes and tokens (0 tokens: an empty document)."""

    digest: NDArray[np.uint64]
    bytes: NDArray[np.uint64]
    tokens: NDArray[np.uint64]


class Pieces:
    """All pieces of a preparation, read as one stream of tokens and one list of documents."""

    def __init__(self, work: Path, count: int, dtype: np.dtype) -> None:
        self.paths = [piece_paths(work, number) for number in range(count)]
        self.dtype = dtype
        sizes = [int(read_index(index)["tokens"].sum()) for _, index in self.paths]
        self.ends = np.cumsum([0, *sizes])  # tokens before each piece, and all tokens

    def documents(self) -> Iterator[Documents]:
        """The documents, one piece at a time. A document that continues in the next piece comes with that one."""
        rest = np.empty(0, INDEX)
        for _, path in self.paths:
            entries = np.concatenate([rest, read_index(path)])
            ends = np.flatnonzero(entries["last"])
            if not len(ends):
                rest = entries
                continue
            entries, rest = entries[: ends[-1] + 1], entries[ends[-1] + 1 :]
            starts = np.concatenate([[0], ends[:-1] + 1])
            digest = entries["digest"][ends]
            for i in np.flatnonzero(ends > starts):
                digest[i] = combined_hash(entries["digest"][starts[i] : ends[i] + 1].tolist())
            yield Documents(digest, *(np.add.reduceat(entries[name], starts) for name in ("bytes", "tokens")))

    def tokens(self, start: int, stop: int) -> Iterator[NDArray[np.integer]]:
        """Tokens [start, stop) of the stream, up to IN_MEMORY at a time."""
        while start < stop:
            piece = int(np.searchsorted(self.ends, start, side="right")) - 1
            first, end = int(self.ends[piece]), int(self.ends[piece + 1])
            count = min(IN_MEMORY, min(stop, end) - start)
            yield np.fromfile(self.paths[piece][0], self.dtype, count, offset=(start - first) * self.dtype.itemsize)
            start += count

    def discard(self, position: int) -> None:
        """Delete the tokens of the pieces that end before a position of the stream."""
        for path, _ in self.paths[: int(np.searchsorted(self.ends, position, side="right")) - 1]:
            path.unlink(missing_ok=True)


def read_index(path: Path) -> NDArray[np.void]:
    """The index of a piece. Raises UserError if it is damaged."""
    try:
        with path.open("rb") as file:
            found = np.lib.format.read_array(file)  # reads no pickles
        if found.dtype != INDEX or found.ndim != 1:
            raise ValueError(found.dtype)
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: damaged ({error!r}); delete it, and the same command makes it again") from None
    return found


class Selection:
    """Which documents go into the dataset, and into which split.

    `empty`, `duplicate` and `dropped` are boolean arrays (N,) over all documents; of two equal documents the first is kept. Of
    those that are not dropped, the ones with a hash below `limit` go to the val split. `limit` is 0 for a single document, which
    is cut near its end. Raises UserError if all documents are empty.
    """

    def __init__(self, documents: Callable[[], Iterator[Documents]], config: PrepareOptions) -> None:
        self.documents = documents
        self.empty = np.concatenate([np.zeros(0, bool), *(tokens == 0 for _, _, tokens in documents())])
        self.duplicate = ~self.empty  # until the first of equal documents is found
        extremes: set[int] = set()  # the two smallest hashes and the largest of each pass: all that held_out_below needs
        passes = 1 + len(self.empty) // IN_MEMORY  # each compares the hashes with the same remainder
        for remainder in range(passes):
            digests, places, start = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
            for digest, _, tokens in documents():
                chosen = np.flatnonzero((tokens > 0) & (digest % np.uint64(passes) == remainder))
                digests.append(digest[chosen])
                places.append(start + chosen)
                start += len(digest)
            distinct, first = np.unique(np.concatenate(digests), return_index=True)
            self.duplicate[np.concatenate(places)[first]] = False
            extremes |= {*distinct[:2].tolist(), *distinct[-1:].tolist()}
        self.limit = held_out_below(extremes, config.val_fraction)
        self.keeps_duplicates = config.keep_duplicates and self.limit > 0  # a single document is not repeated
        self.dropped = self.empty if self.keeps_duplicates else self.empty | self.duplicate
        if self.dropped.all():
            raise UserError(f"{', '.join(config.input)}: no text in there")

    def of_split(self, split: str) -> Iterator[tuple[Documents, NDArray[np.bool_], NDArray[np.bool_]]]:
        """All documents, some at a time, and which of them are written to a split, and which are duplicates in it."""
        start = 0
        for documents in self.documents():
            here = slice(start, start + len(documents.digest))
            start = here.stop
            inside = (documents.digest < np.uint64(self.limit)) == (split == "val")
            yield documents, inside & ~self.dropped[here], inside & self.duplicate[here]


def assemble(work: Path, n_pieces: int, tokenizer: Tokenizer, config: PrepareOptions) -> dict[str, Any]:
    """Write the shards of both splits into the work directory, and return the manifest's entries about them.

    Pieces are deleted as soon as they are in complete train shards. Raises UserError if there is no text, or if a single document
    is too short to be cut.
    """
    pieces = Pieces(work, n_pieces, token_dtype(tokenizer))
    selection = Selection(pieces.documents, config)
    counts = {split: count_documents(selection, split) for split in SPLITS}
    ranges: dict[str, Iterable[tuple[int, int]]] = {split: token_ranges(selection, split) for split in SPLITS}
    if not selection.limit:
        ranges, counts = cut_document(pieces, counts["train"], *ranges["train"], tokenizer, config.val_fraction)
    splits = {}
    for split in ("val", "train"):  # train comes last, so that pieces can be deleted meanwhile
        writer = ShardWriter(work, split, pieces.dtype, counts[split].tokens, config.shard_tokens)
        skip = writer.ready
        for start, stop in ranges[split]:
            done = min(skip, stop - start)
            skip -= done
            for part in pieces.tokens(start + done, stop):
                if writer.write(part) and split == "train" and selection.limit:
                    pieces.discard(start)
        assert not writer.left, "tokens are missing"
        counts[split].bytes_per_token = counts[split].bytes / max(1, counts[split].tokens)
        splits[split] = counts[split].model_dump() | {"shards": writer.done}
    return {"empty_documents": int(selection.empty.sum()), "splits": {split: splits[split] for split in SPLITS}}


def count_documents(selection: Selection, split: str) -> Split:
    count = Split(documents=0, tokens=0, bytes=0, duplicates_kept=selection.keeps_duplicates, shards=[])
    for documents, kept, duplicate in selection.of_split(split):
        tokens = documents.tokens[kept]
        count.documents += len(tokens)
        count.tokens += int(tokens.sum())
        count.bytes += int(documents.bytes[kept].sum())
        count.duplicates += int(duplicate.sum())
        count.longest_document = max(count.longest_document, int(tokens.max(initial=0)))
    return count


def token_ranges(selection: Selection, split: str) -> Iterator[tuple[int, int]]:
    """The ranges [start, stop) of the stream of tokens that make up a split, in order."""
    position = 0
    for documents, kept, _ in selection.of_split(split):
        bounds = position + np.append(0, np.cumsum(documents.tokens.astype(np.int64)))
        edges = np.flatnonzero(np.diff(kept.astype(np.int8), prepend=0, append=0))
        yield from bounds[edges].reshape(-1, 2).tolist()
        position = int(bounds[-1])


def cut_document(
    pieces: Pieces, whole: Split, span: tuple[int, int], tokenizer: Tokenizer, val_fraction: float
) -> tuple[dict[str, Iterable[tuple[int, int]]], dict[str, Split]]:
    """Token ranges and counts of both splits of a single document, cut between two tokens and between two characters.

    Each part begins with the document's first token, <|endoftext|>.
    """
    start, stop = span
    target = int(whole.bytes * (1 - val_fraction))
    lengths = np.array(tokenizer.byte_lengths)
    # Tokens that begin with the first byte of a character.
    begins = np.array([n == 0 or tokenizer.token_bytes(i)[0] & 0xC0 != 0x80 for i, n in enumerate(lengths.tolist())])
    position, n_bytes, place, train_bytes = start, 0, start, 0
    for part in pieces.tokens(start, stop):
        before = n_bytes + np.cumsum(lengths[part]) - lengths[part]
        if len(candidates := np.flatnonzero(begins[part] & (before <= target))):
            place, train_bytes = position + int(candidates[-1]), int(before[candidates[-1]])
        position, n_bytes = position + len(part), int(before[-1] + lengths[part[-1]])
        if n_bytes > target:
            break
    if place <= start + 1:
        raise UserError(f"too short a text to hold out {val_fraction:.3g} of it for validation")
    n_train, n_val = place - start, 1 + stop - place
    train = whole.model_copy(update={"tokens": n_train, "bytes": train_bytes, "longest_document": n_train})
    val = Split(documents=1, tokens=n_val, bytes=whole.bytes - train_bytes, longest_document=n_val, shards=[])
    return {"train": [(start, place)], "val": [(start, start + 1), (place, stop)]}, {"train": train, "val": val}

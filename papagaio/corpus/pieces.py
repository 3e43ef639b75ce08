"""From documents to a dataset: workers encode spans into pieces, and the pieces are assembled into shards.

A piece is two files: tokens as they follow each other, and an index with an entry for each document (or leaf of one), which
is written last and makes the piece whole. Duplicates, splits and shards depend on all documents, so they are decided when all
pieces are there, from the indexes alone. Whoever made the pieces, in whatever order and however often they were interrupted:
the shards come out the same, byte for byte.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from papagaio.corpus.dataset import SPLITS, ShardWriter, token_dtype
from papagaio.corpus.reading import LEAF_BYTES, ReadingOptions, Span, inside_document, leaves, read
from papagaio.corpus.text import blocks_of
from papagaio.errors import UserError
from papagaio.files import sync_and_close
from papagaio.tokenizer import END_OF_TEXT, Tokenizer, stretches

INDEX = np.dtype([("digest", "<u8"), ("bytes", "<u8"), ("tokens", "<u8"), ("first", "?"), ("last", "?")])
CHUNK = 2**22  # tokens or documents in memory at a time


class Digest:
    """64-bit hash of a text, from the hashes of its leaves of LEAF_BYTES; a shorter text is a leaf itself.

    It tells duplicates and the split. Among a hundred million documents, two different ones share a hash with a probability of
    0.0003 (birthday bound).
    """

    def __init__(self) -> None:
        self.leaves: list[int] = []
        self.hash, self.room = hashlib.blake2b(digest_size=8), LEAF_BYTES

    def update(self, data: bytes) -> None:
        while len(data) > self.room:
            self.hash.update(data[: self.room])
            data = data[self.room :]
            self.leaves.append(int.from_bytes(self.hash.digest(), "big"))
            self.hash, self.room = hashlib.blake2b(digest_size=8), LEAF_BYTES
        self.hash.update(data)
        self.room -= len(data)

    def value(self) -> int:
        return combined([*self.leaves, int.from_bytes(self.hash.digest(), "big")])


def combined(leaves_: list[int]) -> int:
    """The digest of a text from those of its leaves."""
    if len(leaves_) == 1:
        return leaves_[0]
    joined = b"".join(leaf.to_bytes(8, "big") for leaf in leaves_)
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def span_digest(span: Span) -> int:
    """The hash of a leaf that is a part of a file."""
    digest = Digest()
    for block in blocks_of(span.path, span.start, span.stop):
        digest.update(block)
    return digest.value()


# Making pieces


class PieceWriter:
    """Encodes spans into the piece `number`. Nothing of more than some megabytes is held in memory."""

    def __init__(self, directory: Path, number: int, tokenizer: Tokenizer) -> None:
        self.tokens_path, self.index_path = piece_paths(directory, number)
        self.tokenizer, self.dtype = tokenizer, token_dtype(tokenizer)
        self.start = np.array([tokenizer.special[END_OF_TEXT]], self.dtype)
        self.index: list[tuple[int, int, int, bool, bool]] = []
        self.file = self.tokens_path.with_suffix(".tmp").open("wb")

    def add(self, span: Span, config: ReadingOptions) -> None:
        """Encode the documents of a span. Raises UserError for what cannot be read or encoded, naming where."""
        self.place = span.path
        for leaf in leaves(span, config):
            if inside_document(leaf, config):
                fragments = list(read(leaf, config))
                self._begin(fragments[0].first)
                self._encode("".join(fragment.text for fragment in fragments))
                self._end(fragments[-1].last, span_digest(leaf))
                continue
            for text, first, last in read(leaf, config):
                if first:
                    self._begin(first=True)
                self._encode(text)
                if last:
                    self._end(last=True)

    def _begin(self, first: bool) -> None:
        self.first, self.offset, self.blank = first, self.file.tell(), True
        self.digest, self.n_bytes, self.carry = Digest(), 0, ""
        if first:
            self.file.write(self.start.tobytes())

    def _encode(self, text: str) -> None:
        """Encode what is complete of the text so far; the last stretch may change with what follows."""
        data = text.encode()
        self.digest.update(data)
        self.n_bytes += len(data)
        self.blank = self.blank and not text.strip()
        *whole, self.carry = stretches(self.carry + text) or [""]
        for stretch in whole:
            self._write(stretch)

    def _end(self, last: bool, digest: int | None = None) -> None:
        self._write(self.carry)
        n_tokens = (self.file.tell() - self.offset) // self.dtype.itemsize
        if self.blank and self.first and last:  # an empty document: no tokens
            n_tokens = 0
            self.file.seek(self.offset)
            self.file.truncate()
        self.index.append((self.digest.value() if digest is None else digest, self.n_bytes, n_tokens, self.first, last))

    def _write(self, text: str) -> None:
        try:
            ids = self.tokenizer.encode_array(text)
        except UserError as error:
            raise UserError(f"{self.place}: {error}") from None
        assert ids.size == 0 or int(ids.max()) < self.tokenizer.vocab_size, "a token id would wrap"
        self.file.write(ids.astype(self.dtype).tobytes())

    def finish(self) -> None:
        sync_and_close(self.file)
        Path(self.file.name).rename(self.tokens_path)
        with self.index_path.with_suffix(".tmp").open("wb") as file:
            np.save(file, np.array(self.index, INDEX), allow_pickle=False)
            sync_and_close(file)
        self.index_path.with_suffix(".tmp").rename(self.index_path)


def piece_paths(directory: Path, number: int) -> tuple[Path, Path]:
    """The files of a piece: tokens, and index."""
    return directory / f"{number:06d}.tokens", directory / f"{number:06d}.npy"


def read_index(path: Path) -> NDArray[np.void]:
    """What a piece's index says of its documents. Raises UserError where it is damaged."""
    try:
        with path.open("rb") as file:
            found = np.lib.format.read_array(file)  # it reads no pickles
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: damaged ({error!r}); delete it, and the same command makes it anew") from None
    if found.dtype != INDEX or found.ndim != 1:
        raise UserError(f"{path}: damaged ({found.dtype}); delete it, and the same command makes it anew")
    return found


# Assembling them


class Documents(NamedTuple):
    """Some documents in order: (N,) arrays of their digests, bytes and tokens (0 tokens: empty)."""

    digest: NDArray[np.uint64]
    bytes: NDArray[np.uint64]
    tokens: NDArray[np.uint64]


class Pieces:
    """All pieces of a preparation, read as one stream of tokens and one list of documents."""

    def __init__(self, directory: Path, count: int, dtype: np.dtype) -> None:
        self.paths = [piece_paths(directory, number) for number in range(count)]
        self.dtype = dtype
        sizes = [int(read_index(index)["tokens"].sum()) for _, index in self.paths]
        self.ends = np.cumsum([0, *sizes])  # tokens before each piece, and all
        self.discarded = 0

    def documents(self) -> Iterator[Documents]:
        """The documents of a piece at a time; one that goes on in the next is given with that."""
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
                digest[i] = combined(entries["digest"][starts[i] : ends[i] + 1].tolist())
            counts = (np.add.reduceat(entries[name], starts) for name in ("bytes", "tokens"))
            yield Documents(digest, *counts)

    def tokens(self, start: int, stop: int) -> Iterator[NDArray[np.integer]]:
        """Tokens [start, stop) of the stream, some at a time."""
        piece = int(np.searchsorted(self.ends, start, side="right")) - 1
        while start < stop:
            first, end = int(self.ends[piece]), int(self.ends[piece + 1])
            while start < min(stop, end):
                count = min(CHUNK, min(stop, end) - start)
                offset = (start - first) * self.dtype.itemsize
                yield np.fromfile(self.paths[piece][0], self.dtype, count, offset=offset)
                start += count
            piece += 1

    def discard(self, position: int) -> None:
        """Delete the tokens of pieces that end before a position of the stream."""
        while self.discarded < len(self.paths) and self.ends[self.discarded + 1] <= position:
            self.paths[self.discarded][0].unlink(missing_ok=True)
            self.discarded += 1


class Fate:
    """What becomes of each document: `dropped` (N,) marks empty ones and duplicates; of the rest, those whose digest is below
    `held_out` go to val. With a single document `held_out` is None: that one is cut near its end.

    A document's split depends on its digest alone, so that adding others moves none. Only where that would leave a split
    without any, the document with the smallest digest is held out.
    """

    def __init__(self, documents: Callable[[], Iterator[Documents]], val_fraction: float, keep_duplicates: bool) -> None:
        self.empty = np.concatenate([np.zeros(0, bool), *(tokens == 0 for _, _, tokens in documents())])
        self.duplicate = np.zeros(len(self.empty), bool)
        smallest: set[int] = set()  # the two smallest digests, and the largest
        largest = 0
        passes = 1 + len(self.empty) // CHUNK  # as many as it takes to hold the digests of one in memory
        for number in range(passes):
            digests, places, start = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
            for digest, _, tokens in documents():
                chosen = np.flatnonzero((tokens > 0) & (digest % np.uint64(passes) == number))
                digests.append(digest[chosen])
                places.append(start + chosen)
                start += len(digest)
            found, place = np.concatenate(digests), np.concatenate(places)
            order = np.argsort(found, kind="stable")  # of equal ones the first stays first
            self.duplicate[place[order[1:][found[order][1:] == found[order][:-1]]]] = True
            smallest = set(sorted(smallest | set(found[order][~self.duplicate[place[order]]][:2].tolist()))[:2])
            largest = max(largest, *found[order[-1:]].tolist(), 0)
        self.keeps_duplicates = keep_duplicates
        if len(smallest) < 2:  # a single document, in one or more copies
            self.held_out, self.keeps_duplicates = None, False
        else:
            threshold = int(val_fraction * 2**64)
            self.held_out = threshold if min(smallest) < threshold <= largest else max(smallest)
        self.dropped = self.empty if self.keeps_duplicates else self.empty | self.duplicate

    def splits(self, digest: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """True for the documents that are held out."""
        return digest < np.uint64(self.held_out or 0)


@dataclass
class Counts:
    """What the manifest says of a split. The longest document is in tokens."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    duplicates: int = 0
    duplicates_kept: bool = False
    longest_document: int = 0


def assemble(directory: Path, pieces: Pieces, fate: Fate, tokenizer: Tokenizer, shard_tokens: int, cut: float) -> dict[str, Any]:
    """Write the shards of both splits into a directory, and return what the manifest says of them.

    Pieces are deleted as they go into whole shards. `cut` is where a single document is cut, as a part of its bytes. Raises
    UserError where that leaves nothing on one side.
    """
    counts = {split: Counts(duplicates_kept=fate.keeps_duplicates) for split in SPLITS}
    runs = {split: partial(_runs, pieces, fate, split) for split in SPLITS}
    number = 0
    for digest, n_bytes, tokens in pieces.documents():
        here = slice(number, number + len(digest))
        number += len(digest)
        for split, held_out in (("train", False), ("val", True)):
            inside = fate.splits(digest) == held_out
            kept = inside & ~fate.dropped[here]
            count = counts[split]
            count.documents += int(kept.sum())
            count.tokens += int(tokens[kept].sum())
            count.bytes += int(n_bytes[kept].sum())
            count.duplicates += int((inside & fate.duplicate[here]).sum())
            count.longest_document = max(count.longest_document, int(tokens[kept].max(initial=0)))
    if fate.held_out is None:
        runs, counts = _cut_document(pieces, counts["train"], next(_runs(pieces, fate, "train")), tokenizer, cut)

    manifest = {}
    for split in ("val", "train"):  # so that pieces can be deleted on the second way through them
        writer = ShardWriter(directory, split, pieces.dtype, counts[split].tokens, shard_tokens)
        skip = writer.ready
        for start, stop in runs[split]():
            done = min(skip, stop - start)
            skip -= done
            for part in pieces.tokens(start + done, stop):
                if writer.write(part) and split == "train" and fate.held_out is not None:
                    pieces.discard(start)
        assert not writer.left, "tokens are missing"
        found = counts[split]
        manifest[split] = asdict(found) | {"bytes_per_token": found.bytes / max(1, found.tokens), "shards": writer.done}
    return {split: manifest[split] for split in SPLITS}


def _runs(pieces: Pieces, fate: Fate, split: str) -> Iterator[tuple[int, int]]:
    """The ranges of the stream of tokens that make up a split, in order."""
    position = number = 0
    for digest, _, tokens in pieces.documents():
        chosen = ~fate.dropped[number : number + len(digest)] & (fate.splits(digest) == (split == "val"))
        ends = position + np.cumsum(tokens.astype(np.int64))
        edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
        for first, behind in edges.reshape(-1, 2).tolist():
            yield int(ends[first] - int(tokens[first])), int(ends[behind - 1])
        position, number = int(ends[-1]), number + len(digest)


def _cut_document(
    pieces: Pieces, count: Counts, run: tuple[int, int], tokenizer: Tokenizer, cut: float
) -> tuple[dict[str, Callable], dict[str, Counts]]:
    """Runs and counts of both splits of a single document: cut between two tokens, and characters, at `cut` of its bytes.

    Each part begins with the document's first token, <|endoftext|>.
    """
    start, stop = run
    target = int(count.bytes * cut)
    lengths = np.array(tokenizer.byte_lengths)
    place, n_bytes = start, 0
    for part in pieces.tokens(start, stop):
        sums = n_bytes + np.cumsum(lengths[part])
        within = int(np.searchsorted(sums, target, side="right"))
        place += within
        n_bytes = int(sums[within - 1]) if within else n_bytes
        if within < len(part):
            break
    while place > start + 1:  # no character may fall apart
        token = int(next(pieces.tokens(place, place + 1))[0]) if place < stop else None
        if token is None or tokenizer.token_bytes(token)[0] & 0xC0 != 0x80:
            break
        place -= 1
        n_bytes -= int(lengths[next(pieces.tokens(place, place + 1))[0]])
    if place <= start + 1 or place >= stop:
        raise UserError(f"too short a text to hold out {1 - cut:.3g} of it for validation")
    train = replace(count, tokens=place - start, bytes=n_bytes, longest_document=place - start)
    rest = 1 + stop - place
    val = Counts(documents=1, tokens=rest, bytes=count.bytes - n_bytes, longest_document=rest)
    return {"train": lambda: [(start, place)], "val": lambda: [(start, start + 1), (place, stop)]}, {"train": train, "val": val}

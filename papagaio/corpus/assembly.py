"""Assembles pieces into the shards of a dataset: removes duplicates, splits the documents, writes the shards.

Duplicates and the split depend on all documents. They are decided from the indexes alone, when all pieces are there.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from papagaio.corpus.dataset import SPLITS, ShardWriter, Split, token_dtype
from papagaio.corpus.encoding import INDEX, piece_paths
from papagaio.corpus.options import PrepareOptions
from papagaio.corpus.split import combined_hash, divide
from papagaio.errors import UserError
from papagaio.files import parse_json, write_whole
from papagaio.tokenizer import Tokenizer

IN_MEMORY = 2**22  # tokens or documents at a time
LARGEST_SHARE = 0.25  # of the validation split that one document should make up at most


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

    `empty`, `duplicate` and `dropped` are boolean arrays (N,) over all documents; of equal documents the first is kept. The
    documents that are not dropped are divided as papagaio/corpus/split.py says, by `limit` and `cut_from`. If `n_val` is given
    (--val_input), the first `n_val` documents are the val split instead, the others are train, and `leaked` marks those of them
    that are equal to one of the val split and are therefore dropped.

    `corpus_bytes` is given if the documents are a sample of a larger corpus. Raises UserError if all documents are empty.
    """

    def __init__(
        self,
        documents: Callable[[], Iterator[Documents]],
        config: PrepareOptions,
        n_val: int | None = None,
        corpus_bytes: int = 0,
    ) -> None:
        self.documents, self.n_val = documents, n_val
        self.empty = np.concatenate([np.zeros(0, bool), *(tokens == 0 for _, _, tokens in documents())])
        self.duplicate = ~self.empty  # until the first of equal documents is found
        self.leaked = np.zeros(len(self.empty), bool)
        passes = 1 + len(self.empty) // IN_MEMORY  # each compares the hashes with the same remainder
        for remainder in range(passes):
            found, positions, start = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
            for digest, _, tokens in documents():
                chosen = np.flatnonzero((tokens > 0) & (digest % np.uint64(passes) == remainder))
                found.append(digest[chosen])
                positions.append(start + chosen)
                start += len(digest)
            digest, place = np.concatenate(found), np.concatenate(positions)
            _, first = np.unique(digest, return_index=True)
            self.duplicate[place[first]] = False
            if n_val:
                self.leaked[place] = np.isin(digest, digest[place < n_val]) & (place >= n_val)
        self.keeps_duplicates = config.keep_duplicates
        self.dropped = self.empty | (self.leaked if config.keep_duplicates else self.duplicate)
        for kept, names in (
            (~self.dropped[: n_val or 0], config.val_input),
            (~self.empty[n_val or 0 :], config.input),
        ):
            if names and not kept.any():
                raise UserError(f"{', '.join(names)}: no text in there")
        if self.dropped[n_val or 0 :].all():
            raise UserError("all documents of --input are in --val_input too, so that none is left to train on")
        self.limit, self.cut_from = (0, 2**63) if n_val is not None else divide(self._kept, config.val_fraction, corpus_bytes)

    def _kept(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
        """The hashes and bytes of the documents that are not dropped, some at a time."""
        start = 0
        for digest, n_bytes, _ in self.documents():
            kept = ~self.dropped[start : start + len(digest)]
            start += len(digest)
            yield digest[kept], n_bytes[kept]

    def of_split(self, split: str) -> Iterator[tuple[Documents, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]]:
        """All documents, some at a time, with masks (N,): which belong to a split as a whole, which to both because they are cut,
        and which are duplicates in it (those of a cut document count in train)."""
        start = 0
        for documents in self.documents():
            here = slice(start, start + len(documents.digest))
            cut = documents.bytes >= np.uint64(self.cut_from)
            held = documents.digest < np.uint64(self.limit)
            if self.n_val is not None:
                held = np.arange(here.start, here.stop) < self.n_val
            inside, kept = (held == (split == "val")) & ~cut, ~self.dropped[here]
            duplicate = self.duplicate[here] & ~self.leaked[here] & (inside | (cut & (split == "train")))
            yield documents, inside & kept, cut & kept, duplicate
            start = here.stop


class Cut(NamedTuple):
    """Where a document is cut: its first token in the stream, the first token of its held-out end, the bytes before that."""

    start: int
    place: int
    train_bytes: int


def assemble(work: Path, n_pieces: int, tokenizer: Tokenizer, config: PrepareOptions, val_pieces: int = 0) -> dict[str, Any]:
    """Write the shards of both splits into the work directory, and return the manifest's entries about them.

    The first `val_pieces` pieces are the text of --val_input. Pieces are deleted as soon as they are in complete train shards.
    Raises UserError if there is no text, or if a single document is too short to be cut.
    """
    pieces = Pieces(work, n_pieces, token_dtype(tokenizer))
    n_val = sum(int(read_index(index)["last"].sum()) for _, index in pieces.paths[:val_pieces]) if config.val_input else None
    selection = Selection(pieces.documents, config, n_val)
    cuts = cut_documents(work, pieces, selection, tokenizer, config.val_fraction)
    counts = {split: count_documents(selection, split, cuts) for split in SPLITS}
    for line in doubts(selection, counts, config):
        print(f"warning: {line}", file=sys.stderr)
    splits = {}
    for split in ("val", "train"):  # train comes last, so that pieces can be deleted meanwhile
        writer = ShardWriter(work, split, pieces.dtype, counts[split].tokens, config.shard_tokens)
        skip = writer.ready
        for start, stop in token_ranges(selection, split, cuts):
            done = min(skip, stop - start)
            skip -= done
            for part in pieces.tokens(start + done, stop):
                if writer.write(part) and split == "train":
                    pieces.discard(start)
        assert not writer.left, "tokens are missing"
        splits[split] = counts[split].model_dump() | {"shards": writer.done}
    return {
        "empty_documents": int(selection.empty.sum()),
        "cut_documents": len(cuts),
        "documents_in_val_input": int(selection.leaked.sum()),
        "splits": {split: splits[split] for split in SPLITS},
    }


def count_documents(selection: Selection, split: str, cuts: dict[int, Cut]) -> Split:
    """The manifest's counts of a split. A cut document counts in both."""
    count = Split(documents=0, tokens=0, bytes=0, duplicates_kept=selection.keeps_duplicates, shards=[])
    position = 0
    for documents, whole, cut, duplicate in selection.of_split(split):
        bounds = position + np.append(0, np.cumsum(documents.tokens.astype(np.int64)))
        tokens, n_bytes = documents.tokens[whole], int(documents.bytes[whole].sum())
        for i in np.flatnonzero(cut):
            start, place, train_bytes = cuts[int(bounds[i])]
            tokens = np.append(tokens, np.uint64(place - start if split == "train" else 1 + int(bounds[i + 1]) - place))
            n_bytes += train_bytes if split == "train" else int(documents.bytes[i]) - train_bytes
        count.documents += len(tokens)
        count.tokens += int(tokens.sum())
        count.bytes += n_bytes
        count.duplicates += int(duplicate.sum())
        count.longest_document = max(count.longest_document, int(tokens.max(initial=0)))
        position = int(bounds[-1])
    count.bytes_per_token = count.bytes / max(1, count.tokens)
    return count


def doubts(selection: Selection, counts: dict[str, Split], config: PrepareOptions) -> Iterator[str]:
    """What may be wrong with the split: a share of bytes far from --val_fraction, or a document that makes up much of it."""
    train, val = counts["train"].bytes, counts["val"].bytes
    if config.val_input:
        return
    if not config.val_fraction / 2 <= val / (train + val) <= 2 * config.val_fraction:
        yield (
            f"{val / (train + val):.2%} of the bytes are held out for validation, where --val_fraction asks for "
            f"{config.val_fraction:.2%}: the corpus has too few documents; --val_input gives a validation text of your own"
        )
    longest = max(int(documents.bytes[whole].max(initial=0)) for documents, whole, _, _ in selection.of_split("val"))
    if longest > LARGEST_SHARE * val:
        yield (
            f"one document makes up {longest / val:.0%} of the validation split, so that val_loss measures above all that one; "
            "--val_input gives a validation text of your own"
        )


def token_ranges(selection: Selection, split: str, cuts: dict[int, Cut]) -> Iterator[tuple[int, int]]:
    """The ranges [start, stop) of the stream of tokens that make up a split, in order. The held-out end of a document that is cut
    begins with the document's first token, <|endoftext|>."""
    position = 0
    for documents, whole, cut, _ in selection.of_split(split):
        bounds = position + np.append(0, np.cumsum(documents.tokens.astype(np.int64)))
        edges = np.flatnonzero(np.diff(whole.astype(np.int8), prepend=0, append=0))
        ranges = bounds[edges].reshape(-1, 2).tolist()
        for i in np.flatnonzero(cut):
            start, place, _ = cuts[int(bounds[i])]
            ranges += [[start, place]] if split == "train" else [[start, start + 1], [place, int(bounds[i + 1])]]
        yield from sorted(ranges)
        position = int(bounds[-1])


def cut_documents(work: Path, pieces: Pieces, selection: Selection, tokenizer: Tokenizer, val_fraction: float) -> dict[int, Cut]:
    """Where documents are cut, by their first token in the stream; at most 10 / val_fraction of them are.

    They are kept in work/cuts.json, because finding them again needs pieces that are deleted meanwhile.
    """
    path = work / "cuts.json"
    if path.exists():
        cuts = parse_json(path.read_text(encoding="utf-8"), path)
        return {start: Cut(start, *rest) for start, *rest in cuts}
    lengths = np.array(tokenizer.byte_lengths)
    # Tokens that begin with the first byte of a character.
    begins = np.array([n == 0 or tokenizer.token_bytes(i)[0] & 0xC0 != 0x80 for i, n in enumerate(lengths.tolist())])
    cuts, position = {}, 0
    for documents, _, cut, _ in selection.of_split("train"):
        bounds = position + np.append(0, np.cumsum(documents.tokens.astype(np.int64)))
        for i in np.flatnonzero(cut):
            start, stop = int(bounds[i]), int(bounds[i + 1])
            cuts[start] = cut_document(pieces, start, stop, int(int(documents.bytes[i]) * (1 - val_fraction)), lengths, begins)
            if cuts[start].place <= start + 1:
                raise UserError(f"too short a text to hold out {val_fraction:.3g} of it for validation")
        position = int(bounds[-1])
    write_whole(path, json.dumps(list(cuts.values())))
    return cuts


def cut_document(
    pieces: Pieces, start: int, stop: int, target: int, lengths: NDArray[np.int64], begins: NDArray[np.bool_]
) -> Cut:
    """The last place that has at most `target` bytes of the document before it, between two tokens and between two characters."""
    position, n_bytes, place, train_bytes = start, 0, start, 0
    for part in pieces.tokens(start, stop):
        before = n_bytes + np.cumsum(lengths[part]) - lengths[part]
        if len(candidates := np.flatnonzero(begins[part] & (before <= target))):
            place, train_bytes = position + int(candidates[-1]), int(before[candidates[-1]])
        position, n_bytes = position + len(part), int(before[-1] + lengths[part[-1]])
        if n_bytes > target:
            break
    return Cut(start, place, train_bytes)

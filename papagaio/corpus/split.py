"""Which texts are held out: the rule for documents (validation split) and for questions.

A text is held out if its 64-bit hash is small. The decision depends on the text alone, so that a text stays in its split when
others are added, and equal texts stay together.

Documents differ in size, so their rule counts bytes. The target is `val_fraction` of the bytes of the corpus:

1. A document that is large beside the validation split is cut near its end: the last `val_fraction` of its bytes are held out.
   Large is more than a tenth of the target, if the end has 1 kB or more. The only document of a corpus is always cut.
2. The other documents are whole. Those with a hash below val_fraction x 2**64 are held out.
3. If the bytes held out by 2 differ by more than a third from `val_fraction` of these documents' bytes, there are too few of them
   for that. Then the documents with the smallest hashes are held out, as many as come nearest to the target.

Each split gets at least one document.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from papagaio.corpus.spans import LEAF_BYTES

LARGE = 0.1  # of the target: a larger document is cut
SHORTEST_END = 1024  # bytes of a document's end that is held out
TOLERANCE = 1 / 3  # of the target
BINS = 2**16


Split = Literal["train", "dev", "test"]
Hashes = NDArray[np.uint64]
Sizes = NDArray[np.uint64]


class Division(NamedTuple):
    """How documents are divided: those of at least `cut_from` bytes are cut, others with a hash below `limit` are held out."""

    limit: int
    cut_from: int


def divide(documents: Callable[[], Iterator[tuple[Hashes, Sizes]]], fraction: float, corpus_bytes: int = 0) -> Division:
    """The division that holds out about `fraction` of the bytes, as the module says.

    `documents()` iterates over the documents: (hashes, bytes), two arrays (N,) at a time. It is called up to three times, so that
    memory does not grow with the corpus. `corpus_bytes` is given if the documents are a sample of a larger corpus.
    """
    found = [(digest.min(), digest.max(), n_bytes.sum()) for digest, n_bytes in documents() if len(digest)]
    smallest, largest = min(int(low) for low, _, _ in found), max(int(high) for _, high, _ in found)
    if smallest == largest:
        return Division(limit=0, cut_from=0)
    target = fraction * max(corpus_bytes, sum(int(n_bytes) for _, _, n_bytes in found))
    cut_from = int(max(LARGE * target, SHORTEST_END / min(fraction, 1 - fraction))) + 1
    limit = min(int(fraction * 2**64), 2**64 - 1)
    all_small, held, bins = True, 0, np.zeros(BINS)  # bins: bytes of small documents by the first 16 bits of their hashes
    for digest, n_bytes in documents():
        small = n_bytes < cut_from
        all_small = all_small and bool(small.all())
        held += int(n_bytes[small & (digest < np.uint64(limit))].sum())
        bins += np.bincount(_bin(digest[small]), n_bytes[small], BINS)
    target = fraction * bins.sum()
    if abs(held - target) > TOLERANCE * target:
        limit = _nearest_limit(documents, cut_from, bins, target)
    if all_small:
        limit = min(max(limit, smallest + 1), largest)
    return Division(limit, cut_from)


def _nearest_limit(
    documents: Callable[[], Iterator[tuple[Hashes, Sizes]]],
    cut_from: int,
    bins: NDArray[np.float64],
    target: float,
) -> int:
    """The limit below which the bytes of small documents come nearest to the target. It is inside one of the bins."""
    number = int(np.searchsorted(np.cumsum(bins), target))
    chosen = [
        (digest[here], n_bytes[here])
        for digest, n_bytes in documents()
        if (here := (n_bytes < cut_from) & (_bin(digest) == number)).any()
    ]
    digests, sizes = (np.concatenate(column) for column in zip(*chosen, strict=True))
    distinct, which = np.unique(digests, return_inverse=True)
    held = bins[:number].sum() + np.append(0, np.cumsum(np.bincount(which, sizes)))  # below each of the limits
    limits = [*distinct.tolist(), min(int(distinct[-1]) + 1, 2**64 - 1)]
    return limits[int(np.argmin(np.abs(held - target)))]


def _bin(digest: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (digest >> np.uint64(48)).astype(np.int64)


def held_out_below(hashes: Iterable[int], fraction: float) -> int:
    """The limit for holding out `fraction` of the texts: those whose 64-bit hash is below it.

    If that leaves one of the two splits empty, only the text with the smallest hash is held out. Returns 0, which holds nothing
    out, for fraction 0 or if all texts are equal. Only the two smallest hashes and the largest one matter.
    """
    distinct = sorted(set(hashes))
    if len(distinct) < 2 or not fraction:
        return 0
    limit = int(fraction * 2**64)
    return limit if distinct[0] < limit <= distinct[-1] else distinct[1]


def text_hash(data: bytes) -> int:
    """64-bit hash of a text of at most LEAF_BYTES."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def combined_hash(leaves: list[int]) -> int:
    """The hash of a longer text from the hashes of its leaves, which different processes may have computed."""
    return leaves[0] if len(leaves) == 1 else text_hash(b"".join(leaf.to_bytes(8, "big") for leaf in leaves))


class TextHash:
    """The hash of a text of any length that comes in parts.

    Equal hashes mark duplicates: among 100 million documents, two different ones share a hash with probability 0.0003.
    """

    def __init__(self) -> None:
        self.leaves: list[int] = []
        self.rest = b""

    def update(self, data: bytes) -> None:
        data = self.rest + data
        whole = max(0, len(data) - 1) // LEAF_BYTES * LEAF_BYTES
        self.leaves += [text_hash(data[start : start + LEAF_BYTES]) for start in range(0, whole, LEAF_BYTES)]
        self.rest = data[whole:]

    def value(self) -> int:
        return combined_hash([*self.leaves, text_hash(self.rest)])


def split_of(source: str, seed: int) -> Split:
    """The split of all questions about a source, such as a module or a file: 85 % train, 5 % dev, 10 % test."""
    percent = int.from_bytes(hashlib.sha256(f"{seed} {source}".encode()).digest()) % 100
    return "train" if percent < 85 else "dev" if percent < 90 else "test"

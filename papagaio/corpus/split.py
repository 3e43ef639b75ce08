"""Which texts are held out: those with a small hash. The rule for documents (validation split) and for questions.

The decision depends on the text alone, so that a text stays in its split when others are added, and equal texts stay together.
"""

import hashlib
from collections.abc import Iterable

from papagaio.corpus.spans import LEAF_BYTES


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

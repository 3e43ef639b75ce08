"""The order in which weighted parts of the training data are visited: a pure function of (seed, position), without any list.

Pretraining mixes the windows of several datasets, fine-tuning the rows of several files. Nothing is shuffled in memory: a keyed
permutation is evaluated at each position, so that a resumed run has to remember only its step.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Source(NamedTuple):
    """A part of the training data as the user names it, and how often an epoch has each of its items."""

    name: str
    weight: float


def parse_source(word: str) -> Source:
    """`out/a:3` -> Source("out/a", 3.0), `out/a` -> Source("out/a", 1.0). The name of a file that exists is taken whole.

    Raises ValueError if the weight is not a positive number.
    """
    name, weight = word, 1.0
    if ":" in word and not Path(word).exists():
        with suppress(ValueError):  # not a number: the colon is part of the name
            weight = float(word.rpartition(":")[2])
            name = word.rpartition(":")[0]
    if not 0 < weight < math.inf:
        raise ValueError(f"{word}: the weight after the colon must be a positive number, such as 2 or 0.5")
    return Source(name, weight)


class Mixture:
    """The order in which the items of several parts are visited; `counts` are the items of each part, numbered through all parts.

    `weights` say how often an epoch has each item of a part. With a weight of 1.5, an epoch has every item once and half of them
    a second time, the other half in the next epoch.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.seed, self.counts = seed, np.array(counts, np.int64)
        self.firsts = self.counts.cumsum() - self.counts  # the number of each part's first item
        self.whole = self.counts * np.array([int(weight) for weight in weights], np.int64)  # visits in full rounds, per epoch
        self.extra = np.array([round(weight % 1 * count) for weight, count in zip(weights, counts, strict=True)], np.int64)
        self.visits = self.whole + self.extra  # of each part, per epoch
        self.ends = self.visits.cumsum()
        self.size = int(self.visits.sum())

    def __call__(self, start: int, stop: int) -> list[int]:
        """The numbers of the items at positions start to stop - 1 of the training order."""
        return self.at(np.arange(start, stop)).tolist()

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the items at these positions of the training order."""
        epochs, index = np.divmod(positions, self.size)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            index[here] = self._items(permute(index[here], self.size, self.seed, epoch), epoch)
        return index

    def _items(self, index: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The items at these positions of an epoch that is not shuffled yet: the full rounds of a part, then its extra visits."""
        parts = np.searchsorted(self.ends, index, side="right")
        index = index - (self.ends - self.visits)[parts]  # within the part
        items = index % np.maximum(self.counts, 1)[parts]
        for part in np.flatnonzero(self.extra).tolist():
            here = (parts == part) & (index >= self.whole[part])
            rounds, item = np.divmod(index[here] - self.whole[part] + epoch * self.extra[part], self.counts[part])
            for number in np.unique(rounds).tolist():  # a round has every item once
                now = rounds == number
                item[now] = permute(item[now], int(self.counts[part]), int(mix(self.seed, part)), number)
            items[here] = item
        return self.firsts[parts] + items


def permute(index: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A random permutation of range(size), different for each seed and epoch, evaluated at `index` (N,). Nothing is stored.

    Four rounds of a Feistel network over the next even power of two; values outside range(size) go through it again (cycle
    walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    found = index.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        left, right = found[outside] >> np.uint64(half), found[outside] & np.uint64(mask)
        for round_number in range(4):
            left, right = right, left ^ (mix(seed, epoch, round_number, right) & np.uint64(mask))
        found[outside] = left << np.uint64(half) | right
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


def mix(*values: Any) -> Any:
    """A 64-bit hash of integers, or of uint64 arrays elementwise (splitmix64; Steele, Lea and Flood 2014)."""
    state: Any = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state = state ^ state >> 31
    return state

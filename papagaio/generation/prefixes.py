"""Caches of texts that were read before: a prompt that begins as one of them is read only from where it differs.

prefixes.keep(ids, cache, row)
prefixes.find(other_ids)                     # a cache of one row that has read their common beginning, or None
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

LEAST = 16  # tokens: to copy fewer is no gain


class Prefixes:
    """Keeps the caches of the texts used last, up to a number of tokens."""

    def __init__(self, most: int) -> None:
        """`most`: tokens of all texts together; 0 keeps none."""
        self.most, self.tokens = most, 0
        self.kept = OrderedDict[tuple[int, ...], Any]()  # token ids -> cache with one row, those used last at the end

    def keep(self, ids: Sequence[int], cache: Any, row: int) -> None:
        """Keep what a row of a cache has read, the tokens `ids`; not if it is longer than the context, or than `most`."""
        n = len(ids)
        if not LEAST <= n <= self.most or cache.rows.filled[row] != n or n > cache.rows.context:
            return
        ids = tuple(ids)
        for other in list(self.kept):
            if other[:n] == ids:  # it holds this one
                self.kept.move_to_end(other)
                return
            if ids[: len(other)] == other:
                self._drop(other)
        self.kept[ids] = cache.beginning(row, ids)
        self.tokens += n
        while self.tokens > self.most:
            self._drop(next(iter(self.kept)))

    def _drop(self, ids: tuple[int, ...]) -> None:
        del self.kept[ids]
        self.tokens -= len(ids)

    def find(self, ids: Sequence[int], others: Sequence[Sequence[int]] = (), cache: Any = None) -> Any:
        """A cache of one row that has read the longest beginning of `ids` that is known; None if that is short.

        Known is also what the rows of `cache` have read, the tokens `others`.
        """
        lengths = {key: _common(key, ids) for key in self.kept}
        best = max(lengths, key=lengths.__getitem__, default=())
        length = lengths.get(best, 0)
        running = [_common(other, ids) if cache.rows.filled[row] == len(other) else 0 for row, other in enumerate(others)]
        if max(running, default=0) > max(length, LEAST - 1):
            return cache.beginning(running.index(max(running)), ids[: max(running)])
        if length < LEAST:
            return None
        self.kept.move_to_end(best)
        return self.kept[best].beginning(0, ids[:length])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at the beginning."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)

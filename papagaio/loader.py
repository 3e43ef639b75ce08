"""Batches of training windows: a pure function of (seed, step), so that a resumed run needs to remember its step alone.

A window is block_size + 1 consecutive tokens of a shard: inputs, and the same one token later as targets. An epoch visits
every window exactly once, in an order that a keyed permutation computes index by index: nothing is shuffled in memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papagaio.config import UserError
from papagaio.shards import Dataset


class Batch(NamedTuple):
    """Sequences of one optimizer step, or some of them: ids, targets (B, T) int64 and weights (B, T) float32.

    Targets of -100 are not predicted. Weights sum to 1 over a whole step, so the loss of a step is the sum of its parts'.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of `size` sequences."""
        return (Batch(*parts) for parts in zip(*(tensor.split(size) for tensor in self), strict=True))

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class WindowLoader:
    """Training windows of a dataset's split: `loader(step)` is the batch of an optimizer step, in a list of one.

    In each epoch the windows of a shard start at another offset, so that a token is not always at the same place.
    Raises UserError for a split shorter than one window.
    """

    def __init__(self, dataset: Dataset, split: str, block_size: int, batch_size: int, seed: int) -> None:
        self.shards = dataset.shards(split)
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        sizes = np.array([len(shard) for shard in self.shards], np.int64)
        # As many windows as there are at every offset; at least one where one fits.
        counts = np.maximum((sizes - block_size) // block_size, np.minimum((sizes - 1) // block_size, 1))
        counts = np.maximum(counts, 0)
        self.slack = np.minimum(sizes - 1 - counts * block_size, block_size - 1)  # largest offset
        self.ends = counts.cumsum()  # windows of the shards up to each one
        self.n_windows = int(counts.sum())
        if self.n_windows == 0:
            raise UserError(
                f"{dataset.directory}: the {split} split has {int(sizes.sum()):,} tokens, fewer than one block of "
                f"{block_size} + 1; prepare more text or lower --block_size"
            )

    def __call__(self, step: int) -> list[Batch]:
        numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)  # windows since the start of training
        rows = np.stack([self._window(int(n)) for n in numbers])  # (B, T + 1)
        tokens = torch.from_numpy(rows)
        targets = tokens[:, 1:].contiguous()
        return [Batch(tokens[:, :-1].contiguous(), targets, torch.full(targets.shape, 1 / targets.numel()))]

    def epochs(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step * self.batch_size / self.n_windows

    def _window(self, number: int) -> NDArray[np.int64]:
        epoch, index = divmod(number, self.n_windows)
        index = permute(index, self.n_windows, self.seed, epoch)
        shard = int(np.searchsorted(self.ends, index, side="right"))
        index -= int(self.ends[shard - 1]) if shard else 0
        offset = mix(self.seed, epoch, shard) % (int(self.slack[shard]) + 1)
        start = offset + index * self.block_size
        return self.shards[shard][start : start + self.block_size + 1].astype(np.int64)


def permute(index: int, size: int, seed: int, epoch: int) -> int:
    """Where `index` goes in the epoch's random order of range(size): a bijection, computed without storing it.

    Four rounds of a Feistel network over the next even power of two; values that fall outside are sent round again
    (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            left, right = right, left ^ (mix(seed, epoch, round_number, right) & mask)
        index = left << half | right
        if index < size:
            return index


def mix(*values: int) -> int:
    """64 well-mixed bits of a few integers (splitmix64; Steele, Lea and Flood 2014)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def validation_batches(dataset: Dataset, block_size: int, batch_size: int, max_tokens: int = 0) -> list[Batch]:
    """The validation split, every token but the first predicted exactly once, in consecutive windows.

    The windows of a shard are padded with -100 at its end. With max_tokens > 0, only the first windows that hold as many.
    Weights are 1 for each predicted token: losses come out as sums. Raises UserError for an empty split.
    """
    rows, targets = [], []
    for shard in dataset.shards("val"):
        for start in range(0, len(shard) - 1, block_size):
            window = shard[start : start + block_size + 1].astype(np.int64)
            padding = block_size + 1 - len(window)
            rows.append(np.pad(window[:-1], (0, padding)))
            targets.append(np.pad(window[1:], (0, padding), constant_values=-100))
            if max_tokens and len(rows) * block_size >= max_tokens:
                break
        if max_tokens and len(rows) * block_size >= max_tokens:
            break
    if not rows:
        raise UserError(f"{dataset.directory}: the val split is empty; prepare the data with a larger --val_fraction")
    ids, wanted = torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(targets))
    return list(Batch(ids, wanted, (wanted != -100).float()).split(batch_size))

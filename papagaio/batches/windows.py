"""Training windows: WindowLoader gives the batches of a step as a pure function of (seed, step).

A window is block_size + 1 consecutive tokens of a shard: the inputs, and the same tokens shifted by one as targets. Each epoch
visits every window exactly once, in a random order that a keyed permutation computes index by index: no list is shuffled, so
memory does not grow with the corpus, and a resumed run has to remember only its step.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papagaio.corpus.dataset import Dataset
from papagaio.errors import UserError
from papagaio.tokenizer import END_OF_TEXT


class Batch(NamedTuple):
    """Sequences of an optimizer step: ids and targets (B, T) int64, weights (B, T) float32, doc_ids (B, T) int64 or None.

    No loss is computed where the target is -100. The weights sum to 1 over all batches of a step, so that the loss of a step is
    the sum of the losses of its micro-batches. doc_ids numbers the documents of a row; a token attends to its own document only.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor
    doc_ids: Tensor | None = None

    def split(self, size: int) -> Iterator[Self]:
        """Micro-batches of at most `size` sequences."""
        return (self._each(lambda tensor, i=i: tensor[i : i + size]) for i in range(0, len(self.ids), size))

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The batch in pinned memory, from which a copy to a GPU does not block the program."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(*(None if tensor is None else change(tensor) for tensor in self))


class Loader(Protocol):
    """The data of a run, as train.fit reads it. All methods are pure functions of the step and may be called from any thread."""

    def __call__(self, step: int) -> list[Any]:
        """The batches of an optimizer step: objects with ids, targets, split, to and pin_memory, such as Batch."""

    def epochs(self, step: int) -> float:
        """Passes over the data after `step` steps."""

    def places(self, step: int) -> list[str]:
        """Where each sequence of a step comes from, for messages: qa.jsonl:12, or train-00000.npy[512:769]."""


Objective = Callable[[Any, Any], Tensor]  # (model, batch) -> loss, a scalar


def likelihood(model: Any, batch: Batch) -> Tensor:
    """The loss of next-token prediction, which pretraining and fine-tuning minimise."""
    return model(*batch)


class WindowLoader:
    """Training windows of a split: `loader(step)` is a list with one Batch, the windows of an optimizer step.

    The first window of a shard starts at another offset in each epoch, so that a token does not always have the same position.
    With document_mask, the batch has doc_ids. Each of world_size ranks gets its own part of the batch. Raises UserError if the
    split is shorter than one window.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        block_size: int,
        batch_size: int,
        seed: int,
        *,
        document_mask: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.shards = [np.asarray(shard) for shard in dataset.shards(split)]  # slices of plain arrays cost less
        self.dataset, self.names = dataset, [shard["file"] for shard in dataset.splits[split]["shards"]]
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.start_token = dataset.tokenizer.special[END_OF_TEXT] if document_mask else None
        assert batch_size % world_size == 0, f"batch size {batch_size} is not divisible by {world_size} ranks"
        self.part = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        sizes = np.array([len(shard) for shard in self.shards], np.int64)
        # The number of windows that fit at every offset; at least one if the shard has one at all.
        counts = np.maximum((sizes - block_size) // block_size, np.clip((sizes - 1) // block_size, 0, 1))
        self.slack = np.minimum(sizes - 1 - counts * block_size, block_size - 1)  # the largest offset of each shard
        self.ends = counts.cumsum()  # windows of the shards up to and including each one
        self.n_windows = int(counts.sum())
        if self.n_windows == 0:
            raise UserError(
                f"{dataset.directory}: the {split} split has {int(sizes.sum()):,} tokens, fewer than one block of "
                f"{block_size} + 1; prepare more text or lower --block_size"
            )
        self.weights = torch.full((batch_size // world_size, block_size), 1 / (batch_size * block_size))
        # Positions are computed for many steps at once, which saves time. Two blocks of steps are cached: the training loop and
        # the prefetching thread may be in different ones.
        self.steps_per_block = max(1, 4096 // batch_size)
        self._block = lru_cache(maxsize=2)(self._compute_block)

    def __call__(self, step: int) -> list[Batch]:
        tokens = np.stack(
            [self.shards[i][start : start + self.block_size + 1] for i, start in self._positions(step)]
        )  # (B, T + 1)
        ids, targets = (torch.from_numpy(part.astype(np.int64)) for part in (tokens[:, :-1], tokens[:, 1:]))
        return [Batch(ids, targets, self.weights, number_documents(ids, self.start_token))]

    def epochs(self, step: int) -> float:
        return step * self.batch_size / self.n_windows

    def places(self, step: int) -> list[str]:
        return [f"{self.names[i]}[{start}:{start + self.block_size + 1}]" for i, start in self._positions(step)]

    def _positions(self, step: int) -> list[tuple[int, int]]:
        """The shard of each of a step's B windows, and the window's first token in that shard."""
        block, row = divmod(step, self.steps_per_block)
        shards, starts = self._block(block)
        return list(zip(shards[row].tolist(), starts[row].tolist(), strict=True))

    def _compute_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards and first tokens of the windows of steps_per_block steps, (steps, B) each."""
        size = self.steps_per_block * self.batch_size
        windows = np.arange(block * size, (block + 1) * size).reshape(-1, self.batch_size)[:, self.part]
        epochs, index = np.divmod(windows, self.n_windows)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = permute(index[epochs == epoch], self.n_windows, self.seed, int(epoch))
        shards = np.searchsorted(self.ends, index, side="right")
        index -= np.where(shards > 0, self.ends[shards - 1], 0)
        slack = self.slack[shards].astype(np.uint64)
        offsets = mix(self.seed, epochs.astype(np.uint64), shards.astype(np.uint64)) % (slack + np.uint64(1))
        return shards, offsets.astype(np.int64) + index * self.block_size


def number_documents(ids: Tensor, start_token: int | None) -> Tensor | None:
    """doc_ids (B, T) of ids (B, T): the number of documents that have begun in the row. None without a start token."""
    return None if start_token is None else (ids == start_token).cumsum(1)


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


class ValidationWindows:
    """The validation split in batches of consecutive windows: every token except the first of a shard is a target exactly once.

    The last window of a shard is padded with targets of -100. With max_tokens > 0, only as many windows as hold them, spread
    evenly over the split: its first part may be easier than the rest (1.42 and 1.53 nats for the same model of Shakespeare).
    Weights are 1 for each target, so that losses are sums. Raises UserError if the split is empty.
    """

    def __init__(
        self, dataset: Dataset, block_size: int, batch_size: int, max_tokens: int = 0, *, document_mask: bool = False
    ) -> None:
        self.shards, self.block_size, self.batch_size = dataset.shards("val"), block_size, batch_size
        self.start_token = dataset.tokenizer.special[END_OF_TEXT] if document_mask else None
        starts = [(i, start) for i, shard in enumerate(self.shards) for start in range(0, len(shard) - 1, block_size)]
        count = min(len(starts), -(-max_tokens // block_size)) if max_tokens else len(starts)
        self.starts = [starts[i * len(starts) // count] for i in range(count)]
        if not starts:
            raise UserError(f"{dataset.directory}: the val split is empty; prepare the data with a larger --val_fraction")

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        T = self.block_size
        for first in range(0, len(self.starts), self.batch_size):
            part = self.starts[first : first + self.batch_size]
            batch = pad_windows([self.shards[shard][start : start + T + 1] for shard, start in part], T)
            yield batch._replace(doc_ids=number_documents(batch.ids, self.start_token))


def pad_windows(windows: Sequence[NDArray[np.integer]], width: int) -> Batch:
    """Windows of up to width + 1 tokens as a Batch (B, width). Every token except a window's first is a target, of weight 1."""
    ids = torch.zeros((len(windows), width), dtype=torch.int64)
    targets = torch.full((len(windows), width), -100)
    for row, window in enumerate(windows):
        tokens = torch.from_numpy(window.astype(np.int64))
        ids[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, : len(tokens) - 1] = tokens[1:]
    return Batch(ids, targets, (targets != -100).float())

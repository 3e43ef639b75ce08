"""Batches of training windows: a pure function of (seed, step), so that a resumed run needs to remember its step alone.

A window is block_size + 1 consecutive tokens of a shard: inputs, and the same one token later as targets. An epoch visits
every window exactly once, in an order that a keyed permutation computes index by index: nothing is shuffled in memory, which
does not grow with the corpus. However many ranks share a step's batch, together they have the same windows.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from papagaio.corpus.dataset import Dataset
from papagaio.errors import UserError
from papagaio.tokenizer import END_OF_TEXT


class Batch(NamedTuple):
    """Sequences of one optimizer step, or some of them: ids, targets (B, T) int64 and weights (B, T) float32.

    Targets of -100 are not predicted. Weights sum to 1 over a whole step, so the loss of a step is the sum of its parts'.
    doc_ids (B, T) int64, where given, numbers the documents in a row: a token then sees those of its own document only.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor
    doc_ids: Tensor | None = None

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of `size` sequences."""
        return (self._each(lambda tensor, i=i: tensor[i : i + size]) for i in range(0, len(self.ids), size))

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In memory from which a GPU copies by itself, while the program goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*(None if tensor is None else change(tensor) for tensor in self))


class Loader(Protocol):
    """What train.fit wants of its data."""

    def __call__(self, step: int) -> list[Batch]:
        """The batches of an optimizer step."""
        ...

    def epochs(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        ...

    def places(self, step: int) -> list[str]:
        """Where each sequence of a step comes from, for a message."""
        ...


Objective = Callable[[Any, Any], Tensor]  # (model, batch) -> the loss, a scalar


def likelihood(model: Any, batch: Batch) -> Tensor:
    """The loss of next-token prediction: what pretraining and fine-tuning minimise."""
    return model(*batch)


class WindowLoader:
    """Training windows of a dataset's split: `loader(step)` is the batch of an optimizer step, in a list of one.

    In each epoch the windows of a shard start at another offset, so that a token is not always at the same place. With
    start_at_documents, a window in which a document begins is moved on to that place. With document_mask, doc_ids are given.
    Of world_size ranks, each has its part of the batch. Raises UserError for a split shorter than one window.
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
        start_at_documents: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        shards = dataset.shards(split)
        self.dataset, self.names = dataset, [shard["file"] for shard in dataset.splits[split]["shards"]]
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.document_mask, self.start_at_documents = document_mask, start_at_documents
        self.start_token = dataset.tokenizer.special[END_OF_TEXT]
        assert batch_size % world_size == 0, f"{world_size} ranks do not divide a batch of {batch_size}"
        self.part = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        sizes = np.array([len(shard) for shard in shards], np.int64)
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
        # Every window that a shard has, as rows (len - T, T + 1) of a view: nothing is copied.
        self.rows = [sliding_window_view(shard, block_size + 1) if n else None for shard, n in zip(shards, counts, strict=True)]
        self.steps_at_once = max(1, 4096 // batch_size)
        self.placed = (-1, np.zeros(0, np.int64), np.zeros(0, np.int64))
        self.weights = torch.full((batch_size // world_size, block_size), 1 / (batch_size * block_size))

    def __call__(self, step: int) -> list[Batch]:
        shards, starts = self._places(step)
        tokens = self._read(shards, starts)  # (B, T + 1)
        if self.start_at_documents:
            begins = tokens[:, :-1] == self.start_token
            last = np.array([len(rows) - 1 if rows is not None else 0 for rows in self.rows])[shards]
            tokens = self._read(shards, np.minimum(starts + begins.argmax(1), last))
        ids, targets = (torch.from_numpy(part.astype(np.int64)) for part in (tokens[:, :-1], tokens[:, 1:]))
        return [Batch(ids, targets, self.weights, number_documents(ids, self.start_token) if self.document_mask else None)]

    def epochs(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step * self.batch_size / self.n_windows

    def places(self, step: int) -> list[str]:
        """Such as train-00000.npy[512:769], the tokens of each window."""
        pairs = zip(*self._places(step), strict=True)
        return [f"{self.names[shard]}[{start}:{start + self.block_size + 1}]" for shard, start in pairs]

    def _places(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard of each window (B,) and where in it the window starts (B,). Computed for many steps at once."""
        block, row = divmod(step, self.steps_at_once)
        if self.placed[0] != block:
            size = self.steps_at_once * self.batch_size
            windows = np.arange(block * size, (block + 1) * size).reshape(-1, self.batch_size)[:, self.part]
            epochs, index = np.divmod(windows, self.n_windows)
            for epoch in np.unique(epochs):
                index[epochs == epoch] = permute(index[epochs == epoch], self.n_windows, self.seed, int(epoch))
            shards = np.searchsorted(self.ends, index, side="right")
            index -= np.where(shards > 0, self.ends[shards - 1], 0)
            slack = self.slack[shards].astype(np.uint64)
            offsets = mix(self.seed, epochs.astype(np.uint64), shards.astype(np.uint64)) % (slack + np.uint64(1))
            self.placed = block, shards, offsets.astype(np.int64) + index * self.block_size
        _, shards, starts = self.placed
        return shards[row], starts[row]

    def _read(self, shards: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.integer]:
        first = shards[0]
        if (shards == first).all():
            return self.rows[first][starts]
        return np.stack([self.rows[shard][start] for shard, start in zip(shards, starts, strict=True)])


class Ahead:
    """Gives the batches of a loader, those of the next step prepared in a thread while this step is computed.

    For a GPU they wait in pinned memory, from which `Batch.to` copies without holding up the program.
    """

    def __init__(self, loader: Callable[[int], list[Batch]], device: torch.device) -> None:
        self.loader, self.pinned = loader, device.type == "cuda"
        self.pool = ThreadPoolExecutor(1)
        self.waiting: dict[int, Future[list[Batch]]] = {}

    def __call__(self, step: int) -> list[Batch]:
        future = self.waiting.pop(step, None) or self.pool.submit(self._prepare, step)
        self.waiting = {step + 1: self.pool.submit(self._prepare, step + 1)}
        return future.result()

    def _prepare(self, step: int) -> list[Batch]:
        batches = self.loader(step)
        return [batch.pin_memory() for batch in batches] if self.pinned else batches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pool.shutdown(cancel_futures=True)


def number_documents(ids: Tensor, start_token: int) -> Tensor:
    """doc_ids (B, T) of ids (B, T): how many documents have begun in the row, up to each token."""
    return (ids == start_token).cumsum(1)


def permute(index: Any, size: int, seed: int, epoch: int) -> Any:
    """Where `index` (an integer, or an array of them) goes in the epoch's random order of range(size): a bijection, computed
    without storing it.

    Four rounds of a Feistel network over the next even power of two; values that fall outside are sent round again
    (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    found = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        left, right = found[outside] >> np.uint64(half), found[outside] & np.uint64(mask)
        for round_number in range(4):
            left, right = right, left ^ (mix(seed, epoch, round_number, right) & np.uint64(mask))
        found[outside] = left << np.uint64(half) | right
        outside = outside[found[outside] >= size]
    return found.astype(np.int64) if isinstance(index, np.ndarray) else int(found[0])


def mix(*values: Any) -> Any:
    """64 well-mixed bits of a few integers, or uint64 arrays of them (splitmix64; Steele, Lea and Flood 2014)."""
    state: Any = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state = state ^ state >> 31
    return state


class ValidationWindows:
    """The validation split, every token but the first predicted exactly once, in batches of consecutive windows.

    The windows of a shard are padded with -100 at its end. With max_tokens > 0, only as many windows as hold them, evenly spread
    over the split: its first part may be easier than the rest (1.42 and 1.53 nats for the same model of Shakespeare).
    Weights are 1 for each predicted token: losses come out as sums. Raises UserError for an empty split.
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
            places = self.starts[first : first + self.batch_size]
            batch = pad_windows([self.shards[shard][start : start + T + 1] for shard, start in places], T)
            doc_ids = None if self.start_token is None else number_documents(batch.ids, self.start_token)
            yield batch._replace(doc_ids=doc_ids)


def pad_windows(windows: Sequence[NDArray[np.integer]], width: int) -> Batch:
    """Runs of up to width + 1 tokens as a batch (B, width) in which each but a run's first is predicted, with weight 1."""
    ids = torch.zeros((len(windows), width), dtype=torch.int64)
    targets = torch.full((len(windows), width), -100)
    for row, window in enumerate(windows):
        tokens = torch.from_numpy(window.astype(np.int64))
        ids[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, : len(tokens) - 1] = tokens[1:]
    return Batch(ids, targets, (targets != -100).float())

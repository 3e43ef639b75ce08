"""Training windows: WindowLoader gives the batches of a step as a pure function of (seed, step).

A window is block_size + 1 consecutive tokens of a shard: the inputs, and the same tokens shifted by one as targets. Each epoch
visits every window exactly once (with weights, as often as the weight of its dataset says), in a random order that mixture.py
computes index by index: memory does not grow with the corpus, and a resumed run has to remember only its step.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papagaio.batches.mixture import Mixture, mix
from papagaio.corpus.dataset import Dataset
from papagaio.errors import UserError


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
    """Training windows of a split, of one dataset or of several: `loader(step)` is a list with one Batch, the windows of an
    optimizer step.

    `repeats` says how often an epoch has each window of each dataset, by default once. The first window of a shard starts at
    another offset in each epoch, so that a token does not always have the same position. With document_mask, the batch has
    doc_ids. Raises UserError if a dataset gives no window.
    """

    def __init__(
        self,
        datasets: Dataset | Sequence[Dataset],
        split: str,
        block_size: int,
        batch_size: int,
        seed: int,
        *,
        repeats: Sequence[float] = (1.0,),
        document_mask: bool = False,
    ) -> None:
        self.datasets = [datasets] if isinstance(datasets, Dataset) else list(datasets)
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.start_token = self.datasets[0].tokenizer.start if document_mask else None
        prefixes = [f"{dataset.directory}/" if len(self.datasets) > 1 else "" for dataset in self.datasets]
        files = [[shard["file"] for shard in dataset.splits[split]["shards"]] for dataset in self.datasets]
        self.names = [prefix + file for prefix, part in zip(prefixes, files, strict=True) for file in part]
        parts = [dataset.shards(split) for dataset in self.datasets]
        self.shards = [np.asarray(shard) for part in parts for shard in part]  # slices of plain arrays cost less
        sizes = np.array([len(shard) for shard in self.shards], np.int64)
        # The number of windows that fit at every offset; at least one if the shard has one at all.
        counts = np.maximum((sizes - block_size) // block_size, np.clip((sizes - 1) // block_size, 0, 1))
        self.slack = np.minimum(sizes - 1 - counts * block_size, block_size - 1)  # the largest offset of each shard
        self.ends = counts.cumsum()  # windows of the shards up to and including each one
        owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        windows = [int(counts[owners == i].sum()) for i in range(len(parts))]
        self.mixture = Mixture(windows, repeats, seed)
        self.n_windows = self.mixture.size  # of an epoch
        for dataset, available, visits in zip(self.datasets, windows, self.mixture.visits, strict=True):
            if not available:
                tokens = dataset.splits[split]["tokens"]
                raise UserError(
                    f"{dataset.directory}: the {split} split has {tokens:,} tokens, fewer than one block of {block_size} + 1; "
                    "prepare more text or lower --block_size"
                )
            if not visits:
                raise UserError(f"{dataset.directory}: its weight leaves none of its {available:,} windows; give a larger one")
        self.weights = torch.full((batch_size, block_size), 1 / (batch_size * block_size))
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
        positions = np.arange(block * size, (block + 1) * size).reshape(-1, self.batch_size)
        epochs, index = positions // self.n_windows, self.mixture.at(positions)
        shards = np.searchsorted(self.ends, index, side="right")
        index -= np.where(shards > 0, self.ends[shards - 1], 0)
        slack = self.slack[shards].astype(np.uint64)
        offsets = mix(self.seed, epochs.astype(np.uint64), shards.astype(np.uint64)) % (slack + np.uint64(1))
        return shards, offsets.astype(np.int64) + index * self.block_size


def number_documents(ids: Tensor, start_token: int | None) -> Tensor | None:
    """doc_ids (B, T) of ids (B, T): the number of documents that have begun in the row. None without a start token."""
    return None if start_token is None else (ids == start_token).cumsum(1)


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
        self.start_token = dataset.tokenizer.start if document_mask else None
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

"""The part of each batch that one of several processes computes."""

from typing import Any

import torch
from torch import Tensor

from papagaio.batches.windows import Loader


class Share:
    """A loader that wraps another one and gives, of every batch, the sequences rank, rank + size, rank + 2 size, ...

    The weights of a step sum to 1 over all ranks. Each rank gets as many sequences as the others: those that are missing are
    copies of the first, without targets and with weights of 0. `places` names the sequences of all ranks.
    """

    def __init__(self, loader: Loader, rank: int, size: int) -> None:
        self.loader, self.rank, self.size = loader, rank, size

    def __call__(self, step: int) -> list[Any]:
        return [share(batch, self.rank, self.size) for batch in self.loader(step)]

    def epochs(self, step: int) -> float:
        return self.loader.epochs(step)

    def places(self, step: int) -> list[str]:
        return self.loader.places(step)


def share(batch: Any, rank: int, size: int) -> Any:
    """One rank's sequences of a Batch or PairBatch."""
    missing = len(batch.ids[rank::size]) < -(-len(batch.ids) // size)

    def part(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        own = tensor[rank::size]
        if missing:
            first = tensor[:1]
            empty = {"targets": torch.full_like(first, -100), "weights": torch.zeros_like(first)}
            own = torch.cat((own, empty.get(name, first)))
        return own.contiguous()

    return batch._replace(**{name: part(name, getattr(batch, name)) for name in batch._fields})

"""The sum of the gradients over several processes, in buckets, while the last backward pass of a step still runs.

torch's DistributedDataParallel would divide by the number of processes, rename the parameters, and wait for ever if one process
runs out of memory. Here the weights of a step's tokens sum to 1 over all processes, so that the plain sum is the gradient.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from papagaio.training.parallel import World
from papagaio.training.sharding import is_sharded

BUCKET = 25 * 2**20  # bytes that are summed at a time: enough for full speed, and the first is ready early


class Gradients:
    """The gradients of a model's trained parameters. With several processes they lie in flat buckets, one sum for each.

    Before the last backward pass of a step, set `final`; after it, call `finish`, on every rank and whatever happened before: all
    ranks sum each bucket once, in the same order. A divided model sums its gradients by itself.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.final = model, False
        self.buckets: list[Tensor] = []
        self.missing: list[int] = []  # gradients of each bucket that the last backward pass has not computed yet
        self.sums: list[dist.Work] = []  # of the buckets, in order, as far as they have begun
        if world.size == 1 or is_sharded(model):
            return
        for params in _buckets([p for p in model.parameters() if p.requires_grad]):
            bucket = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)
            for p, part in zip(params, bucket.split([p.numel() for p in params]), strict=True):
                p.grad = part.view_as(p)
                p.register_post_accumulate_grad_hook(partial(self._computed, len(self.buckets)))
            self.buckets.append(bucket)
            self.missing.append(len(params))
        self.sizes = list(self.missing)

    def _computed(self, number: int, p: Tensor) -> None:
        if self.final:
            self.missing[number] -= 1
            while len(self.sums) < len(self.buckets) and self.missing[len(self.sums)] <= 0:
                self._sum_next()

    def _sum_next(self) -> None:
        self.sums.append(dist.all_reduce(self.buckets[len(self.sums)], async_op=True))

    def finish(self) -> None:
        """Begin the sums that have not begun, for example of parameters without a gradient, and wait for all."""
        self.final = False
        if self.buckets:
            while len(self.sums) < len(self.buckets):
                self._sum_next()
            for work in self.sums:
                work.wait()
            self.sums.clear()
            self.missing = list(self.sizes)

    def clear(self) -> None:
        """Set the gradients to zero, or forget them."""
        for bucket in self.buckets:
            bucket.zero_()
        if not self.buckets:
            self.model.zero_grad(set_to_none=True)


def _buckets(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of up to BUCKET bytes together, the last ones first: about the order in which their gradients are computed."""
    bucket: list[nn.Parameter] = []
    for p in reversed(params):
        if bucket and (sum(each.nbytes for each in bucket) + p.nbytes > BUCKET or bucket[0].dtype != p.dtype):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket

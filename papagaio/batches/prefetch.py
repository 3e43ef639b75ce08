"""Prefetching: the next step's batches are prepared in a thread while the device computes the current step."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch

from papagaio.batches.windows import Loader


class Prefetch:
    """A loader that wraps another one and prepares the batches of step + 1 in a thread when step is asked for.

        with Prefetch(WindowLoader(...), device) as loader:
            fit(model, loader, ...)

    Leaving the `with` block ends the thread. For a CUDA device the batches are in pinned memory, from which `Batch.to` copies
    without blocking. Do not wrap a loader whose batches depend on the model's current weights.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self.pinned = loader, device.type == "cuda"
        self.pool = ThreadPoolExecutor(1)
        self.waiting: dict[int, Future[list[Any]]] = {}  # used by the caller's thread only

    def __call__(self, step: int) -> list[Any]:
        future = self.waiting.pop(step, None) or self.pool.submit(self._prepare, step)
        self.waiting = {step + 1: self.pool.submit(self._prepare, step + 1)}
        return future.result()

    def epochs(self, step: int) -> float:
        return self.loader.epochs(step)

    def places(self, step: int) -> list[str]:
        return self.loader.places(step)

    def _prepare(self, step: int) -> list[Any]:
        batches = self.loader(step)
        return [batch.pin_memory() for batch in batches] if self.pinned else batches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

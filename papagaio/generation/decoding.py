"""Decoding of a batch: each row has a request of its own, and a cache remembers what the model has read of it."""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from papagaio.generation.cache import Cache
from papagaio.generation.streaming import TextStream

CHUNK = 2048  # tokens of prompts, over all rows, that are read in one forward pass


class Row:
    """A request in progress: its tokens so far, its random numbers, and its text."""

    def __init__(self, index: int, prompt: Sequence[int], seed: int, limit: int, text: TextStream) -> None:
        """`limit`: the largest number of tokens after the prompt."""
        self.index, self.ids, self.prompt_length, self.limit, self.text = index, list(prompt), len(prompt), limit, text
        self.random = random.Random(seed)
        self.finish: str | None = None


class Decoder:
    """A model, and the cache of the rows that it decodes. The cache holds all tokens of a row but the last."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype, room: int, compiled: bool = False) -> None:
        """`room` is how many tokens are to come: slots for them are allocated at once, up to the context."""
        self.model, self.device, self.dtype, self.room, self.compiled = model, device, dtype, room, compiled
        self.block_size = model.config.block_size
        self.cache: Cache | None = None
        self.shared: tuple[list[list[int]], Cache] | None = None  # the last prompt, and a cache that has read it

    def exchange(self, rows: list[Row], done: list[int], new: list[Row]) -> list[Row]:
        """Put new rows in the places of those that are done; returns the rows that there are now."""
        if new:
            cache = self._read_once([row.ids[:-1] for row in new])
            if not rows:
                self.cache = cache
                return new
            self.cache.put(done[: len(new)], cache)
            replaced = dict(zip(done, new, strict=False))
            rows = [replaced.get(i, row) for i, row in enumerate(rows)]
        left = [i for i, row in enumerate(rows) if row.finish is None]
        if self.compiled and left:  # compiled code is for this number of rows: finished rows stay, and are ignored
            return rows
        if len(left) < len(rows):
            self.cache = self.cache.select(left) if left else None
        return [rows[i] for i in left]

    def _read_once(self, prompts: list[list[int]]) -> Cache:
        """A cache that has read the prompts; equal prompts are read only once."""
        different = list({tuple(prompt): prompt for prompt in prompts}.values())
        if self.shared is None or self.shared[0] != different:
            self.shared = different, self._read(different)
        cache = self.shared[1]
        if len(different) > 1:  # which hardly come again
            self.shared = None
        return cache.select([different.index(prompt) for prompt in prompts])

    def _read(self, prompts: list[list[int]]) -> Cache:
        lengths = [len(prompt) for prompt in prompts]
        slots = min(max(lengths) + 1 + self.room, self.block_size)
        cache = Cache(self.model.config, len(prompts), self.device, self.dtype, slots, fixed=self.compiled)
        # Padded on the right, to which causal attention never attends.
        ids = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts], device=self.device)
        size = max(1, CHUNK // len(prompts))
        for start in range(0, max(lengths), size):
            part = ids[:, start : start + size]
            cache.make_room(part.size(1))
            self.model.hidden(part, cache=cache)
            cache.advance(part, [min(max(length - start, 0), part.size(1)) for length in lengths])
        return cache

    def logits(self, rows: list[Row]) -> Tensor:
        """Logits (B, V) after the last token of each row, which is read first."""
        if self.model.config.position != "rope":  # positions end at block_size: start again with the last half of the context
            for i, filled in enumerate(self.cache.rows.filled):
                if filled == self.block_size:
                    self.cache.put([i], self._read([rows[i].ids[-(self.block_size // 2) - 1 : -1]]))
        ids = torch.tensor([[row.ids[-1]] for row in rows], device=self.device)  # (B, 1)
        self.cache.make_room(1)
        step = compiled_next_logits(self.device.type) if self.compiled else next_logits
        logits = step(self.model, ids, self.cache)
        self.cache.advance(ids, [int(row.finish is None) for row in rows])
        return logits


def next_logits(model: Any, ids: Tensor, cache: Cache) -> Tensor:
    """Logits (B, V) after the tokens ids (B, 1)."""
    return model.logits(model.hidden(ids, cache=cache)[:, -1])


@functools.cache
def compiled_next_logits(device_type: str) -> Callable[[Any, Tensor, Cache], Tensor]:
    """next_logits as one kernel after another without Python between them; on a GPU as a CUDA graph."""
    return torch.compile(next_logits, dynamic=False, mode="reduce-overhead" if device_type == "cuda" else None)

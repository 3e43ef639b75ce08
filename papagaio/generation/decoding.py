"""Decoding of a batch: each row has a request of its own, and a cache remembers what the model has read of it."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from papagaio.generation.cache import Cache
from papagaio.generation.prefixes import Prefixes
from papagaio.generation.streaming import TextStream

CHUNK = 2048  # tokens of prompts, over all rows, that are read in one forward pass


class Row:
    """A request in progress: its tokens so far, its random numbers, and its text."""

    def __init__(self, index: int, prompt: Sequence[int], seed: int, limit: int, text: TextStream) -> None:
        """`limit`: the largest number of tokens after the prompt."""
        self.index, self.ids, self.prompt_length, self.limit, self.text = index, list(prompt), len(prompt), limit, text
        self.random = random.Random(seed)
        self.finish: str | None = None
        self.reused = 0  # tokens of the prompt that were not read again


class Decoder:
    """A model, and the cache of the rows that it decodes. The cache holds all tokens of a row but the last."""

    def __init__(
        self,
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
        room: int,
        compiled: bool = False,
        prefixes: Prefixes | None = None,
    ) -> None:
        """`room` is how many tokens are to come: slots for them are allocated at once, up to the context. Rows that are done are
        kept in `prefixes`, and prompts that begin as they do are not read from the beginning; compiled code ignores it."""
        self.prefixes = None if compiled else prefixes
        self.model, self.device, self.dtype, self.room, self.compiled = model, device, dtype, room, compiled
        self.block_size = model.config.block_size
        self.cache: Cache | None = None
        self.shared: tuple[list[list[int]], Cache] | None = None  # the last prompt, and a cache that has read it

    def exchange(self, rows: list[Row], done: list[int], new: list[Row], cache: Cache | None = None) -> list[Row]:
        """Put new rows in the places of those that are done, or beside them; returns the rows that there are now.

        `cache` has read the prompts of the new rows but for their last tokens; without it they are read here."""
        if self.prefixes is not None:
            for i in done:
                self.prefixes.keep(rows[i].ids[:-1], self.cache, i)
        if new:
            cache = self._read_once(new) if cache is None else cache
            if not rows:
                self.cache = cache
                return new
            if places := done[: len(new)]:
                self.cache.put(places, cache.select(range(len(places))) if len(places) < len(new) else cache)
                replaced = dict(zip(places, new, strict=False))
                rows = [replaced.get(i, row) for i, row in enumerate(rows)]
            if len(places) < len(new):
                self.cache = Cache.joined([self.cache, cache.select(range(len(places), len(new)))])
                rows = [*rows, *new[len(places) :]]
        left = [i for i, row in enumerate(rows) if row.finish is None]
        if self.compiled and left:  # compiled code is for this number of rows: finished rows stay, and are ignored
            return rows
        if len(left) < len(rows):
            self.cache = self.cache.select(left) if left else None
        return [rows[i] for i in left]

    def _read_once(self, new: list[Row]) -> Cache:
        """A cache that has read the prompts of new rows but for their last tokens; equal prompts are read only once."""
        if self.prefixes is not None:
            *_, cache = self.reading([], new)
            return cache
        prompts = [row.ids[:-1] for row in new]
        different = list({tuple(prompt): prompt for prompt in prompts}.values())
        if self.shared is None or self.shared[0] != different:
            self.shared = different, self._read(different)
        cache = self.shared[1]
        if len(different) > 1:  # which hardly come again
            self.shared = None
        return cache.select([different.index(prompt) for prompt in prompts])

    def reading(self, rows: Sequence[Row], new: Sequence[Row], size: int = CHUNK) -> Iterator[Cache | None]:
        """Read the prompts of new rows but for their last tokens; yields None after each `size` tokens, and at last the cache.

        What `prefixes`, or one of the `rows` in progress, has read already is copied. Equal prompts are read only once.
        """
        different = list({tuple(row.ids): row for row in new}.values())
        # Those with equally long known beginnings are read together: positions of padding do not exceed the context then.
        groups: dict[int, list[tuple[Row, Cache]]] = {}
        for row in different:
            found = self.prefixes.find(row.ids[:-1], [other.ids[:-1] for other in rows], self.cache)
            found = found or Cache(self.model.config, 1, self.device, self.dtype)
            groups.setdefault(found.rows.filled[0], []).append((row, found))
        caches, places = [], dict[tuple[int, ...], tuple[int, int]]()  # ids -> row of the joined cache, tokens reused
        for reused, group in groups.items():
            places |= {tuple(row.ids): (len(places) + i, reused) for i, (row, _) in enumerate(group)}
            caches.append(Cache.joined([found for _, found in group]))
            for _ in self._parts([row.ids[reused:-1] for row, _ in group], caches[-1], size):
                yield None
        for row in new:
            row.reused = places[tuple(row.ids)][1]
        joined = Cache.joined(caches) if len(caches) > 1 else caches[0]
        order = [places[tuple(row.ids)][0] for row in new]
        yield joined if order == list(range(len(different))) else joined.select(order)

    def _read(self, prompts: list[list[int]]) -> Cache:
        slots = min(max(map(len, prompts)) + 1 + self.room, self.block_size)
        cache = Cache(self.model.config, len(prompts), self.device, self.dtype, slots, fixed=self.compiled)
        for _ in self._parts(prompts, cache, CHUNK):
            pass
        return cache

    def _parts(self, prompts: list[list[int]], cache: Cache, size: int) -> Iterator[None]:
        """Have the cache read a text for each of its rows, up to `size` tokens of all of them between two yields."""
        lengths = [len(prompt) for prompt in prompts]
        # Padded on the right, to which causal attention never attends.
        ids = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts], device=self.device)
        size = max(1, size // len(prompts))
        for start in range(0, max(lengths), size):
            part = ids[:, start : start + size]
            cache.make_room(part.size(1))
            self.model.hidden(part, cache=cache)
            cache.advance(part, [min(max(length - start, 0), part.size(1)) for length in lengths])
            yield

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

"""The key-value cache: keys and values of the tokens read so far, so that a new token costs the work of one token.

    cache = Cache(model.config, rows=2)
    cache.make_room(3)
    hidden = model.hidden(ids, cache=cache)      # ids (2, 3) -> (2, 3, C)
    cache.advance(ids, [3, 2])                   # the second row has two tokens: its third place will be overwritten

Shapes as in model.py; S slots hold one token each. Rows may have different lengths: each begins at slot 0.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 256  # slots by which a cache grows


class Rows:
    """How many tokens each row of a cache holds. The layers share it."""

    def __init__(self, count: int, context: int, slots: int, fixed: bool, device: torch.device | None) -> None:
        self.context, self.slots, self.fixed = context, slots, fixed
        self.lengths = torch.zeros(count, dtype=torch.int64, device=device)  # slots in use
        self.dropped = torch.zeros(count, dtype=torch.int64, device=device)  # tokens that came before slot 0
        self.filled = [0] * count  # equal to lengths, readable without waiting for the device

    @property
    def aligned(self) -> bool:
        """Whether all rows have the same length, so that slices can take the place of index tensors."""
        return not self.fixed and len(set(self.filled)) == 1

    def reach(self, window: int | None) -> int:
        """How many tokens back a token attends, itself included."""
        return min(window or self.context, self.context)

    def columns(self, T: int, window: int | None) -> slice:
        """The slots to which at least one row attends with its next T tokens."""
        if self.fixed:
            return slice(0, self.slots)
        return slice(max(0, min(self.filled) + 1 - self.reach(window)), max(self.filled) + T)


class LayerCache:
    """Keys and values (rows, K, S, D) of one block, which attends to the last `window` tokens (None: the whole context)."""

    def __init__(self, rows: Rows, window: int | None, *stored: Tensor) -> None:
        self.rows, self.window, self.stored = rows, window, list(stored)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (rows, K, T, D) of new tokens; returns those of the whole context (rows, K, columns, D)."""
        T, (keys, values) = k.size(2), self.stored
        k, v = k.to(keys.dtype), v.to(values.dtype)
        if self.rows.aligned:
            slots = slice(self.rows.filled[0], self.rows.filled[0] + T)
            keys[:, :, slots], values[:, :, slots] = k, v
        else:
            slots = self.rows.lengths[:, None] + torch.arange(T, device=k.device)  # (rows, T)
            row = torch.arange(len(slots), device=k.device)[:, None]
            keys[row, :, slots], values[row, :, slots] = k.transpose(1, 2), v.transpose(1, 2)
        columns = self.rows.columns(T, self.window)
        return keys[:, :, columns], values[:, :, columns]


class Cache:
    """The layers' keys and values, in the form that `GPT.hidden` takes.

    With rotary positions a row can grow beyond the context: a token attends to the last `context` tokens, and older ones are
    dropped when their slots are needed. With `fixed`, for compiled code and CUDA graphs, no shape and no Python number changes
    from step to step: attention covers all S slots, through a mask.
    """

    def __init__(
        self,
        config: Any,
        rows: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        slots: int = 0,
        fixed: bool = False,
    ) -> None:
        """config is a GPTConfig. `slots` are allocated at once, more of them when they are needed."""
        self.rows = Rows(rows, config.block_size, 0, fixed, device)
        empty = torch.zeros(rows, config.kv_heads, 0, config.head_size, device=device, dtype=dtype)
        self.layers = [LayerCache(self.rows, window, empty, empty) for window in config.windows]
        self.previous = torch.full((rows,), config.vocab_size, device=device)  # the last token's id; vocab_size: none
        self._grow(slots)

    def _mark_static(self) -> None:
        """Promise the compiler that these tensors keep their addresses: a CUDA graph then writes into them without copies."""
        if self.rows.fixed:
            stored = (tensor for layer in self.layers for tensor in layer.stored)
            for tensor in (*stored, self.rows.lengths, self.rows.dropped, self.previous):
                torch._dynamo.mark_static_address(tensor)

    # Called by the model.

    def positions(self, T: int) -> Tensor:
        """Positions (rows, T) of the next T tokens of each row."""
        return (self.rows.lengths + self.rows.dropped)[:, None] + torch.arange(T, device=self.rows.lengths.device)

    def mask(self, T: int, window: int | None) -> Tensor | None:
        """Which of the columns that `LayerCache.update` returns each of the next T tokens may attend to: (rows, 1, T, columns).

        None: all columns up to the token itself, as in training.
        """
        rows, reach = self.rows, self.rows.reach(window)
        if rows.aligned and (T == 1 or (rows.filled[0] == 0 and reach >= T)):
            return None
        columns = rows.columns(T, window)
        j = torch.arange(columns.start, columns.stop, device=rows.lengths.device)
        i = rows.lengths[:, None, None] + torch.arange(T, device=j.device)[:, None]  # (rows, T, 1)
        return ((j <= i) & (i - j < reach))[:, None]

    # Called by the engine.

    def make_room(self, T: int) -> None:
        """Have slots for T more tokens in each row, by dropping the oldest tokens once a row exceeds the context by a quarter.

        With positions that are not rotary, a row must not exceed block_size.
        """
        need, context = max(self.rows.filled) + T, self.rows.context
        if need > self.rows.slots and need > context + context // 4:
            self._drop_oldest(context - 1)
            need = max(self.rows.filled) + T
        self._grow(need)

    def _grow(self, need: int) -> None:
        more = -(-need // STEP) * STEP - self.rows.slots
        if more > 0:
            for layer in self.layers:
                layer.stored = [F.pad(tensor, (0, 0, 0, more)) for tensor in layer.stored]
            self.rows.slots += more
            self._mark_static()

    def _drop_oldest(self, keep: int) -> None:
        """Forget all but the last `keep` tokens of each row, and move these to the front; their keys stay as they are."""
        for row, filled in enumerate(self.rows.filled):
            if (drop := filled - keep) > 0:
                for tensor in (tensor for layer in self.layers for tensor in layer.stored):
                    tensor[row, :, :keep] = tensor[row, :, drop:filled].clone()
                self.rows.lengths[row] -= drop
                self.rows.dropped[row] += drop
                self.rows.filled[row] = keep

    def advance(self, ids: Tensor, counts: Sequence[int]) -> None:
        """Count the first `counts` of the ids (rows, T), which the model has just read, as part of each row."""
        rows = self.rows
        if min(counts) == max(counts) == 1:
            rows.lengths += 1
            self.previous.copy_(ids[:, 0])
        else:
            number = torch.tensor(counts, device=ids.device)
            rows.lengths += number
            last = ids.gather(1, (number - 1).clamp_min(0)[:, None])[:, 0]
            self.previous.copy_(torch.where(number > 0, last, self.previous))
        rows.filled = [filled + count for filled, count in zip(rows.filled, counts, strict=True)]

    def select(self, rows: Sequence[int]) -> "Cache":
        """A copy of some rows; a row may be taken several times."""
        index = torch.tensor(rows, device=self.rows.lengths.device)
        other, other.rows = copy.copy(self), copy.copy(self.rows)
        other.rows.lengths, other.rows.dropped = self.rows.lengths[index], self.rows.dropped[index]
        other.rows.filled = [self.rows.filled[row] for row in rows]
        other.layers = [LayerCache(other.rows, layer.window, *(t[index] for t in layer.stored)) for layer in self.layers]
        other.previous = self.previous[index]
        other._mark_static()
        return other

    def beginning(self, row: int, ids: Sequence[int]) -> "Cache":
        """A copy of the first tokens of a row, which are `ids`. No token of the row may have been dropped."""
        other, other.rows, n = copy.copy(self), copy.copy(self.rows), len(ids)
        other.rows.lengths, other.rows.dropped = self.rows.lengths.new_tensor([n]), self.rows.dropped.new_zeros(1)
        other.rows.filled, other.rows.slots = [n], n
        other.layers = [
            LayerCache(other.rows, layer.window, *(t[row : row + 1, :, :n].clone() for t in layer.stored))
            for layer in self.layers
        ]
        other.previous = self.previous.new_tensor(ids[-1:])
        return other

    @staticmethod
    def joined(caches: Sequence["Cache"]) -> "Cache":
        """A cache with the rows of several, in order."""
        first, slots = caches[0], max(cache.rows.slots for cache in caches)
        other, other.rows = copy.copy(first), copy.copy(first.rows)
        other.rows.slots, other.rows.filled = slots, [filled for cache in caches for filled in cache.rows.filled]
        other.rows.lengths = torch.cat([cache.rows.lengths for cache in caches])
        other.rows.dropped = torch.cat([cache.rows.dropped for cache in caches])
        other.layers = []
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            same = zip(*(layer.stored for layer in layers), strict=True)  # keys, and values, of all caches
            stored = [torch.cat([F.pad(t, (0, 0, 0, slots - t.size(2))) for t in tensors]) for tensors in same]
            other.layers.append(LayerCache(other.rows, layers[0].window, *stored))
        other.previous = torch.cat([cache.previous for cache in caches])
        return other

    def put(self, rows: Sequence[int], other: "Cache") -> None:
        """Replace rows by those of another cache, in order."""
        index = torch.tensor(rows, device=self.rows.lengths.device)
        used = max(other.rows.filled)
        self._grow(used)
        for layer, source in zip(self.layers, other.layers, strict=True):
            for tensor, new in zip(layer.stored, source.stored, strict=True):
                tensor[index, :, :used] = new[:, :, :used]
        self.rows.lengths[index], self.rows.dropped[index] = other.rows.lengths, other.rows.dropped
        self.previous[index] = other.previous
        for row, filled in zip(rows, other.rows.filled, strict=True):
            self.rows.filled[row] = filled

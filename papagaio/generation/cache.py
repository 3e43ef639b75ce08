"""What a model has read so far: the keys and values of every block, so that a new token costs one token's work.

    cache = Cache(model.config, rows=2)
    cache.make_room(3)
    hidden = model.hidden(ids, cache=cache)      # ids (2, 3) -> (2, 3, C)
    cache.advance(ids, [3, 2])                   # the second row had two tokens; what was written after them does not count

Shapes as in model.py; S slots are room for so many tokens. Rows may be of different lengths: each begins at slot 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

STEP = 256  # slots by which a cache grows


class Cache:
    """Keys and values (rows, K, S, D) of each block, and how many tokens of each row they hold.

    A row goes on beyond the context where positions are rotary: a token sees the last `context` tokens, older ones are
    dropped when room is needed. `fixed` is the form for compiled code and CUDA graphs: no shape and no number in it changes
    from step to step, so that all S slots are looked at, through a mask.
    """

    def __init__(
        self,
        config: Any,
        rows: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        context: int | None = None,
        slots: int = 0,
        fixed: bool = False,
    ) -> None:
        """config is a GPTConfig; a token sees the last `context` tokens, at most and by default block_size. Slots are
        allocated at once, and more in steps as they are needed."""
        self.context, self.fixed, self.slots = context or config.block_size, fixed, _round_up(slots)
        shape = (rows, config.kv_heads, self.slots, config.head_size)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # slots in use
        self.dropped = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens that were there before slot 0
        self.previous = torch.full((rows,), config.vocab_size, device=device)  # the last token; vocab_size: none
        self.filled = [0] * rows  # the same as lengths, where the device need not be asked
        self._stay()

    def _stay(self) -> None:
        """Promise the compiler that these tensors stay where they are: a CUDA graph then writes into them, without copies."""
        if self.fixed:
            for tensor in (*self.keys, *self.values, self.lengths, self.dropped, self.previous):
                torch._dynamo.mark_static_address(tensor)

    # What the model asks.

    def positions(self, T: int) -> Tensor:
        """Positions (rows, T) of the next T tokens of each row."""
        return (self.lengths + self.dropped)[:, None] + torch.arange(T, device=self.lengths.device)

    def mask(self, T: int, window: int | None) -> Tensor | None:
        """Which columns of what `store` gives the next T tokens may look at: (rows, 1, T, columns).

        None: all up to themselves, as in training, or for a single token all.
        """
        reach = self._reach(window)
        if not self.fixed and len(set(self.filled)) == 1 and (T == 1 or (self.filled[0] == 0 and reach >= T)):
            return None
        columns = self._columns(T, window)
        j = torch.arange(columns.start, columns.stop, device=self.lengths.device)
        i = self.lengths[:, None, None] + torch.arange(T, device=j.device)[:, None]  # (rows, T, 1)
        return ((j <= i) & (i - j < reach))[:, None]

    def store(self, layer: int, window: int | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a block's keys and values (rows, K, T, D) of new tokens; returns those of all that may be looked at."""
        keys, values, T = self.keys[layer], self.values[layer], k.size(2)
        k, v = k.to(keys.dtype), v.to(values.dtype)
        if not self.fixed and len(set(self.filled)) == 1:
            slots = slice(self.filled[0], self.filled[0] + T)
            keys[:, :, slots], values[:, :, slots] = k, v
        else:
            slots = self.lengths[:, None] + torch.arange(T, device=k.device)  # (rows, T)
            rows = torch.arange(len(slots), device=k.device)[:, None]
            keys[rows, :, slots], values[rows, :, slots] = k.transpose(1, 2), v.transpose(1, 2)
        columns = self._columns(T, window)
        return keys[:, :, columns], values[:, :, columns]

    def _columns(self, T: int, window: int | None) -> slice:
        """Slots that at least one row looks at."""
        if self.fixed:
            return slice(0, self.slots)
        return slice(max(0, min(self.filled) + 1 - self._reach(window)), max(self.filled) + T)

    def _reach(self, window: int | None) -> int:
        """How many tokens back a token looks, itself included."""
        return min(window or self.context, self.context)

    # What the caller does.

    def make_room(self, T: int) -> None:
        """Have slots for T more tokens in each row; beyond the context and some slack the oldest tokens make room.

        Whoever uses a model whose positions are not rotary must not go on beyond block_size.
        """
        need = max(self.filled) + T
        if need > self.slots and need > self.context + self.context // 4:
            self._drop_oldest(self.context - 1)
            need = max(self.filled) + T
        self._grow(need)

    def _grow(self, need: int) -> None:
        if need > self.slots:
            grown = _round_up(need)
            for tensors in (self.keys, self.values):
                for i, tensor in enumerate(tensors):
                    tensors[i] = torch.cat((tensor, tensor.new_zeros(*tensor.shape[:2], grown - self.slots, tensor.size(3))), 2)
            self.slots = grown
            self._stay()

    def _drop_oldest(self, keep: int) -> None:
        """Forget all but the last `keep` tokens of each row; what is kept moves to the front, its keys as they are."""
        for row, filled in enumerate(self.filled):
            if (drop := filled - keep) > 0:
                for tensor in (*self.keys, *self.values):
                    tensor[row, :, :keep] = tensor[row, :, drop:filled].clone()
                self.lengths[row] -= drop
                self.dropped[row] += drop
                self.filled[row] = keep

    def advance(self, ids: Tensor, counts: Sequence[int]) -> None:
        """Of the ids (rows, T) that the model has just read, the first `counts` of each row count."""
        if min(counts) == max(counts) == 1:
            self.lengths += 1
            self.previous.copy_(ids[:, 0])
        else:
            number = torch.tensor(counts, device=ids.device)
            self.lengths += number
            last = ids.gather(1, (number - 1).clamp_min(0)[:, None])[:, 0]
            self.previous.copy_(torch.where(number > 0, last, self.previous))
        self.filled = [filled + count for filled, count in zip(self.filled, counts, strict=True)]

    def select(self, rows: Sequence[int]) -> "Cache":
        """A copy of some rows; a row may be taken several times."""
        index = torch.tensor(rows, device=self.lengths.device)
        other = Cache.__new__(Cache)
        other.context, other.fixed, other.slots = self.context, self.fixed, self.slots
        other.keys, other.values = ([tensor[index] for tensor in tensors] for tensors in (self.keys, self.values))
        other.lengths, other.dropped, other.previous = self.lengths[index], self.dropped[index], self.previous[index]
        other.filled = [self.filled[row] for row in rows]
        other._stay()
        return other

    def put(self, rows: Sequence[int], other: "Cache") -> None:
        """Replace rows by those of another cache, one for each."""
        index = torch.tensor(rows, device=self.lengths.device)
        used = max(other.filled)
        self._grow(used)
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for tensor, source in zip(ours, theirs, strict=True):
                tensor[index, :, :used] = source[:, :, :used]
        for name in ("lengths", "dropped", "previous"):
            getattr(self, name)[index] = getattr(other, name)
        for row, filled in zip(rows, other.filled, strict=True):
            self.filled[row] = filled


def _round_up(slots: int) -> int:
    return -(-slots // STEP) * STEP

"""Continuous batching: requests join and leave the batch between two tokens, each with its own sampling.

    scheduler = Scheduler(engine, deliver, max_batch_size=16, max_queue=64, cache_tokens=16384)
    scheduler.start()
    scheduler.submit([Ticket(engine, 0, prompt, seed, limit, options, top, receiver)])   # deliver([(receiver, step), ...])
    ticket.cancel()                                                                      # frees its place before the next token

One thread owns the model. Each turn reads a part of a new prompt, draws a token for every row, and hands the tokens over.
"""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from papagaio import runtime
from papagaio.errors import MachineError, UserError
from papagaio.generation.cache import Cache
from papagaio.generation.decoding import Decoder, Row
from papagaio.generation.engine import Engine, Step
from papagaio.generation.options import SamplingOptions
from papagaio.generation.prefixes import Prefixes
from papagaio.generation.sampling import Sampler, Token
from papagaio.generation.streaming import TextStream

PART = 512  # tokens of prompts that are read between two tokens of the rows in progress
Event = tuple[Any, Step | Exception]  # the receiver of a ticket, and what has come of it


class QueueFull(Exception):
    """No place is free, and as many requests wait as may."""


class Ticket(Row):
    """A row with its own sampling, and whether its client still waits for it."""

    def __init__(
        self,
        engine: Engine,
        index: int,
        prompt: Sequence[int],
        seed: int,
        limit: int,
        options: SamplingOptions,
        top: int | None,
        receiver: Any,
    ) -> None:
        """`receiver` comes back with each step. Raises UserError for options with ids outside the vocabulary."""
        super().__init__(index, prompt, seed, limit, TextStream(engine.tokenizer, options.stop))
        self.receiver = receiver
        self.sampler = Sampler(options, engine.model.config.vocab_size, engine.banned, top, engine.device)
        self.kind = (options.model_copy(update={"stop": (), "seed": 0, "max_new_tokens": 1}), top)  # equal: drawn together

    def cancel(self) -> None:
        self.finish = self.finish or "cancelled"


class Scheduler:
    """Computes the answers of all requests in a thread of its own."""

    def __init__(
        self, engine: Engine, deliver: Callable[[list[Event]], None], max_batch_size: int, max_queue: int, cache_tokens: int
    ) -> None:
        """`deliver` is called in the scheduler's thread, once for each turn."""
        self.deliver = deliver
        self.engine, self.max_batch_size, self.max_queue = engine, max_batch_size, max_queue
        self.prefixes = Prefixes(cache_tokens)
        self.decoder = self._decoder()
        self.rows: list[Ticket] = []
        self.new: list[Ticket] = []  # whose prompts are being read
        self.reading: Iterator[Cache | None] = iter(())
        self.waiting, self.calls = deque[Ticket](), deque[tuple[Callable[[], Any], Future]]()
        self.changed, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def _decoder(self) -> Decoder:
        engine = self.engine
        return Decoder(engine.model, engine.device, engine.dtype, 0, prefixes=self.prefixes)

    @property
    def running(self) -> int:
        return len(self.rows) + len(self.new)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """End the thread after the turn that it is at."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Have these rows answered as soon as places are free. Raises QueueFull if too many wait already."""
        with self.changed:
            self.waiting = deque(ticket for ticket in self.waiting if not ticket.finish)
            free = max(self.max_batch_size - self.running, 0)
            if len(self.waiting) + len(tickets) > free + self.max_queue:
                raise QueueFull
            self.waiting += tickets
            self.changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Have a function called between two tokens, in the thread that owns the model."""
        future: Future = Future()
        with self.changed:
            if len(self.calls) >= self.max_batch_size + self.max_queue:
                raise QueueFull
            self.calls.append((function, future))
            self.changed.notify()
        return future

    def _run(self) -> None:
        engine = self.engine
        with torch.inference_mode(), runtime.evaluating(engine.model), runtime.autocast(engine.device, engine.dtype):
            while self._wait():
                try:
                    self._turn()
                except Exception as error:  # the rows of this turn are lost, not the server
                    if isinstance(error, MachineError | MemoryError):
                        print(f"error: {error or 'out of memory'}", file=sys.stderr)
                    else:
                        traceback.print_exc()
                    lost, self.rows, self.new, self.reading = [*self.rows, *self.new], [], [], iter(())
                    self.decoder = self._decoder()
                    self.deliver([(ticket.receiver, error) for ticket in lost])

    def _wait(self) -> bool:
        """Wait until there is something to do; false if the scheduler was closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.rows or self.new or self.waiting or self.calls)
            if not self.new and self.waiting:
                free = self.max_batch_size - sum(row.finish is None for row in self.rows)
                while self.waiting and len(self.new) < free:
                    if not (ticket := self.waiting.popleft()).finish:
                        self.new.append(ticket)
                if self.new:
                    self.reading = self.decoder.reading(self.rows, self.new, PART)
            return not self.closed

    def _turn(self) -> None:
        """Read a part of new prompts, and draw a token for each row."""
        if self.calls:
            function, future = self.calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
        if self.new and all(ticket.finish for ticket in self.new):
            self.new = []
        new, cache = [], None
        if self.new:
            cache = next(self.reading)
            if cache is not None:
                new, self.new = self.new, []
        done = [i for i, row in enumerate(self.rows) if row.finish]
        self.rows = self.decoder.exchange(self.rows, done, new, cache)
        if self.rows:
            logits = self.decoder.logits(self.rows)
            steps = zip(self.rows, self._draw(logits), strict=True)
            self.deliver([(row.receiver, step) for row, step in steps if step is not None])

    def _draw(self, logits: torch.Tensor) -> list[Step | Exception | None]:
        """A step for each row, or why it has none."""
        found: list[Step | Exception | None] = [None] * len(self.rows)
        kinds: dict[Any, list[int]] = {}
        for i, row in enumerate(self.rows):
            kinds.setdefault(row.kind, []).append(i)
        for places in kinds.values():
            for i, token in zip(places, self._sample(logits, places), strict=True):
                row = self.rows[i]
                if isinstance(token, Exception):
                    row.finish, found[i] = "error", token
                elif row.finish is None:
                    found[i] = self.engine.append(row, token, self.engine.end)
                else:  # cancelled meanwhile: as many ids as for the other rows
                    row.ids.append(token.id)
        return found

    def _sample(self, logits: torch.Tensor, places: list[int]) -> Sequence[Token | Exception]:
        rows = [self.rows[i] for i in places]
        try:
            return rows[0].sampler(logits if len(places) == len(logits) else logits[places], rows)
        except UserError as error:  # of one of them
            return [error] if len(places) == 1 else [self._sample(logits, [i])[0] for i in places]


def mean_hidden(engine: Engine, ids: Sequence[int]) -> list[float]:
    """The mean over the tokens `ids` of the hidden states after the last block and its norm: (C,)."""
    hidden = engine.model.hidden(torch.tensor([list(ids)], device=engine.device))  # (1, T, C)
    return hidden[0].float().mean(0).tolist()

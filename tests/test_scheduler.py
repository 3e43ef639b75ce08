"""papagaio/serving/scheduler.py: rows that join, leave and fail between tokens."""

import queue
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from papagaio.errors import MachineError, UserError
from papagaio.generation.engine import Engine, Request, Step
from papagaio.generation.options import SamplingOptions
from papagaio.serving.scheduler import QueueFull, Scheduler, Ticket
from papagaio.tokenizer import ByteTokenizer

GREEDY = SamplingOptions(temperature=0)


class Bench:
    """An engine with random weights, a scheduler, and a queue of steps for each ticket."""

    def __init__(self, batch: int = 4, waiting: int = 64, position: str = "rope", block_size: int = 256) -> None:
        torch.manual_seed(0)
        tokenizer = ByteTokenizer()
        shape = dict(block_size=block_size, n_layer=2, n_head=2, n_embd=32, zero_init=False, window_pattern="SL")
        self.engine = Engine(GPT(GPTConfig(vocab_size=tokenizer.vocab_size, position=position, **shape)), tokenizer)
        self.engine.end, self.engine.banned = {-1}, set(tokenizer.special.values())  # no answer ends by itself
        self.scheduler = Scheduler(self.engine, self.deliver, batch, waiting, 4096)
        self.scheduler.start()

    @staticmethod
    def deliver(events: list[tuple[queue.Queue, Any]]) -> None:
        for receiver, event in events:
            receiver.put(event)

    def ticket(self, text: str, limit: int, options: SamplingOptions = GREEDY) -> Ticket:
        return Ticket(self.engine, 0, self.engine.encode(text), 3, limit, options, None, queue.Queue())

    def drawn(self, ticket: Ticket) -> list[int]:
        """All tokens of a ticket. Raises what it failed of."""
        found: list[Step] = []
        while not found or not found[-1].finish:
            found.append(ticket.receiver.get(timeout=60))
            if isinstance(found[-1], Exception):
                raise found[-1]
        return [step.token.id for step in found]

    def alone(self, text: str, limit: int, options: SamplingOptions = GREEDY) -> list[int]:
        steps = self.engine.complete(
            [Request(self.engine.encode(text), 3, limit)], options.model_copy(update={"max_new_tokens": limit})
        )
        return [step.token.id for step in steps]


@pytest.fixture
def bench() -> Any:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for each in made:
        each.scheduler.close()


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "none"])
def test_each_row_has_the_tokens_that_it_has_alone(bench: Any, position: str) -> None:
    """Eleven requests for three places, of different lengths and samplings, some with equal beginnings, one as long as may be."""
    b = bench(batch=3, position=position)
    common = "A beginning that several have in common. "
    hot = SamplingOptions(temperature=1.2, top_k=40, presence_penalty=1.0)
    cases = [(f"{common}{i}", 5 + 7 * i % 23, hot if i % 3 == 0 else GREEDY) for i in range(8)]
    cases += [("x" * 250, 5, GREEDY), ("short", 40, hot), (f"{common}0", 9, GREEDY)]
    tickets = [b.ticket(*case) for case in cases]
    for ticket in tickets:
        b.scheduler.submit([ticket])
    assert [b.drawn(ticket) for ticket in tickets] == [b.alone(*case) for case in cases]
    assert sum(ticket.reused for ticket in tickets) > 100


def test_a_ticket_that_is_cancelled_draws_no_more(bench: Any) -> None:
    b = bench(batch=1, waiting=1, block_size=100_000)
    endless, next_one = b.ticket("x", 90_000), b.ticket("y", 4)
    b.scheduler.submit([endless])
    endless.receiver.get(timeout=60)
    b.scheduler.submit([next_one])
    endless.cancel()
    assert b.drawn(next_one) == b.alone("y", 4)
    assert len(endless.ids) < 80_000


def test_a_full_queue_refuses(bench: Any) -> None:
    b = bench(batch=1, waiting=1, block_size=100_000)
    tickets = [b.ticket("x", 90_000) for _ in range(3)]
    b.scheduler.submit(tickets[:2])
    with pytest.raises(QueueFull):
        b.scheduler.submit(tickets[2:])
    tickets[1].cancel()  # which waits
    b.scheduler.submit(tickets[2:])
    for ticket in tickets:
        ticket.cancel()


def test_options_that_rule_out_every_token_fail_alone(bench: Any) -> None:
    b = bench()
    wrong = SamplingOptions(temperature=0, repetition_penalty=1e-300)
    bad, good = b.ticket("aaaa", 20, wrong), b.ticket("b", 20)
    b.scheduler.submit([bad, good])
    assert b.drawn(good) == b.alone("b", 20)
    with pytest.raises(UserError, match="repetition_penalty"):
        b.drawn(bad)


def test_a_failure_of_a_turn_ends_its_rows_and_not_the_server(bench: Any, capfd: pytest.CaptureFixture[str]) -> None:
    b = bench()
    logits = b.engine.model.logits
    b.engine.model.logits = lambda x: logits(x) * float("nan")
    ticket = b.ticket("x", 5)
    b.scheduler.submit([ticket])
    with pytest.raises(MachineError):
        b.drawn(ticket)
    b.engine.model.logits = logits
    after = b.ticket("x", 5)
    b.scheduler.submit([after])
    assert b.drawn(after) == b.alone("x", 5)
    assert "Traceback" not in capfd.readouterr().err


def test_memory_for_rows_is_given_back(bench: Any) -> None:
    b = bench(batch=8)
    for _ in range(3):
        tickets = [b.ticket(f"{i} some text", 20) for i in range(30)]
        b.scheduler.submit(tickets)
        for ticket in tickets:
            b.drawn(ticket)
    last = b.ticket("x", 1)
    b.scheduler.submit([last])
    b.drawn(last)
    assert len(b.scheduler.rows) <= 1
    assert b.scheduler.prefixes.tokens <= 4096

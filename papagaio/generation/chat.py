"""A conversation with a model, as events: a terminal, a page and an API show the same ones in their own way.

chat = Chat(engine, SamplingOptions(temperature=0))
for event in chat.ask("What is the currency of Brazil?"):
    if isinstance(event, Text): ...      # a piece of the answer, one per token, which may be empty
    if isinstance(event, Notice): ...    # what the user should know
    if isinstance(event, Reply): ...     # the end: the whole answer, and how it came about
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from papagaio.batches.conversations import Message, render_prompt
from papagaio.errors import UserError
from papagaio.generation.engine import Engine, Request
from papagaio.generation.options import SamplingOptions
from papagaio.generation.prefixes import Prefixes

FORGOTTEN = "the oldest turns were forgotten: the context is full"


class Text(NamedTuple):
    text: str


class Notice(NamedTuple):
    text: str


@dataclass
class Reply:
    """An answer, its tokens, the seconds that it took, and why it ended: "end", "stop", "length", or "" if it was broken off."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    finish: str = ""


class Chat:
    """A conversation. A model that was not fine-tuned continues the last message instead of answering it."""

    def __init__(self, engine: Engine, sampling: SamplingOptions, system: str = "") -> None:
        self.engine, self.sampling = engine, sampling
        self.prefixes = Prefixes(2 * engine.block_size)  # what the model has read of the conversation
        self.reset(system)

    def reset(self, system: str) -> None:
        """Begin a new conversation, with this system message unless it is empty."""
        self.system, self.turns = system, list[Message]()
        self.hidden = 0  # turns at the beginning that the model does not see any more
        self.noticed, self.retries, self.reply = False, 0, Reply()

    def messages(self, skip: int = 0) -> list[Message]:
        """The conversation without its first `skip` turns."""
        return [Message(role="system", content=self.system)] * bool(self.system) + self.turns[skip:]

    def ask(self, question: str) -> Iterator[Text | Notice | Reply]:
        """Answer a question, and keep both. An answer that is broken off, by closing the iterator, is kept as far as it got.

        Raises UserError if the question does not fit into the context; it is not kept then.
        """
        try:
            self.turns.append(Message(role="user", content=question))
        except ValueError:  # bytes that are not UTF-8 arrive as halves of surrogate pairs
            raise UserError("the question is not UTF-8 text") from None
        self.retries = 0
        return self._answer()

    def retry(self) -> Iterator[Text | Notice | Reply]:
        """Answer the last question again, with the next seed."""
        if not self.turns:
            raise UserError("nothing has been asked yet")
        self.retries += 1
        self.turns.pop()
        return self._answer()

    def _answer(self) -> Iterator[Text | Notice | Reply]:
        self.reply, start = Reply(), time.perf_counter()
        try:
            prompt, notice = self._prompt()
        except UserError:
            self.turns.pop()
            raise
        try:
            if notice:
                yield Notice(notice)
            truncated = False
            request = Request(prompt, self.sampling.seed + self.retries)
            for step in self.engine.complete([request], self.sampling, prefixes=self.prefixes):
                self.reply.text += step.text
                self.reply.tokens += 1
                self.reply.finish = step.finish or ""
                truncated = step.truncated
                yield Text(step.text)
            if truncated and not self.noticed:
                self.noticed = True
                yield Notice(FORGOTTEN)
        finally:
            self.reply.seconds = time.perf_counter() - start
            self.turns.append(Message(role="assistant", content=self.reply.text))
        yield self.reply

    def _prompt(self) -> tuple[list[int], str]:
        """Token ids for the model to continue, and a notice."""
        ids, more = prompt_ids(self.engine, self.messages(self.hidden), self.sampling.max_new_tokens)
        self.hidden += more
        if not self.engine.is_chat and len(ids) > self.engine.block_size:
            return ids, f"the text has {len(ids)} tokens; the model sees the last {self.engine.block_size}"
        if more and not self.noticed:
            self.noticed = True
            return ids, FORGOTTEN
        return ids, ""


def prompt_ids(engine: Engine, messages: Sequence[Message], max_new_tokens: int) -> tuple[list[int], int]:
    """Token ids for the model to continue, and how many of the oldest turns were left out to have room for an answer.

    A model that was not fine-tuned gets the last message alone. Raises UserError if the question does not fit into the context.
    """
    if not engine.is_chat:
        return engine.encode(messages[-1].content), 0
    system = [message for message in messages[:1] if message.role == "system"]
    turns = messages[len(system) :]
    room = min(max_new_tokens, engine.block_size // 4)
    hidden = 0
    while len(ids := render_prompt(engine.tokenizer, [*system, *turns[hidden:]])) + room > engine.block_size:
        if hidden < len(turns) - 1:
            hidden += 2
        elif len(ids) < engine.block_size:
            break
        else:
            needed = f"the question has {len(ids)} tokens, the model's context only {engine.block_size}"
            raise UserError(f"{needed}: ask a shorter one")
    return ids, hidden

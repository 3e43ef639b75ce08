"""The tokens of a request's choices, and their forms in OpenAI's API: whole answers and the chunks of a stream."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from papagaio.errors import UserError
from papagaio.generation.engine import Step
from papagaio.serving.metrics import Metrics
from papagaio.serving.scheduler import Ticket
from papagaio.serving.schema import APIError, ChatBody, CompletionBody
from papagaio.tokenizer import Tokenizer

FINISH = {"end": "stop", "stop": "stop", "length": "length"}
LEAST_LOGPROB = -9999.0  # OpenAI's number for a token that is impossible


class Generation:
    """The choices of one request while they are drawn."""

    def __init__(self, body: ChatBody | CompletionBody, tickets: Sequence[Ticket], metrics: Metrics, timeout: float) -> None:
        self.body, self.tickets, self.metrics, self.timeout = body, tickets, metrics, timeout
        self.queue: asyncio.Queue[Step | Exception] = asyncio.Queue()
        self.tokens, self.begin = 0, time.perf_counter()
        self.texts = [""] * len(tickets)
        for ticket in tickets:
            ticket.receiver = self

    async def steps(self) -> AsyncIterator[Step]:
        """All steps of all choices. Raises APIError for what goes wrong."""
        left = len(self.tickets)
        deadline = self.begin + self.timeout
        while left:
            try:
                async with asyncio.timeout(deadline - time.perf_counter()):
                    event = await self.queue.get()
            except TimeoutError:
                raise APIError(504, f"not finished within {self.timeout:g} seconds (--request_timeout)", code="timeout") from None
            if isinstance(event, UserError):
                raise APIError(400, str(event))
            if isinstance(event, Exception):
                raise APIError(500, "the answer could not be computed; the server's log says why")
            if self.tokens == 0:
                self.metrics.first.observe(time.perf_counter() - self.begin)
            self.tokens += 1
            self.texts[event.index] += event.text
            left -= event.finish is not None
            yield event

    def close(self) -> str:
        """Give the places back, count, and return a line for the log."""
        for ticket in self.tickets:
            ticket.cancel()
        usage = self.usage
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.metrics.cached_tokens.inc(cached)
        self.metrics.tokens.inc(self.tokens)
        return f"{usage['prompt_tokens']} tokens read, {cached} of them known; {self.tokens} drawn"

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts, each counted once, and of all choices."""
        prompts = self.tickets[:: self.body.n]
        read = sum(ticket.prompt_length for ticket in prompts)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.tokens,
            "total_tokens": read + self.tokens,
            "prompt_tokens_details": {"cached_tokens": sum(ticket.reused for ticket in prompts)},
        }


class Form:
    """The form of /v1/chat/completions, or of /v1/completions."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer) -> None:
        self.generation, self.tokenizer, self.body = generation, tokenizer, generation.body
        self.chat = isinstance(self.body, ChatBody)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.body.model,
        }
        self.special = set(tokenizer.special.values())
        self.offsets = [0] * len(generation.tickets)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        entries: list[list[dict[str, Any]]] = [[] for _ in self.generation.tickets]
        finish: dict[int, str] = {}
        async for step in self.generation.steps():
            entries[step.index] += self.entries(step)
            if step.finish:
                finish[step.index] = FINISH[step.finish]
        choices = []
        for i, text in enumerate(self.generation.texts):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            logprobs = None if self.body.top is None else self.logprobs(i, entries[i])
            choices.append({"index": i, **said, "logprobs": logprobs, "finish_reason": finish[i]})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.generation.usage}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events, which end with [DONE]; an error becomes the last event but that."""
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        try:
            if self.chat:
                for i in range(len(self.generation.tickets)):
                    yield self.event([self.choice(i, {"role": "assistant", "content": ""}, None, None)], more)
            async for step in self.generation.steps():
                entries, finish = self.entries(step), FINISH.get(step.finish or "")
                logprobs = self.logprobs(step.index, entries) if entries else None
                said = {"content": step.text} if self.chat else step.text
                if finish and self.chat:  # OpenAI's last chunk has no text
                    if step.text or entries:
                        yield self.event([self.choice(step.index, said, logprobs, None)], more)
                    yield self.event([self.choice(step.index, {}, None, finish)], more)
                elif step.text or entries or finish:
                    yield self.event([self.choice(step.index, said, logprobs, finish)], more)
            if with_usage:
                yield self.event([], {"usage": self.generation.usage})
        except APIError as error:
            yield f"data: {json.dumps(error.content)}\n\n"
        yield "data: [DONE]\n\n"

    def choice(self, index: int, said: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta" if self.chat else "text": said, "logprobs": logprobs, "finish_reason": finish}

    def event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        content = {**self.head, "object": kind, "choices": choices, **more}
        return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def entries(self, step: Step) -> list[dict[str, Any]]:
        """The token of a step with its log-probability; nothing for an end token, or if they were not asked for."""
        token = step.token
        if token.logprob is None or step.finish == "end":
            return []
        top = [self.entry(*pair) for pair in token.top] if self.body.top else []
        return [{**self.entry(token.id, token.logprob), "top_logprobs": top}]

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token: its text, log-probability and bytes; beside OpenAI's fields its id, and of a special token whether it ends
        answers or is never drawn."""
        content = self.tokenizer.decode_bytes([token])
        found = {"token": content.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(content)}
        kind = {"special": "end" if token in self.tokenizer.ends else "never drawn"} if token in self.special else {}
        return {**found, "id": token, **kind}

    def logprobs(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """Log-probabilities in the form of chat completions; for completions also in their own."""
        if self.chat:
            return {"content": entries, "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in reversed(entry["top_logprobs"])} for entry in entries],
            "text_offset": offsets,
            "content": entries,
        }

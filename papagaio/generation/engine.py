"""Autoregression: draw a token, append it, ask the model again.

    for step in complete(model, [Request([1, 2, 3], seed=1)], options, block_size=1024): ...
    tokens = list(generate(model, [1, 2, 3], options, block_size=1024))

Many requests share the forward passes: each row of the batch is at a place of its own, and one that is finished makes room
for the next request.
"""

import functools
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from papagaio.errors import MachineError, UserError
from papagaio.generation.cache import Cache
from papagaio.generation.options import SamplingOptions
from papagaio.generation.sampling import add_bias, ban, draw, filtered, force, penalize_frequency, penalize_repetition
from papagaio.generation.streaming import TextStream
from papagaio.tokenizer import END, END_OF_TEXT, Tokenizer

CHUNK = 2048  # tokens of all rows that are read at a time


class Model(Protocol):
    """What generation needs of a model: hidden states (B, T, C) of ids (B, T), and logits (..., V) of hidden states."""

    config: Any

    def hidden(self, ids: Tensor, doc_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor: ...

    def logits(self, x: Tensor) -> Tensor: ...


def special_ids(tokenizer: Tokenizer) -> dict[str, set[int]]:
    """What `complete` is to know of the special tokens: those at which a text ends, and those that are not drawn."""
    end = {tokenizer.special[END_OF_TEXT], tokenizer.special[END]}
    return {"end": end, "banned": set(tokenizer.special.values()) - end}


class Request(NamedTuple):
    """A prompt of at least one token to complete, and the seed of its draws."""

    prompt: Sequence[int]
    seed: int = 0


class Token(NamedTuple):
    """A token that was drawn. On demand what the model itself, before any option, gave it: log-probabilities in nats of it
    and of the most probable tokens, best first."""

    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Step(NamedTuple):
    """What a request has got: a token, the text that is certain with it, and at its last step why it ends there: "end" (an
    end token, which is this step's), "stop" (one of the stop texts) or "length"."""

    index: int
    token: Token
    text: str
    finish: str | None


class Row:
    """A request on its way."""

    def __init__(self, index: int, request: Request, block_size: int, text: TextStream | None) -> None:
        self.index, self.text, self.finish = index, text, None
        self.ids = list(request.prompt)[-block_size:]
        self.prompt_length = len(self.ids)
        self.random = random.Random(request.seed)

    @property
    def drawn(self) -> int:
        return len(self.ids) - self.prompt_length

    def take(self, token: Token, options: SamplingOptions, end: Collection[int]) -> Step:
        """Append a token, and see whether it is the last."""
        text = ""
        self.ids.append(token.id)
        if token.id in end:
            self.finish = "end"
        elif self.text is not None:
            text = self.text.push(token.id, may_stop=self.drawn >= options.min_new_tokens)
            self.finish = "stop" if self.text.stopped else None
        if self.finish is None and self.drawn == options.max_new_tokens:
            self.finish = "length"
        if self.finish and self.text is not None:
            text += self.text.close()
        return Step(self.index, token, text, self.finish)


@torch.inference_mode()
def complete(
    model: Model,
    requests: Iterable[Request],
    options: SamplingOptions,
    *,
    block_size: int,
    banned: Iterable[int] = (),
    end: Iterable[int] = (),
    device: torch.device | None = None,
    batch_size: int = 1,
    text: Callable[[], TextStream] | None = None,
    top: int | None = None,
    notice: Callable[[], None] | None = None,
    compiled: bool = False,
) -> Iterator[Step]:
    """Complete the requests, up to batch_size of them at a time; steps come as they are made, rows in turn.

    The model sees the last block_size tokens; `notice` is called once, when it begins to forget. Tokens in `banned` are not
    drawn. With `text`, which makes a stream for each row, steps carry text and stop texts are obeyed. With `top`, tokens
    carry log-probabilities, and those of so many of the most probable tokens. `compiled` has torch compile the step of a
    token, which takes it a while at first.
    """
    choose = Chooser(options, model.config.vocab_size, set(banned), set(end), top)
    decoder = Decoder(model, block_size, device, options.max_new_tokens, compiled)
    queue = enumerate(requests)
    rows: list[Row] = []
    while True:
        done = [i for i, row in enumerate(rows) if row.finish]
        new = [
            Row(index, request, block_size, text() if text else None)
            for index, request in itertools.islice(queue, batch_size - len(rows) + len(done))
        ]
        rows = decoder.exchange(rows, done, new)
        if not rows:
            return
        if notice is not None and any(len(row.ids) > block_size for row in rows):
            notice()
            notice = None
        for row, token in zip(rows, choose(decoder.step(rows), rows), strict=True):
            if row.finish is None:
                yield row.take(token, options, choose.end)


def generate(
    model: Model,
    prompt: Sequence[int],
    options: SamplingOptions,
    *,
    block_size: int,
    banned: Iterable[int] = (),
    end: Iterable[int] = (),
    device: torch.device | None = None,
) -> Iterator[int]:
    """Token ids that follow the prompt, up to max_new_tokens or before a token in `end`: `complete` for one request."""
    request = Request(prompt, options.seed)
    for step in complete(model, [request], options, block_size=block_size, banned=banned, end=end, device=device):
        if step.finish != "end":
            yield step.token.id


def greedy_batch(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, end: int, device: torch.device | None = None
) -> list[list[int]]:
    """The most probable continuation of each prompt, up to max_new_tokens, or to `end`, which is included."""
    options = SamplingOptions(checkpoint="", temperature=0, max_new_tokens=max_new_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    context = {"block_size": model.config.block_size, "end": [end], "device": device, "batch_size": len(prompts)}
    for step in complete(model, map(Request, prompts), options, **context):
        found[step.index].append(step.token.id)
    return found


class Decoder:
    """A model, and the cache of the rows that it decodes. Of each row all tokens but the last have been read."""

    def __init__(self, model: Model, block_size: int, device: torch.device | None, room: int = 0, compiled: bool = False) -> None:
        """`room` is how many tokens are to come: so many slots are allocated at once, as far as the context goes."""
        self.model, self.block_size, self.device, self.room = model, block_size, device, room
        self.compiled = compiled
        self.cache: Cache | None = None
        self.shared: tuple[list[int], Cache] | None = None  # a prompt of several requests, and what has been read of it

    def exchange(self, rows: list[Row], done: list[int], new: list[Row]) -> list[Row]:
        """Rows of which those in `done` have made room for new ones; returns those that are there now."""
        rows = list(rows)
        if new:
            cache = self.read([row.ids[:-1] for row in new])
            if not rows:
                self.cache = cache
                return new
            self.cache.put(done[: len(new)], cache)
            for i, row in zip(done, new, strict=False):
                rows[i] = row
        left = [i for i, row in enumerate(rows) if row.finish is None]
        if self.compiled and left:  # for the number of rows at hand; those that are finished are taken along
            return rows
        if len(left) < len(rows):
            self.cache = self.cache.select(left) if left else None
        return [rows[i] for i in left]

    def read(self, prompts: list[list[int]]) -> Cache:
        """A cache that has read the prompts, each once."""
        different = list({tuple(prompt): prompt for prompt in prompts}.values())
        if len(different) == 1 and self.shared is not None and self.shared[0] == different[0]:
            cache = self.shared[1]
        else:
            cache = self._read(different)
        if len(different) == 1:
            self.shared = (different[0], cache)
        return cache.select([different.index(prompt) for prompt in prompts])

    def _read(self, prompts: list[list[int]]) -> Cache:
        lengths = [len(prompt) for prompt in prompts]
        enabled = torch.is_autocast_enabled((self.device or torch.device("cpu")).type)
        dtype = torch.get_autocast_dtype((self.device or torch.device("cpu")).type) if enabled else torch.float32
        slots = min(max(lengths) + 1 + self.room, self.block_size)
        cache = Cache(self.model.config, len(prompts), self.device, dtype, self.block_size, slots, fixed=self.compiled)
        # Padded on the right, where causal attention never looks.
        ids = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts], device=self.device)
        size = max(1, CHUNK // len(prompts))
        for start in range(0, max(lengths), size):
            part = ids[:, start : start + size]
            cache.make_room(part.size(1))
            self.model.hidden(part, cache=cache)
            cache.advance(part, [min(max(length - start, 0), part.size(1)) for length in lengths])
        return cache

    def step(self, rows: list[Row]) -> Tensor:
        """Logits (B, V) after the last token of each row, which is read with it."""
        if self.model.config.position != "rope":  # its positions end at block_size: half the context is read anew
            full = [i for i, filled in enumerate(self.cache.filled) if filled == self.block_size]
            half = self.block_size // 2
            for i in full:
                self.cache.put([i], self._read([rows[i].ids[-half - 1 : -1]]))
        ids = torch.tensor([[row.ids[-1]] for row in rows], device=self.device)  # (B, 1)
        self.cache.make_room(1)
        if self.compiled:
            logits = compiled_next_logits(ids.device.type)(self.model, ids, self.cache)
        else:
            logits = next_logits(self.model, ids, self.cache)
        self.cache.advance(ids, [int(row.finish is None) for row in rows])
        return logits


def next_logits(model: Model, ids: Tensor, cache: Cache) -> Tensor:
    """Logits (B, V) after the tokens ids (B, 1)."""
    return model.logits(model.hidden(ids, cache=cache)[:, -1])


@functools.cache
def compiled_next_logits(device_type: str) -> Callable[[Model, Tensor, Cache], Tensor]:
    """The same as one kernel after another without Python between them, on a GPU as a CUDA graph."""
    return torch.compile(next_logits, dynamic=False, mode="reduce-overhead" if device_type == "cuda" else None)


class Chooser:
    """The options of sampling, applied to logits (B, V) of rows."""

    def __init__(self, options: SamplingOptions, vocab_size: int, banned: set[int], end: set[int], top: int | None) -> None:
        self.options, self.end, self.top = options, end, top
        self.bias, self.banned = options.biases, banned | set(options.banned_tokens)
        for token in (*self.bias, *options.banned_tokens, *options.forced_tokens):
            if not 0 <= token < vocab_size:
                raise UserError(f"token {token}: the vocabulary has the ids 0 to {vocab_size - 1}")
        if len(self.banned | end) >= vocab_size:
            raise UserError("every token is banned: nothing is left to draw")

    def __call__(self, logits: Tensor, rows: Sequence[Row]) -> list[Token]:
        raw, options = logits.float(), self.options
        logits = raw
        if options.repetition_penalty != 1:
            seen = torch.stack([_counts(row.ids, raw.size(1)) for row in rows]) > 0
            logits = penalize_repetition(logits, seen.to(raw.device), options.repetition_penalty)
        if options.frequency_penalty != 0:
            counts = torch.stack([_counts(row.ids[row.prompt_length :], raw.size(1)) for row in rows])
            logits = penalize_frequency(logits, counts.to(raw.device), options.frequency_penalty)
        if self.bias:
            logits = add_bias(logits, self.bias)
        if self.banned:
            logits = ban(logits, self.banned)
        for i, row in enumerate(rows):
            if row.drawn < options.min_new_tokens and self.end:
                logits = logits.clone() if logits is raw else logits
                logits[i : i + 1] = ban(logits[i : i + 1], self.end)
            if row.drawn < len(options.forced_tokens):
                logits = logits.clone() if logits is raw else logits
                logits[i : i + 1] = force(logits[i : i + 1], options.forced_tokens[row.drawn])
        largest, tokens = logits.max(-1)
        if not largest.isfinite().all():
            raise MachineError("the model gave logits that are not finite")
        if options.temperature > 0:
            uniform = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
            tokens = draw(filtered(logits, options), uniform.to(raw.device))
        if self.top is None:
            return [Token(token) for token in tokens.tolist()]
        logprobs = raw.log_softmax(-1)
        found = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        best = logprobs.topk(min(self.top, logprobs.size(1)))
        tops = [list(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return [Token(*token) for token in zip(tokens.tolist(), found, tops, strict=True)]


def _counts(ids: Sequence[int], vocab_size: int) -> Tensor:
    """How often each token (V,) is among ids."""
    return torch.tensor(ids, dtype=torch.int64).bincount(minlength=vocab_size)

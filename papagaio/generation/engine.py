"""The engine of generation: draw a token, append it, ask the model again.

    engine = Engine.open(make_model, ModelOptions(checkpoint="out/run"))
    for step in engine.complete([Request(engine.encode("To be"), seed=1)], SamplingOptions(temperature=0.8)):
        print(step.text, end="")

Many requests share the forward passes: each row of a batch has its own length, and a row that is finished makes room for the
next request. sample.py, chat.py and evaluate.py are front ends of it.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from papagaio import kernels, runtime
from papagaio.errors import UserError
from papagaio.generation.decoding import Decoder, Row
from papagaio.generation.layers import prepare
from papagaio.generation.options import ModelOptions, SamplingOptions
from papagaio.generation.prefixes import Prefixes
from papagaio.generation.sampling import Sampler, Token
from papagaio.generation.streaming import TextStream
from papagaio.runs.directory import open_checkpoint
from papagaio.tokenizer import Tokenizer


class Request(NamedTuple):
    """A prompt of at least one token to complete, the seed of its draws, and a limit of its own beside max_new_tokens."""

    prompt: Sequence[int]
    seed: int = 0
    limit: int | None = None  # tokens


class Step(NamedTuple):
    """One more token of a request, and the text that can be shown with it.

    The last step of a request says why it ends: "end" (this token is an end token), "stop" (a stop text) or "length".
    `truncated` tells that the model no longer sees the beginning, because the context is full.
    """

    index: int
    token: Token
    text: str
    finish: str | None
    truncated: bool = False


class Engine:
    """A model in use for generation, with its tokenizer. Several threads may use one engine at the same time."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, is_chat: bool = False, compiled: bool = False
    ) -> None:
        """The model is a GPT, used as it is, so that it may be one in training. Its matrix products are computed in dtype.

        `compiled` has torch compile the step of one token.
        """
        self.model, self.tokenizer, self.dtype, self.is_chat, self.compiled = model, tokenizer, dtype, is_chat, compiled
        self.device, self.block_size = next(model.parameters()).device, model.config.block_size
        self.end = tokenizer.ends
        self.checkpoint: Path | None = None  # where the model was loaded from
        self.banned = set(tokenizer.special.values()) - self.end
        self._thread = ThreadPoolExecutor(1) if compiled else None  # CUDA graphs belong to the thread that recorded them

    @classmethod
    def open(cls, make_model: Callable[[dict[str, Any]], Any], options: ModelOptions) -> Self:
        """Load a checkpoint; `make_model` makes a GPT of the fields of model.json. On a CPU see layers.prepare for side effects.

        Raises UserError if the checkpoint or the device cannot be used.
        """
        checkpoint = open_checkpoint(options.checkpoint, options.base)
        device = runtime.pick_device(options.device)
        if options.quantize == "int8" and device.type != "cpu":
            raise UserError(f"--quantize=int8: its products are for a CPU, and the device is {device}; leave it out there")
        dtype = runtime.pick_dtype(options.dtype, device)
        model = kernels.accelerate(checkpoint.build(make_model, device, dtype))
        prepare(model, options.quantize)
        obstacle = runtime.why_not_compiled(device) if options.compile else ""
        if obstacle:
            print(f"generating without --compile: {obstacle}", file=sys.stderr)
        engine = cls(model, checkpoint.tokenizer, dtype, checkpoint.is_chat, options.compile and not obstacle)
        engine.checkpoint = options.checkpoint
        return engine

    def encode(self, text: str) -> list[int]:
        """The text as the beginning of a document, which <|endoftext|> precedes in training."""
        return [self.tokenizer.start, *self.tokenizer.encode(text)]

    def complete(
        self,
        requests: Iterable[Request],
        options: SamplingOptions,
        *,
        batch_size: int = 1,
        top: int | None = None,
        end: Collection[int] | None = None,
        banned: Collection[int] | None = None,
        prefixes: Prefixes | None = None,
    ) -> Iterator[Step]:
        """Complete the requests, up to batch_size of them at a time; yields each token as it is drawn, the rows in turn.

        With `top`, tokens have log-probabilities, and those of the `top` most probable tokens. A completion ends at a token of
        `end` (default: <|endoftext|> and <|end|>); tokens in `banned` are not drawn (default: the other special tokens).
        What `prefixes` holds of a prompt is not read again, and what is read now is kept there.
        Raises UserError for options with ids outside the vocabulary, MachineError if logits are not finite.
        """
        end, banned = self.end if end is None else end, self.banned if banned is None else banned
        sampler = Sampler(options, self.model.config.vocab_size, banned, top, self.device)
        decoder = Decoder(self.model, self.device, self.dtype, options.max_new_tokens, self.compiled, prefixes)
        queue = enumerate(requests)
        rows: list[Row] = []

        def step(rows: list[Row], done: list[int], new: list[Row]) -> tuple[list[Row], list[Token]]:
            # These modes belong to a thread, and must be off again whenever `complete` yields.
            with torch.inference_mode(), runtime.autocast(self.device, self.dtype):
                rows = decoder.exchange(rows, done, new)
                return rows, sampler(decoder.logits(rows), rows) if rows else []

        with runtime.evaluating(self.model), contextlib.ExitStack() as at_the_end:
            if prefixes is not None and not self.compiled:
                at_the_end.callback(lambda: step(rows, list(range(len(rows))), []))
            while True:
                done = [i for i, row in enumerate(rows) if row.finish]
                new = [
                    Row(
                        index,
                        request.prompt[-self.block_size :],
                        request.seed,
                        min(request.limit or options.max_new_tokens, options.max_new_tokens),
                        TextStream(self.tokenizer, options.stop),
                    )
                    for index, request in itertools.islice(queue, batch_size - len(rows) + len(done))
                ]
                work = rows, done, new
                rows, tokens = self._thread.submit(step, *work).result() if self._thread else step(*work)
                if not rows:
                    return
                for row, token in zip(rows, tokens, strict=True):
                    if row.finish is None:
                        yield self.append(row, token, end)

    def append(self, row: Row, token: Token, end: Collection[int]) -> Step:
        """Append a token to a row, and decide whether it is the last."""
        truncated = len(row.ids) > self.block_size
        row.ids.append(token.id)
        text = "" if token.id in end else row.text.push(token.id)
        if token.id in end:
            row.finish = "end"
        elif row.text.stopped:
            row.finish = "stop"
        elif len(row.ids) - row.prompt_length == row.limit:
            row.finish = "length"
        if row.finish:
            text += row.text.close()
        return Step(row.index, token, text, row.finish, truncated)

    def greedy(self, prompts: Sequence[Sequence[int]], limits: int | Sequence[int], end: int) -> list[list[int]]:
        """The most probable continuation of each prompt, in one batch: to `end`, which is included, or up to `limits` tokens, one
        limit for all prompts or one each."""
        limits = [limits] * len(prompts) if isinstance(limits, int) else limits
        options = SamplingOptions(temperature=0, max_new_tokens=max(limits))
        requests = [Request(prompt, limit=limit) for prompt, limit in zip(prompts, limits, strict=True)]
        found: list[list[int]] = [[] for _ in prompts]
        with runtime.autocast(self.device, self.dtype):  # around all steps: it keeps the weights that it casts until it ends
            for step in self.complete(requests, options, batch_size=len(prompts), end={end}, banned=()):
                found[step.index].append(step.token.id)
        return found


def in_order(steps: Iterable[Step]) -> Iterator[Step]:
    """The steps of completions that are computed at the same time, one completion after another."""
    turn, waiting = 0, dict[int, list[Step]]()
    for step in steps:
        waiting.setdefault(step.index, []).append(step)
        while turn in waiting:
            ready = waiting.pop(turn)
            yield from ready
            if not ready[-1].finish:
                break
            turn += 1

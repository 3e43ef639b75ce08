"""Complete texts with a trained model.

    python sample.py --checkpoint out/run --prompt "To be, or" --num_samples 3 --temperature 0.8 --top_k 50
    echo "To be, or" | python sample.py --checkpoint out/run --prompt -
    python sample.py --checkpoint out/run --prompt "To be, or" --show_probs
    python sample.py --checkpoint out/run --prompts prompts.jsonl > completions.jsonl

Standard output carries the prompt and its completion alone, a line of dashes between samples; with --json or --prompts a JSON
object for each completion, in the order of the prompts.
"""

import sys
from pathlib import Path
from typing import Self

from pydantic import model_validator

from papagaio.errors import UserError, run
from papagaio.generation.options import SamplingOptions
from papagaio.options import option, parse


class SampleOptions(SamplingOptions):
    """Options of sample.py."""

    prompt: str = option("", "text to complete; - reads standard input; empty starts a new document")
    prompt_file: Path | None = option(None, "a file with the text to complete")
    prompts: Path | None = option(None, "a file of prompts, one a line, or .jsonl with a key prompt; prints JSON lines")
    strict: bool = option(False, "refuse a prompt that is longer than the context, instead of keeping its end")
    num_samples: int = option(1, "completions of each prompt, each with the next seed", ge=1)
    batch_size: int = option(16, "completions that are made at the same time", ge=1)
    json_: bool = option(False, "print a JSON object for each completion")
    logprobs: int | None = option(
        None, "with JSON: log-probability of each token, and so many of the most probable ones (default: none)", ge=0
    )
    show_probs: bool = option(False, "colour each token by its probability, and list what else was probable")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt != "") + (self.prompt_file is not None) + (self.prompts is not None) > 1:
            raise ValueError("prompt, prompt_file and prompts exclude each other")
        for path in (self.prompt_file, self.prompts):
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: no such file; it must hold text to complete")
        if self.show_probs and (self.json_ or self.prompts):
            raise ValueError("show_probs is for people; with JSON take --logprobs=5")
        if self.logprobs is not None and not (self.json_ or self.prompts):
            raise ValueError("logprobs needs --json; or take --show_probs")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(SampleOptions, doc=__doc__)

import codecs
import itertools
import json
import math
from typing import Any

from model import GPT, GPTConfig
from papagaio import runtime
from papagaio.files import parse_json
from papagaio.generation.engine import Request, Step, complete, special_ids
from papagaio.generation.layers import can_compile, prepare
from papagaio.generation.streaming import TextStream
from papagaio.runs.checkpoint import open_checkpoint
from papagaio.terminal import coloured, colours
from papagaio.tokenizer import END_OF_TEXT, Tokenizer

RUNNERS_UP = 4  # that --show_probs lists


def main(config: SampleOptions) -> None:
    checkpoint = open_checkpoint(config.checkpoint, config.base)
    tokenizer = checkpoint.tokenizer
    rows = read_prompts(config)
    # Every document began so in training.
    prompts = [[tokenizer.special[END_OF_TEXT], *encode(tokenizer, row["prompt"], place)] for place, row in rows]
    device = runtime.pick_device(config.device)
    dtype = runtime.pick_dtype(config.dtype, device)
    model = checkpoint.build(lambda fields: GPT(GPTConfig(**fields)), device, dtype)
    prepare(model, config.quantize)
    compiled = config.compile and can_compile(device)
    block_size = model.config.block_size
    for (place, _), ids in zip(rows, prompts, strict=True):
        if len(ids) > block_size:
            message = f"{place}the prompt has {len(ids)} tokens; the model sees the last {block_size}"
            if config.strict:
                raise UserError(f"{message}: shorten it, or leave out --strict")
            print(message, file=sys.stderr)
    if checkpoint.state.get("stage") == "finetune":
        print("this is a chat model: chat.py asks it questions", file=sys.stderr)

    if config.json_ or config.prompts:
        printer: JsonPrinter | TextPrinter = JsonPrinter(config, tokenizer, [row for _, row in rows])
    else:
        printer = TextPrinter(config, tokenizer, rows[0][1]["prompt"])
    forgets: list[str] = []
    with runtime.autocast(device, dtype):
        for step in complete(
            model,
            (Request(ids, config.seed + number) for ids in prompts for number in range(config.num_samples)),
            config,
            block_size=block_size,
            device=device,
            batch_size=config.batch_size,
            text=lambda: TextStream(tokenizer, config.stop),
            top=RUNNERS_UP if config.show_probs else config.logprobs,
            notice=lambda: forgets.append(f"the context of {block_size} tokens was full: what came first was forgotten"),
            compiled=compiled,
            **special_ids(tokenizer),
        ):
            printer.add(step)
    for message in forgets:
        print(message, file=sys.stderr)


def read_prompts(config: SampleOptions) -> list[tuple[str, dict[str, Any]]]:
    """Each prompt: where it stands, for messages, and its row, which has a key "prompt"."""
    if config.prompts is None:
        if config.prompt_file is not None:
            return [("", {"prompt": decode(config.prompt_file.read_bytes(), str(config.prompt_file))})]
        return [("", {"prompt": decode(sys.stdin.buffer.read(), "standard input") if config.prompt == "-" else config.prompt})]
    rows = []
    for number, line in enumerate(config.prompts.read_bytes().splitlines(), 1):
        place = f"{config.prompts}:{number}"
        text = decode(line, place)
        if not text.strip():
            continue
        row: Any = {"prompt": text}
        if config.prompts.suffix == ".jsonl":
            row = parse_json(text, lambda place=place: place)
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise UserError(f'{place}: an object with a text under "prompt" is needed')
        rows.append((f"{place}: ", row))
    if not rows:
        raise UserError(f"{config.prompts}: no prompts in there")
    return rows


def decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start}") from None


def encode(tokenizer: Tokenizer, text: str, place: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{place}{error}") from None


class TextPrinter:
    """Prints samples one after another, the one in turn as it grows."""

    def __init__(self, config: SampleOptions, tokenizer: Tokenizer, prompt: str) -> None:
        self.config, self.tokenizer, self.prompt = config, tokenizer, prompt
        self.turn = 0
        self.waiting: dict[int, list[Step]] = {}
        self.begin()

    def begin(self) -> None:
        print(self.prompt, end="", flush=True)
        self.steps: list[Step] = []
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ahead: list[tuple[str, float]] = []  # characters that are not certain yet, and their tokens' probability

    def add(self, step: Step) -> None:
        self.waiting.setdefault(step.index, []).append(step)
        for step in self.waiting.pop(self.turn, []):
            self.show(step)
        while self.steps and self.steps[-1].finish:
            print()
            if self.config.show_probs:
                self.list_tokens()
            self.turn += 1
            if self.turn < self.config.num_samples:
                print("-" * 20)
                self.begin()
            self.steps = []
            for step in self.waiting.pop(self.turn, []):
                self.show(step)

    def show(self, step: Step) -> None:
        self.steps.append(step)
        text = step.text
        if self.config.show_probs and colours(sys.stdout):
            written = self.decoder.decode(self.tokenizer.decode_bytes([step.token.id]))
            self.ahead += [(character, math.exp(step.token.logprob)) for character in written]
            certain, self.ahead = self.ahead[: len(text)], self.ahead[len(text) :]
            groups = itertools.groupby(zip(text, certain, strict=False), key=lambda pair: pair[1][1])
            text = "".join(coloured("".join(c for c, _ in group), probability) for probability, group in groups)
        print(text, end="", flush=True)

    def list_tokens(self) -> None:
        """A line a token: its probability, the token, and the others that were most probable."""
        for step in self.steps:
            token = step.token
            probability = math.exp(token.logprob)
            shown = f"{probability:.3f} {self.name(token.id):<14}"
            others = [(other, logprob) for other, logprob in token.top if other != token.id]
            rest = "  ".join(f"{math.exp(logprob):.3f} {self.name(other)}" for other, logprob in others[: RUNNERS_UP - 1])
            print(f"{coloured(shown, probability) if colours(sys.stdout) else shown}  {rest}")

    def name(self, token: int) -> str:
        return repr(self.tokenizer.decode([token]))


class JsonPrinter:
    """Prints a JSON object for each completion, in order."""

    def __init__(self, config: SampleOptions, tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> None:
        self.config, self.tokenizer, self.rows = config, tokenizer, rows
        self.turn = 0
        self.waiting: dict[int, list[Step]] = {}

    def add(self, step: Step) -> None:
        self.waiting.setdefault(step.index, []).append(step)
        while self.turn in self.waiting and self.waiting[self.turn][-1].finish:
            print(json.dumps(self.result(self.turn, self.waiting.pop(self.turn)), ensure_ascii=False), flush=True)
            self.turn += 1

    def result(self, index: int, steps: list[Step]) -> dict[str, Any]:
        number, sample = divmod(index, self.config.num_samples)
        result = self.rows[number] | {"completion": "".join(step.text for step in steps)}
        result |= {"finish": steps[-1].finish, "tokens": len(steps), "seed": self.config.seed + sample}
        if self.config.logprobs is not None:
            result["logprobs"] = [
                {
                    **self.entry(step.token.id, step.token.logprob),
                    "top": [self.entry(token, logprob) for token, logprob in step.token.top],
                }
                for step in steps
            ]
        return result

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "text": self.tokenizer.decode([token]), "logprob": round(logprob, 6)}


if __name__ == "__main__":
    run(main, OPTIONS)

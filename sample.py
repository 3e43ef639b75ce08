"""Complete texts with a trained model.

    python sample.py --checkpoint out/run --prompt "To be, or" --num_samples 3 --temperature 0.8 --top_k 50
    echo "To be, or" | python sample.py --checkpoint out/run --prompt -
    python sample.py --checkpoint out/run --prompt "To be, or" --show_probs
    python sample.py --checkpoint out/run --prompts prompts.jsonl > completions.jsonl

Standard output carries only the prompt and its completion, with a line of dashes between samples; with --json or --prompts one
JSON object per completion, in the order of the prompts.
"""

import sys
from pathlib import Path
from typing import Self

from pydantic import model_validator

from papagaio.errors import UserError, located, run
from papagaio.generation.options import ModelOptions, SamplingOptions
from papagaio.options import option, parse


class SampleOptions(SamplingOptions, ModelOptions):
    """Options of sample.py."""

    prompt: str = option("", "text to complete; -: standard input; empty: start a new document", group="Text")
    prompts: Path | None = option(None, "a file of prompts, one per line or .jsonl; prints JSON lines", group="Text")
    num_samples: int = option(1, "completions of each prompt, each with the next seed", group="Text", ge=1)
    batch_size: int = option(16, "completions that are computed at the same time", group="Text", ge=1)
    json_: bool = option(False, "print one JSON object per completion", group="Output")
    logprobs: int | None = option(None, "with JSON: log-probabilities of each token and of the K best", group="Output", ge=0)
    show_probs: bool = option(False, "colour each token by its probability, and list the alternatives", group="Output")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.prompt and self.prompts:
            raise ValueError("prompt and prompts exclude each other")
        if self.prompts is not None and not self.prompts.is_file():
            raise ValueError(f"{self.prompts}: no such file; it must contain texts to complete")
        if self.show_probs and (self.json_ or self.prompts):
            raise ValueError("show_probs is for people; with JSON use --logprobs=5")
        if self.logprobs is not None and not (self.json_ or self.prompts):
            raise ValueError("logprobs needs --json; without it use --show_probs")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(SampleOptions, doc=__doc__)

from typing import Any

from model import GPT, GPTConfig
from papagaio.corpus.rows import Row, read_rows
from papagaio.generation.drawing import Drawing
from papagaio.generation.engine import Engine, Request, Step, in_order
from papagaio.generation.printing import ALTERNATIVES, as_json, show
from papagaio.runs.checkpoint import model_maker
from papagaio.terminal import colours, print_json


def main(config: SampleOptions) -> None:
    rows = read_prompts(config)
    for hint in config.hints():
        print(hint, file=sys.stderr)
    engine = Engine.open(model_maker(GPT, GPTConfig), config)
    prompts = []
    for place, row in rows:
        with located(place):
            prompts.append(engine.encode(row["prompt"]))
        if (length := len(prompts[-1])) > engine.block_size:
            print(f"{place}: the prompt has {length} tokens; the model sees the last {engine.block_size}", file=sys.stderr)
    if engine.is_chat:
        print("this is a chat model: chat.py asks it questions", file=sys.stderr)
    requests = (Request(ids, config.seed + number) for ids in prompts for number in range(config.num_samples))
    top = ALTERNATIVES + 1 if config.show_probs else config.logprobs
    done: list[Step] = []  # the steps of one completion
    drawing = Drawing(config.checkpoint if sys.stdout.isatty() else None, colours(sys.stdout))
    truncated = False
    for step in in_order(engine.complete(requests, config, batch_size=config.batch_size, top=top)):
        number, sample = divmod(step.index, config.num_samples)
        row = rows[number][1]
        done.append(step)
        truncated = truncated or step.truncated
        if not (config.json_ or config.prompts):
            show(done, row["prompt"], engine.tokenizer, config.show_probs, drawing)
        elif step.finish:
            result = as_json(done, engine.tokenizer, config.seed + sample, config.logprobs is not None)
            print_json(row | result)
        if step.finish:
            done = []
    if truncated:
        print(f"the context of {engine.block_size} tokens was full: what came first was forgotten", file=sys.stderr)


def read_prompts(config: SampleOptions) -> list[tuple[str, dict[str, Any]]]:
    """For each prompt its place, for messages, and its row, which has a key "prompt"."""
    path = config.prompts
    if path is None and config.prompt != "-":
        return [("--prompt", {"prompt": config.prompt})]
    if path is None:
        return [("standard input", {"prompt": decode(sys.stdin.buffer.read(), "standard input")})]
    lines = ((f"{path}:{number}", line) for number, line in enumerate(path.read_bytes().splitlines(), 1))
    texts = (Row(place, {"prompt": decode(line, place)}) for place, line in lines if line.strip())
    rows = []
    for place, row, error, _ in read_rows(str(path)) if path.suffix == ".jsonl" else texts:
        if error:
            raise UserError(f"{place}: {error}")
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f'{place}: an object with a text under "prompt" is needed')
        rows.append((place, row))
    if not rows:
        raise UserError(f"{path}: no prompts in this file")
    return rows


def decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start}") from None


if __name__ == "__main__":
    run(main, OPTIONS)

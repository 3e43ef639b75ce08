"""serve.py under load: nothing lost or mixed up, throughput, time to the first token, a conversation's second turn, the start.

    python bench/serve_load.py --checkpoint out/demo_chat --questions out/atlas/qa_test.jsonl
    python bench/serve_load.py --checkpoint out/smol --dtype bfloat16 --new_tokens 64 --clients 0

Starts the server as a process of its own, asks it over HTTP, and prints a line for each figure, then all of them as JSON.
"""

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import psutil

from papagaio.errors import run
from papagaio.generation.asking import read_questions
from papagaio.options import Options, option, parse

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "The little parrot learnt to speak, and what it said was heard in the whole town"


class ServeLoadOptions(Options):
    """Options of bench/serve_load.py."""

    checkpoint: Path = option(..., "the chat model to serve")
    questions: Path | None = option(None, "questions for the many clients; their answers are compared with chat.py's")
    clients: int = option(64, "clients at once (0: leave this figure out)", ge=0)
    requests: int = option(500, "requests of these clients", ge=1)
    at_once: int = option(16, "answers at once for the throughput", ge=1)
    new_tokens: int = option(96, "tokens of each answer for the throughput", ge=1)
    turns: int = option(3, "repetitions of a measurement", ge=1)
    dtype: str = option("float32", "float32, bfloat16 or auto", pattern="^(auto|float32|bfloat16)$")


@contextmanager
def served(config: ServeLoadOptions) -> Iterator[tuple[str, psutil.Process, float]]:
    """A server: its address, its process, and the seconds until it listened."""
    command = [sys.executable, "serve.py", f"--checkpoint={config.checkpoint.absolute()}", "--port=0", f"--dtype={config.dtype}"]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            yield url, psutil.Process(process.pid), time.perf_counter() - start
        finally:
            process.terminate()


async def events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream. Raises HTTPStatusError."""
    more = {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", path, json=body | more) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def text_of(event: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content", "") for choice in event["choices"])


async def many_clients(
    client: httpx.AsyncClient, model: str, config: ServeLoadOptions, expected: dict[str, str]
) -> dict[str, int]:
    """Ask all requests from many clients; every fourth leaves after its first text. A refused request (429) is sent again."""
    numbers, draws = iter(range(config.requests)), random.Random(0)
    counts = dict.fromkeys(("answered", "equal", "left", "refused and sent again", "lost"), 0)
    questions = list(expected)

    async def one(number: int, leaves: bool) -> None:
        question, text, finish = questions[number % len(questions)], "", None
        body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        async for event in events(client, "/v1/chat/completions", body):
            text += text_of(event)
            finish = next((choice["finish_reason"] for choice in event["choices"]), None) or finish
            if leaves and text:
                counts["left"] += 1
                return
        counts["answered" if finish else "lost"] += 1
        counts["equal"] += text == expected[question]

    async def work() -> None:
        for number in numbers:
            leaves = draws.random() < 0.25
            while True:
                try:
                    await one(number, leaves)
                    break
                except httpx.HTTPStatusError as error:
                    if error.response.status_code != 429:
                        raise
                    counts["refused and sent again"] += 1
                    await asyncio.sleep(0.05)

    await asyncio.gather(*(work() for _ in range(config.clients)))
    return counts


async def throughput(client: httpx.AsyncClient, model: str, tokens: int, count: int, ids: range) -> float:
    """Tokens per second of `count` answers at once, none of which ends before `tokens`: special tokens are ruled out."""
    body = {"model": model, "max_tokens": tokens, "temperature": 0, "logit_bias": {str(i): -100 for i in ids}}
    start = time.perf_counter()
    replies = await asyncio.gather(
        *(client.post("/v1/completions", json=body | {"prompt": f"{i} {PROMPT}"}) for i in range(count))
    )
    seconds = time.perf_counter() - start
    return sum(reply.raise_for_status().json()["usage"]["completion_tokens"] for reply in replies) / seconds


async def first_token(client: httpx.AsyncClient, model: str, question: str) -> float:
    """Seconds from a request to its first text."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    start = time.perf_counter()
    async for event in events(client, "/v1/chat/completions", body):
        if text_of(event):
            break
    return time.perf_counter() - start


async def second_turn(client: httpx.AsyncClient, model: str, context: int) -> tuple[int, int]:
    """Tokens of the prompt of a conversation's second turn, of up to 1,000, and how many of them were read."""
    count, text = 10**9, PROMPT
    while count < min(1000, context // 2):
        text += f" {PROMPT}"
        count = (await client.post("/tokenize", json={"model": model, "prompt": text})).json()["count"]
    while count == 10**9 or count > min(1000, context // 2):
        text = text[: len(text) * 9 // 10] if count < 10**9 else " ".join([PROMPT] * 60)
        count = (await client.post("/tokenize", json={"model": model, "prompt": text})).json()["count"]
    turns = [{"role": "user", "content": text}]
    body = {"model": model, "temperature": 0, "max_tokens": 16}
    reply = (await client.post("/v1/chat/completions", json=body | {"messages": turns})).raise_for_status().json()
    turns += [
        {"role": "assistant", "content": reply["choices"][0]["message"]["content"]},
        {"role": "user", "content": "And then?"},
    ]
    usage = (await client.post("/v1/chat/completions", json=body | {"messages": turns})).raise_for_status().json()["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]


def in_process(config: ServeLoadOptions) -> tuple[Callable[[str], tuple[str, float]], range]:
    """A function that asks chat.py's engine: its answer, and the seconds to its first text. And the ids of special tokens."""
    from model import GPT, GPTConfig
    from papagaio.generation.chat import Chat, Text
    from papagaio.generation.engine import Engine
    from papagaio.generation.options import ModelOptions, SamplingOptions
    from papagaio.runs.checkpoint import model_maker

    engine = Engine.open(model_maker(GPT, GPTConfig), ModelOptions(checkpoint=config.checkpoint, dtype=config.dtype))
    chat = Chat(engine, SamplingOptions(temperature=0, max_new_tokens=64))

    def ask(question: str) -> tuple[str, float]:
        chat.reset("")
        start, first = time.perf_counter(), 0.0
        for event in chat.ask(question):
            if isinstance(event, Text) and event.text and not first:
                first = time.perf_counter() - start
        return chat.reply.text, first

    special = engine.tokenizer.special.values()
    return ask, range(min(special), max(special) + 1)


async def measure(config: ServeLoadOptions, url: str, process: psutil.Process, found: dict[str, Any]) -> None:
    questions = [row.messages[-1].content for row in read_questions(config.questions)] if config.questions else []
    ask, special = in_process(config)
    expected = {question: ask(question)[0] for question in questions[:250]}
    if len(special) > 100:  # those of a released model may lie apart: none is ruled out
        special = range(0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        card = (await client.get("/v1/models")).json()["data"][0]
        model, tokens = card["id"], min(config.new_tokens, card["context_length"] - 40)
        if config.clients and expected:
            await many_clients(client, model, config, expected)  # once, so that the allocator has what it needs
            memory = [process.memory_info().rss]
            for turn in range(config.turns):
                found[f"{config.clients} clients, {config.requests} requests, {turn + 1}"] = await many_clients(
                    client, model, config, expected
                )
                memory.append(process.memory_info().rss)
            found["resident MB after each"] = [round(size / 1e6, 1) for size in memory]
        rates: dict[int, list[float]] = {1: [], config.at_once: []}
        for _ in range(config.turns):
            for count, rate in rates.items():
                rate.append(await throughput(client, model, tokens, count, special))
        one, many = (statistics.median(rate) for rate in rates.values())
        found |= {"tokens/s alone": round(one), f"tokens/s, {config.at_once} at once": round(many), "ratio": round(many / one, 2)}
        pairs = [
            (await first_token(client, model, question), ask(question)[1])
            for question in questions[:30] or [f"What is {i} times seven, and why?" for i in range(20)]
        ]
        for name, values in zip(("HTTP", "chat.py"), zip(*pairs, strict=True), strict=True):
            found[f"ms to the first text, {name}"] = round(1e3 * statistics.median(values), 1)
        found["ms more over HTTP, median of pairs"] = round(1e3 * statistics.median(a - b for a, b in pairs), 1)
        found["second turn: tokens, read"] = await second_turn(client, model, card["context_length"])


def main(config: ServeLoadOptions) -> None:
    found: dict[str, Any] = {}
    torch, listening = [], []
    for _ in range(config.turns):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        torch.append(time.perf_counter() - start)
        with served(config) as (_, _, seconds):
            listening.append(seconds)
    found["seconds to listening, import torch"] = round(min(listening), 2), round(min(torch), 2)
    with served(config) as (url, process, _):
        if not re.fullmatch(r"http://\S+", url):
            raise RuntimeError("the server does not start; run it by itself to see why")
        asyncio.run(measure(config, url, process, found))
    for name, value in found.items():
        print(f"{name}: {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    run(main, parse(ServeLoadOptions, doc=__doc__))

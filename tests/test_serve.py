"""serve.py as its users meet it: a real process, the real openai client, raw sockets."""

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import COLOURS, NAMES, ROOT, Script

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("hypothesis")
pytest.importorskip("uvicorn")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

QUESTIONS = [f"What is the flag of {name}?" for name in NAMES]
END_OF_TEXT = 295  # of 300 tokens, the last five are special
BANNED = {str(i): -100 for i in range(END_OF_TEXT, 300)}  # without them an answer does not end
Start = Callable[..., "Running"]


class Running:
    """A server process, its address, and its log so far."""

    def __init__(self, checkpoint: Path, *argv: object, env: dict[str, str] | None = None) -> None:
        self.checkpoint = checkpoint
        command = [sys.executable, "serve.py", f"--checkpoint={checkpoint}", "--port=0", *map(str, argv)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}), **pipes)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()
        self.url = self.process.stdout.readline().strip()
        assert self.url, "".join(self.lines)
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def ask(self, question: str, **more: Any) -> Any:
        options = {"model": "chat", "temperature": 0} | more
        return self.client.chat.completions.create(messages=[{"role": "user", "content": question}], **options)

    def metric(self, name: str) -> float:
        return float(re.search(rf"^{name} (\S+)$", self.http.get("/metrics").text, re.M)[1])

    def raw(self, data: bytes) -> bytes:
        """What the server answers to these bytes, until it closes or is silent for a while."""
        found = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection, contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                found += part
        return found

    def end(self) -> None:
        self.http.close()
        self.client.close()
        self.process.wait(60)
        self.reader.join(10)


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts servers, and ends those that are left."""
    servers: list[Running] = []

    def begin(*argv: Any, **more: Any) -> Running:
        servers.append(Running(*argv, **more))
        return servers[-1]

    yield begin
    for server in servers:
        server.process.terminate()
    for server in servers:
        server.end()
        assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="module")
def server(world: Path, start: Start) -> Running:
    return start(world / "chat", f"--feedback={world / 'feedback.jsonl'}")


@pytest.fixture(scope="module")
def base(world: Path, start: Start) -> Running:
    return start(world / "base", "--max_batch_size=4", "--max_queue=4")


@pytest.fixture(scope="module")
def answers(world: Path, script: Script) -> dict[str, str]:
    """chat.py's answer to each question."""
    done = script("chat.py", f"--checkpoint={world / 'chat'}", "--questions=-", "--dtype=float32", stdin="\n".join(QUESTIONS))
    assert done.returncode == 0, done.stderr
    return {row["question"]: row["answer"] for row in map(json.loads, done.stdout.splitlines())}


# The openai client


def test_the_model_is_listed_and_others_do_not_exist(server: Running) -> None:
    models = server.client.models.list().data
    assert [model.id for model in models] == ["chat"]
    assert server.client.models.retrieve("chat").context_length == 64
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        server.client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as error:
        server.ask("Hello", model="gpt-4")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_a_greedy_answer_is_that_of_chat_py(server: Running, answers: dict[str, str]) -> None:
    reply = server.ask(QUESTIONS[0])
    assert reply.choices[0].message.content == answers[QUESTIONS[0]]
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.choices[0].message.content.rstrip(".") in COLOURS


def test_a_greedy_answer_is_the_same_in_any_company(server: Running, answers: dict[str, str]) -> None:
    """Alone, and with requests that join and leave meanwhile, each with its own sampling."""

    def ask(number: int) -> tuple[str, str]:
        if number % 3 == 2:
            server.ask("Tell me", temperature=1.3, max_tokens=1 + number % 20, seed=number, n=1 + number % 2)
        question = QUESTIONS[number % len(QUESTIONS)]
        return question, server.ask(question).choices[0].message.content

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, range(90)))
    assert [(question, answers[question]) for question, _ in found] == found


def test_free_running_text_is_the_same_in_any_company(base: Running) -> None:
    def complete(prompt: str) -> str:
        return base.client.completions.create(model="base", prompt=prompt, temperature=0, max_tokens=40).choices[0].text

    prompts = ["The flag", "Flag of Ara", "In Belmia, the", "x"]
    alone = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(complete, prompts * 6)) == alone * 6


def test_a_stream_has_the_text_of_the_whole_answer(server: Running) -> None:
    whole = server.ask("zxq", n=2, max_tokens=9, temperature=2, seed=5)
    texts, finish, usage, roles = {0: "", 1: ""}, {}, None, []
    for chunk in server.ask("zxq", n=2, max_tokens=9, temperature=2, seed=5, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            if choice.finish_reason:
                finish[choice.index] = choice.finish_reason
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]
    assert list(finish.values()) == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert roles == ["assistant"] * 2
    assert texts[0] != texts[1]


def test_a_stream_without_include_usage_has_none(server: Running) -> None:
    assert all(chunk.choices and chunk.usage is None for chunk in server.ask(QUESTIONS[0], stream=True))


def test_sampling_parameters_do_what_they_say(base: Running) -> None:
    def draw(**more: Any) -> Any:
        extra = {key: more.pop(key) for key in ("top_k", "min_p", "repetition_penalty") if key in more}
        options = {"model": "base", "prompt": "The", "max_tokens": 16, "temperature": 1.5, "seed": 3} | more
        return base.client.completions.create(**options, extra_body=extra).choices[0]

    greedy = draw(temperature=0)
    assert draw().text == draw().text
    assert draw().text != draw(seed=4).text
    assert draw(seed=-1).text != draw(seed=1).text
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert draw(**narrow).text == greedy.text, narrow
    token = base.http.post("/tokenize", json={"model": "base", "prompt": "Q"}).json()["tokens"][0]
    assert draw(logit_bias={str(token): 100}, max_tokens=3).text == "QQQ"
    often = {"temperature": 0, "logit_bias": {str(token): 31}, "max_tokens": 40}
    assert draw(**often).text == "Q" * 40 != draw(**often, frequency_penalty=2).text
    assert draw(**often, presence_penalty=-2).text == "Q" * 40
    assert draw(temperature=0, repetition_penalty=50).text != greedy.text
    assert draw(**often).finish_reason == "length"
    cut = draw(temperature=0, stop=[greedy.text[3:5], "never"])
    assert (cut.text, cut.finish_reason) == (greedy.text[:3], "stop")
    assert draw(temperature=0, stop=greedy.text[3:5]).text == greedy.text[:3]


def test_logprobs_of_a_chat(server: Running) -> None:
    choice = server.ask(QUESTIONS[2], logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob
    streamed = [
        entry
        for chunk in server.ask(QUESTIONS[2], logprobs=True, top_logprobs=3, stream=True)
        for item in chunk.choices
        if item.logprobs
        for entry in item.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert server.ask(QUESTIONS[2], logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_logprobs_of_a_completion(base: Running) -> None:
    choice = base.client.completions.create(model="base", prompt="The flag", max_tokens=6, temperature=0, logprobs=2).choices[0]
    found = choice.logprobs
    pair = found.top_logprobs, found.token_logprobs
    assert "".join(found.tokens) == choice.text
    assert all(len(top) == 2 and max(top.values()) == pytest.approx(own) for top, own in zip(*pair, strict=True))
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(6)]


def test_prompts_as_texts_and_as_ids_are_the_same(base: Running) -> None:
    ids = base.http.post("/tokenize", json={"model": "base", "prompt": "The flag"}).json()["tokens"]
    assert base.http.post("/detokenize", json={"model": "base", "tokens": ids}).json() == {"prompt": "The flag"}
    several = {"model": "base", "max_tokens": 5, "temperature": 0, "n": 2}
    texts = base.client.completions.create(prompt=["The flag", "In Bel"], **several)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert texts.choices[0].text == texts.choices[1].text
    as_ids = base.client.completions.create(prompt=[END_OF_TEXT, *ids], **several)
    assert as_ids.choices[0].text == texts.choices[0].text
    assert as_ids.usage.prompt_tokens == len(ids) + 1


def test_embeddings_are_the_mean_of_the_last_hidden_states(base: Running, world: Path) -> None:
    import torch

    from model import GPT, GPTConfig
    from papagaio.runs.checkpoint import model_maker
    from papagaio.runs.directory import open_checkpoint

    both = base.client.embeddings.create(model="base", input=["The flag", "of Aramia"])  # the client asks for base64
    plain = base.client.embeddings.create(model="base", input="of Aramia", encoding_format="float")
    assert both.data[1].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert plain.pooling == "mean of the last hidden states"
    checkpoint = open_checkpoint(world / "base")
    model = checkpoint.build(model_maker(GPT, GPTConfig), torch.device("cpu"), torch.float32)
    ids = [checkpoint.tokenizer.start, *checkpoint.tokenizer.encode("of Aramia")]
    with torch.inference_mode():
        expected = model.hidden(torch.tensor([ids]))[0].mean(0).tolist()
    assert plain.data[0].embedding == pytest.approx(expected, abs=1e-4)
    assert plain.usage.prompt_tokens == len(ids)


def test_special_tokens_in_a_users_text_stay_text(server: Running) -> None:
    ids = server.http.post("/tokenize", json={"model": "chat", "prompt": "<|end|>"}).json()["tokens"]
    assert len(ids) > 1
    assert server.http.post("/detokenize", json={"model": "chat", "tokens": ids}).json()["prompt"] == "<|end|>"
    plain, typed = (server.ask(text).usage.prompt_tokens for text in ("a", "a<|end|><|user|>"))
    assert typed >= plain + 8


def test_a_stream_never_has_half_a_character(base: Running) -> None:
    snowman = "☃".encode()
    ids = [base.http.post("/tokenize", json={"model": "base", "prompt": "☃"}).json()["tokens"]][0]
    assert len(ids) == len(snowman)
    # After the first two bytes of a snowman, biased towards its third: the character's end is all that is drawn.
    events = base.client.completions.create(
        model="base", prompt=ids[:2], max_tokens=1, temperature=0, logit_bias={str(ids[2]): 100}, stream=True
    )
    assert "".join(event.choices[0].text for event in events) == "☃"
    drawn = base.client.completions.create(model="base", prompt="x", max_tokens=2, temperature=0, logit_bias={str(ids[0]): 100})
    assert drawn.choices[0].text == "\N{REPLACEMENT CHARACTER}" * 2


# Conversations


def test_the_second_turn_reads_only_what_is_new(server: Running) -> None:
    first = [{"role": "user", "content": QUESTIONS[3]}]
    reply = server.client.chat.completions.create(model="chat", messages=first, temperature=0)
    known = reply.usage.prompt_tokens + reply.usage.completion_tokens - 1  # the last token, <|end|>, was drawn but not read
    second = [*first, {"role": "assistant", "content": reply.choices[0].message.content}, {"role": "user", "content": "And?"}]
    usage = server.client.chat.completions.create(model="chat", messages=second, temperature=0).usage
    assert usage.prompt_tokens_details.cached_tokens == known
    assert usage.prompt_tokens - known < 10


def test_an_answer_is_the_same_with_a_known_beginning(server: Running, start: Start, world: Path) -> None:
    forgetful = start(world / "chat", "--cache_tokens=0")
    turns = []
    for question in (QUESTIONS[4], QUESTIONS[5], QUESTIONS[4]):
        turns.append({"role": "user", "content": question[-24:]})
        found = [each.client.chat.completions.create(model="chat", messages=turns, temperature=0) for each in (server, forgetful)]
        assert found[0].choices[0].message.content == found[1].choices[0].message.content
        assert found[1].usage.prompt_tokens_details.cached_tokens == 0
        turns.append({"role": "assistant", "content": found[0].choices[0].message.content})
    assert found[0].usage.prompt_tokens_details.cached_tokens >= 16


def test_an_answer_continues_from_given_tokens(server: Running) -> None:
    whole = server.ask(QUESTIONS[6], logprobs=True).choices[0]
    ids = [entry.id for entry in whole.logprobs.content]
    rest = server.ask(QUESTIONS[6], extra_body={"continue_ids": ids[:1]}).choices[0].message.content
    assert whole.logprobs.content[0].token + rest == whole.message.content
    special = server.http.post("/tokenize", json={"model": "chat", "prompt": "<|end|>"}).json()
    assert special["count"] > 1
    with pytest.raises(openai.BadRequestError, match="continue_ids"):
        server.ask("x", extra_body={"continue_ids": [299]})


def test_parts_of_a_message_are_joined_and_roles_take_turns(server: Running, answers: dict[str, str]) -> None:
    parts = [{"type": "text", "text": QUESTIONS[7][:9]}, {"type": "text", "text": QUESTIONS[7][9:]}]
    reply = server.client.chat.completions.create(model="chat", messages=[{"role": "user", "content": parts}], temperature=0)
    assert reply.choices[0].message.content == answers[QUESTIONS[7]]
    for turns in ([{"role": "assistant", "content": "x"}], [{"role": "user", "content": "x"}] * 2, []):
        with pytest.raises(openai.BadRequestError) as error:
            server.client.chat.completions.create(model="chat", messages=turns)
        assert error.value.param == "messages"
    system = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": QUESTIONS[0]}]
    assert server.client.chat.completions.create(model="chat", messages=system, max_tokens=2).usage.prompt_tokens > 12


# Errors


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"user": "me"}, "user"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**20}, "n"),
        ({"n": 128}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"no_such_parameter": 1}, "no_such_parameter"),
    ],
    ids=str,
)
def test_a_wrong_parameter_is_refused_by_name(server: Running, wrong: dict[str, Any], param: str) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "x"}]} | wrong
    reply = server.http.post("/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert param in error["message"] or "messages" in error["message"]


def test_parameters_that_ask_for_what_happens_anyway_are_accepted(server: Running) -> None:
    neutral = {"response_format": {"type": "text"}, "tools": None, "top_p": None, "store": False, "max_tokens": 1}
    body = {"model": "chat", "messages": [{"role": "user", "content": "x"}]} | neutral
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match=r"\d{3} tokens; this model's context is 64 tokens") as error:
        server.ask("colour " * 100)
    assert error.value.code == "context_length_exceeded"
    reply = server.ask("a" * 40, max_tokens=1000, temperature=1.5, logit_bias=BANNED)
    assert reply.choices[0].finish_reason in ("length", "stop")
    assert reply.usage.total_tokens <= 64


def test_a_base_model_completes_but_does_not_chat(base: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="not fine-tuned"):
        base.ask("x", model="base")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (("GET", "/nowhere"), 404),
        (("GET", "/v1/chat/completions"), 405),
        (("POST", "/v1/models"), 405),
        (("GET", "/page/..%2f..%2f..%2fpyproject.toml"), 404),
        (("GET", "/page/../../../pyproject.toml"), 404),
    ],
)
def test_errors_have_openais_form(server: Running, request_: tuple[str, str], status: int) -> None:
    reply = server.http.request(*request_)
    assert reply.status_code == status
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"null", {}, 400),
        (b"\xff", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"model": NaN}', {}, 400),
        (b'{"model": "chat", "messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b" " * (2**22 + 1), {}, 413),
    ],
    ids=["cut", "list", "null", "bytes", "deep", "NaN", "surrogate", "type", "size"],
)
def test_a_wrong_body_is_refused(server: Running, body: bytes, headers: dict[str, str], status: int) -> None:
    reply = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"} | headers)
    assert (reply.status_code, "message" in reply.json()["error"]) == (status, True)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES_OF_PARAMETERS = st.sampled_from(
    ["model", "messages", "prompt", "input", "tokens", "n", "stop", "seed", "logit_bias", "temperature", "stream", "top_logprobs"]
)
BODIES = st.one_of(
    st.binary(max_size=300),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(NAMES_OF_PARAMETERS, VALUES, max_size=5).map(
        lambda body: json.dumps(body | {"model": "chat", "no": 1}).encode()
    ),
)
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/feedback", "/v1/models", "/"]
RAW = st.one_of(
    st.binary(min_size=1, max_size=400).filter(lambda data: not data.startswith((b"GET", b"HEAD"))),
    st.tuples(st.sampled_from(["GET", "POST", "PUT", "\0"]), st.text(max_size=30), st.binary(max_size=90)).map(
        lambda parts: f"{parts[0]} /{parts[1]} HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n".encode() + parts[2]
    ),
    st.integers(33_000, 60_000).map(lambda n: b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * n + b"\r\n\r\n"),
)


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_malformed_requests_are_4xx_and_the_next_is_answered(server: Running, answers: dict[str, str], count: int) -> None:
    quiet = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}

    @settings(max_examples=count * 3 // 4, **quiet)
    @given(
        st.sampled_from(PATHS),
        BODIES,
        st.sampled_from(["application/json", "application/json; charset=x", "text/html", "\xff", ""]),
    )
    def bodies(path: str, body: bytes, kind: str) -> None:
        reply = server.http.post(path, content=body, headers={"Content-Type": kind.encode("latin-1")})
        assert 400 <= reply.status_code < 500, (path, body, kind, reply.text)
        assert reply.json()["error"]["message"]

    @settings(max_examples=count // 4, **quiet)
    @given(RAW)
    def raw(data: bytes) -> None:
        reply = server.raw(data)
        assert reply == b"" or reply.startswith(b"HTTP/1.1 4"), (data, reply)  # nothing: the request is not whole

    bodies()
    raw()
    assert "Traceback" not in server.log
    assert server.ask(QUESTIONS[0]).choices[0].message.content == answers[QUESTIONS[0]]


# Load


def test_a_full_queue_is_429_and_a_place_is_free_within_a_token(base: Running) -> None:
    """Eight answers run or wait; a ninth is refused. When the clients go, the next one is answered at once."""
    endless = {"model": "base", "prompt": "The", "n": 8, "max_tokens": 50, "temperature": 0, "stream": True, "logit_bias": BANNED}
    streams: list[Any] = []

    def fill() -> None:
        for _ in range(9):
            streams.append(base.client.completions.create(**endless))

    with pytest.raises(openai.RateLimitError) as error:
        fill()
    assert error.value.code == "queue_full"
    for stream in streams:
        stream.close()
    until(lambda: base.metric("papagaio_answers_running") == 0 == base.metric("papagaio_answers_waiting"))
    assert base.client.completions.create(model="base", prompt="The", max_tokens=2).usage.completion_tokens == 2


def until(holds: Callable[[], bool]) -> None:
    for _ in range(400):
        if holds():
            return
        time.sleep(0.05)
    pytest.fail("it does not come about")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Running:
    """A server for one answer at a time, whose answers would take minutes: random weights, a context of 100,000 tokens."""
    import torch

    from model import GPT, GPTConfig
    from papagaio.runs.checkpoint import contents, write_checkpoint
    from papagaio.tokenizer import ByteTokenizer

    torch.manual_seed(0)
    tokenizer, path = ByteTokenizer(), tmp_path_factory.mktemp("models") / "endless"
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=100_000, n_layer=1, n_head=1, n_embd=16))
    write_checkpoint(path, contents(model, [], {"step": 0}), tokenizer)
    return start(path, "--max_batch_size=1", "--max_queue=0", "--grace=1")


LONG = {"model": "endless", "prompt": "x", "max_tokens": 90_000, "logit_bias": {str(i): -100 for i in range(256, 261)}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(endless: Running, stream: bool) -> None:
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", endless.port)) as connection:
            connection.sendall(head % len(body) + body)
            until(lambda: endless.metric("papagaio_answers_running") == 1)
        until(lambda: endless.metric("papagaio_answers_running") == 0)
    assert endless.client.completions.create(**LONG | {"max_tokens": 3}).usage.completion_tokens == 3


def test_a_request_has_a_time_limit(start: Start, world: Path) -> None:
    server = start(world / "base", "--request_timeout=0.02")
    options = {"model": "base", "prompt": "The", "n": 16, "max_tokens": 60, "logit_bias": BANNED}
    with pytest.raises(openai.APIStatusError, match="request_timeout") as error:
        server.client.completions.create(**options)
    assert error.value.status_code == 504
    with pytest.raises(openai.APIError, match="request_timeout"):
        list(server.client.completions.create(**options, stream=True))


def test_sixty_four_clients_lose_nothing(server: Running, answers: dict[str, str]) -> None:
    """Half of them leave in the middle of a stream; the others are answered as if they were alone."""
    left: queue.Queue[int] = queue.Queue()
    for number in range(192):
        left.put(number)
    wrong = []

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                number = left.get_nowait()
                question = QUESTIONS[number % len(QUESTIONS)]
                while True:
                    try:
                        stream = server.ask(question, stream=True)
                        break
                    except openai.RateLimitError:
                        time.sleep(0.05)
                if number % 4 == 0:
                    next(iter(stream))
                    stream.close()
                else:
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
                    if text != answers[question]:
                        wrong.append((question, text))

    threads = [threading.Thread(target=work) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_finishes_what_is_being_answered(endless: Running, start: Start, number: int) -> None:
    server = start(endless.checkpoint)
    stream = iter(server.client.completions.create(**LONG | {"max_tokens": 2000}, stream=True))
    next(stream)
    server.process.send_signal(number)
    assert list(stream)[-1].choices[0].finish_reason == "length"
    assert server.process.wait(30) == (143 if number == signal.SIGTERM else 130)
    assert "Traceback" not in server.log


def test_sigterm_waits_no_longer_than_grace(endless: Running, start: Start) -> None:
    server = start(endless.checkpoint, "--grace=0.5")
    stream = iter(server.client.completions.create(**LONG, stream=True))
    next(stream)
    server.process.terminate()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)
    assert server.process.wait(30) == 143
    until(lambda: "cut off at the end of --grace" in server.log)


# Safety


def test_the_log_and_the_answers_hold_no_texts_and_no_paths(server: Running, world: Path) -> None:
    server.ask("Zebra of Quagga")
    server.http.get("/nowhere?Zebra")
    server.http.post("/v1/Zebra")
    until(lambda: "other 404" in server.log)
    assert "/v1/chat/completions 200" in server.log
    assert "Zebra" not in server.log
    for path in ("/v1/models", "/", "/health", "/nowhere", "/page/", "/page/none.js", "/metrics"):
        assert str(world) not in server.http.get(path).text
        assert str(ROOT) not in server.http.get(path).text


def test_texts_are_logged_on_demand(start: Start, world: Path) -> None:
    server = start(world / "chat", "--log_texts")
    for stream in (True, False):
        reply = server.ask("Zebra", stream=stream)
        list(reply)
    until(lambda: server.log.count("Zebra") == 2)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:80"}, 403),
        ({"Host": "localhost:80:90"}, 403),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "LOCALHOST:1"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:9", "Host": "localhost:9"}, 200),
        ({"Origin": "http://localhost:9", "Host": "localhost:8"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
    ],
    ids=str,
)
def test_requests_of_other_sites_are_refused(server: Running, headers: dict[str, str], status: int) -> None:
    reply = server.http.get("/v1/models", headers=headers)
    assert reply.status_code == status
    assert "access-control-allow-origin" not in reply.headers
    body = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert server.http.post("/v1/chat/completions", json=body, headers=headers).status_code == status


def test_preflights_of_other_sites_are_refused(server: Running) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert server.http.options("/v1/chat/completions", headers=asked).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert server.http.get("/", headers=link).status_code == 200


def test_a_site_can_be_allowed(start: Start, world: Path) -> None:
    server = start(world / "chat", "--allow_origin=https://good.example", "--allow_host=chat.example")
    good = {"Origin": "https://good.example", "Sec-Fetch-Site": "cross-site", "Host": "chat.example"}
    reply = server.http.get("/v1/models", headers=good)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://good.example")
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    assert server.http.options("/v1/completions", headers=good | preflight).status_code == 200
    assert server.http.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_key_is_needed_where_one_is_set(start: Start, world: Path) -> None:
    server = start(world / "chat", "--host=0.0.0.0", env={"PAPAGAIO_API_KEY": "sesame"})
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/").status_code == 200
    for path in ("/v1/models", "/metrics", "/nowhere"):
        reply = server.http.get(path)
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    with pytest.raises(openai.AuthenticationError) as error:
        server.ask("x")
    assert error.value.code == "invalid_api_key"
    assert server.client.with_options(api_key="sesame").models.list().data
    for wrong in ("Bearer sesamé", "Bearer sesam", "Basic sesame", "Bearer"):
        assert server.http.get("/v1/models", headers={"Authorization": wrong.encode("latin-1")}).status_code == 401


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--host=0.0.0.0", "host 0.0.0.0: other machines reach this address; set PAPAGAIO_API_KEY or api_key, or say no_auth"),
        ("--host=::", "other machines reach"),
        ("--api_key=", "must consist of visible"),
        ("--api_key=a --no_auth", "exclude each other"),
        ("--compile", "compile: "),
        ("--allow_origin=example.org", "must be written as in https://example.org"),
        ("--feedback=nowhere/x.jsonl", "must be a .jsonl file in a directory that exists"),
        ("--port=70000", "--port=70000"),
    ],
)
def test_wrong_options_are_refused(script: Script, world: Path, argv: str, message: str) -> None:
    done = script("serve.py", f"--checkpoint={world / 'chat'}", *argv.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_address_in_use_is_one_line(script: Script, world: Path, server: Running) -> None:
    done = script("serve.py", f"--checkpoint={world / 'chat'}", f"--port={server.port}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --host=127.0.0.1 --port={server.port}: Address already in use")


def test_the_page_is_strict_about_what_it_loads(server: Running) -> None:
    page = server.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://", page.text)
    for name in re.findall(r'(?:src|href)="(page/[^"]+)"', page.text):
        assert server.http.get(f"/{name}").status_code == 200


def test_ratings_become_rows_that_finetune_reads(server: Running, world: Path) -> None:
    from papagaio.batches.questions import read_examples

    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    for body in ({"messages": turns, "good": True}, {"messages": turns, "good": False}):
        assert server.http.post("/feedback", json={"model": "chat"} | body).status_code == 200
    choice = {"model": "chat", "messages": turns[:1], "chosen": "Because.", "rejected": "No."}
    assert server.http.post("/feedback", json=choice).status_code == 200
    (kept,) = read_examples(world / "feedback.jsonl")  # a bad answer is left out by finetune.py
    assert kept.answer == "Because."
    (pair,) = read_examples(world / "feedback.preferences.jsonl")
    assert (pair.chosen.content, pair.rejected.content) == ("Because.", "No.")
    for wrong in ({"messages": turns}, {"messages": turns[:1], "good": True}, {"messages": turns[:1], "chosen": "x"}):
        assert server.http.post("/feedback", json={"model": "chat"} | wrong).status_code == 400
    equal = choice | {"rejected": "Because."}
    assert server.http.post("/feedback", json=equal).status_code == 400


# Other clients


def test_the_llm_command_by_its_documentation(server: Running, answers: dict[str, str], tmp_path: Path) -> None:
    """extra-openai-models.yaml, as docs/serving.md shows it."""
    pytest.importorskip("llm")
    model = f"- model_id: papagaio\n  model_name: chat\n  api_base: {server.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(model)
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "llm", "-m", "papagaio", "-o", "temperature", "0", QUESTIONS[8]]
    for more in ([], ["--no-stream"]):
        done = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
        )
        assert (done.stdout.strip(), done.returncode) == (answers[QUESTIONS[8]], 0), done.stderr

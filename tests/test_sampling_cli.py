"""sample.py and chat.py as a user meets them: prompts from everywhere, JSON, colours, a conversation's commands."""

import contextlib
import io
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import NAMES, ROOT, Call, Script

import chat
from model import GPT, GPTConfig
from papagaio.errors import UserError
from papagaio.generation.chat import Chat, Notice, Text
from papagaio.generation.engine import Engine
from papagaio.generation.options import ModelOptions, SamplingOptions
from papagaio.runs.checkpoint import model_maker
from papagaio.terminal import without_echo

Ask = Callable[..., tuple[str, str]]


@pytest.fixture
def ask(call: Call, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`ask("sample", "--seed=1", stdin="text")` runs a script's main in this process: what it printed, when all went well."""

    def run_script(name: str, *argv: object, stdin: str = "") -> tuple[str, str]:
        text = SimpleNamespace(buffer=io.BytesIO(stdin.encode()), isatty=lambda: False, __iter__=None)
        monkeypatch.setattr(sys, "stdin", text if name == "sample" else io.StringIO(stdin))
        status, out, err = call(name, "--dtype=float32", *argv)
        assert status == 0, err
        return out, err

    return run_script


ENDLESS = ["--logit_bias", "295=-1000", "299=-1000"]  # <|endoftext|> and <|end|>
PROMPT = f"The flag of {NAMES[0]} is"


def test_a_prompt_comes_from_an_argument_or_standard_input(world: Path, ask: Ask) -> None:
    command = ["--checkpoint", world / "base", "--max_new_tokens=8"]
    out, err = ask("sample", *command, "--prompt", PROMPT)
    assert out.startswith(PROMPT)
    assert err == ""
    assert ask("sample", *command, "--prompt", "-", stdin=PROMPT)[0] == out


def test_many_prompts_give_json_lines_in_order_as_each_would_alone(world: Path, ask: Ask, tmp_path: Path) -> None:
    texts = [f"The flag of {name}"[: 5 + 3 * i] for i, name in enumerate(NAMES[:5])]
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    command = ["--checkpoint", world / "base", "--max_new_tokens=12", "--num_samples=2", "--stop=.", "--temperature=0.9"]
    out, _ = ask("sample", *command, "--prompts", tmp_path / "prompts.txt", "--batch_size=3")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == [text for text in texts for _ in range(2)]
    assert [row["seed"] for row in rows] == [1337, 1338] * 5
    assert {row["finish"] for row in rows} <= {"stop", "length", "end"}
    assert all("." not in row["completion"] for row in rows)
    again = [json.loads(line) for line in ask("sample", *command, "--prompts", tmp_path / "prompts.jsonl")[0].splitlines()]
    assert [row.pop("id") for row in again] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert again == rows
    for text, pair in zip(texts, zip(rows[::2], rows[1::2], strict=True), strict=True):
        alone = ask("sample", *command, "--prompt", text)[0].removesuffix("\n").split("\n" + "-" * 20 + "\n")
        assert alone == [text + row["completion"] for row in pair]


def test_json_has_log_probabilities_on_demand(world: Path, ask: Ask) -> None:
    command = ["--checkpoint", world / "base", "--prompt", PROMPT, "--max_new_tokens=4", "--temperature=0"]
    (row,) = [json.loads(line) for line in ask("sample", *command, "--json", "--logprobs=2")[0].splitlines()]
    assert "".join(token["text"] for token in row["logprobs"]) == row["completion"]
    for token in row["logprobs"]:
        assert token["logprob"] == token["top"][0]["logprob"] >= token["top"][1]["logprob"]
    assert "logprobs" not in json.loads(ask("sample", *command, "--json")[0])


def test_probabilities_are_shown(world: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--checkpoint", world / "base", "--prompt", PROMPT, "--max_new_tokens=4", "--temperature=0"]
    plain = ask("sample", *command)[0]
    out, _ = ask("sample", *command, "--show_probs")
    assert out.startswith(plain)
    table = out.removeprefix(plain).splitlines()
    assert all(re.fullmatch(r"[01]\.\d{3} '.*' +( +[01]\.\d{3} '.*')+", line) for line in table)
    (row,) = [json.loads(line) for line in ask("sample", *command, "--json", "--logprobs=1")[0].splitlines()]
    assert [float(line.split()[0]) for line in table] == [round(math.exp(t["logprob"]), 3) for t in row["logprobs"]]
    monkeypatch.setattr("papagaio.generation.printing.colours", lambda stream: True)
    coloured, _ = ask("sample", *command, "--show_probs")
    assert coloured != out
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == out


def test_a_long_prompt_and_a_full_context_are_reported_once(world: Path, ask: Ask, tmp_path: Path) -> None:
    out, err = ask("sample", "--checkpoint", world / "base", "--max_new_tokens=90", "--num_samples=2", *ENDLESS)
    assert err.count("what came first was forgotten") == 1
    assert len(out.split("-" * 20)) == 2
    (tmp_path / "long.txt").write_text("short\n" + "x " * 200)
    _, err = ask("sample", "--checkpoint", world / "base", "--prompts", tmp_path / "long.txt", "--max_new_tokens=1")
    assert re.search(r"long.txt:2: the prompt has \d+ tokens; the model sees the last 64\n", err)


def test_a_base_model_completes_in_chat(world: Path, ask: Ask) -> None:
    command = ["--checkpoint", world / "base", "--max_new_tokens=6", "--temperature=0"]
    out, err = ask("chat", *command, "--ask", PROMPT)
    assert err.count("not fine-tuned") == 1
    assert PROMPT + out == ask("sample", *command, "--prompt", PROMPT)[0]


def test_the_commands_of_a_conversation(world: Path, ask: Ask, tmp_path: Path) -> None:
    question, saved = f"What is the flag of {NAMES[21]}?", tmp_path / "saved.jsonl"
    out, _ = ask("chat", "--checkpoint", world / "chat", stdin=f"{question}\n/retry\n/save {saved}\n/reset\n{question}\n")
    answers = out.splitlines()
    assert len(answers) == 3
    assert answers == [answers[0]] * 3
    (row,) = [json.loads(line) for line in saved.read_text().splitlines()]
    assert row == {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}]}
    ask("chat", "--checkpoint", world / "chat", stdin=f"{question}\n/system Be brief.\n{question}\n/save {saved}\n")
    (_, row) = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]

    talk = Chat(SimpleNamespace(block_size=64), SamplingOptions(temperature=0))
    assert chat.respond(talk, "/temperature 0.5") == chat.respond(talk, "/temperature") == "temperature 0.5"
    assert talk.sampling.temperature == 0.5
    assert all(name in chat.respond(talk, "/help") for name in ("/reset", "/system", "/retry", "/temperature", "/save"))
    for line in ("/temperature -1", "/temperature nan", "/temperature warm", "/save", "/save x", "/retry", "/quit"):
        with pytest.raises(UserError):
            chat.respond(talk, line)


def test_a_conversation_is_events(world: Path) -> None:
    """Text of each token, notices, and the reply; what is broken off is kept as far as it got."""
    options = ModelOptions(checkpoint=world / "chat", dtype="float32")
    talk = Chat(Engine.open(model_maker(GPT, GPTConfig), options), SamplingOptions(temperature=0, max_new_tokens=16))
    *pieces, reply = talk.ask("What is the flag of Aradornia?")
    assert all(isinstance(piece, Text) for piece in pieces)
    assert (reply.text, reply.tokens) == ("".join(piece.text for piece in pieces), len(pieces))
    assert reply.finish == "end"
    assert talk.messages()[-1].content == reply.text
    events = talk.ask("What is the flag of Aradornia?")
    while not isinstance(next(events), Text):
        pass
    events.close()
    assert len(talk.turns) == 4
    assert reply.text.startswith(talk.reply.text)
    assert (talk.reply.tokens, talk.reply.finish) == (1, "")
    notices = [event for _ in range(5) for event in talk.ask("What is the flag of Aradornia?") if isinstance(event, Notice)]
    assert len(notices) == 1, "once per conversation"
    with pytest.raises(UserError, match="ask a shorter one"):
        list(talk.ask("x" * 300))
    assert talk.turns[-1].role == "assistant"


QUESTIONS = [f"What is the flag of {name}?" for name in NAMES[:6]]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_independent_questions_give_json_lines_in_order_as_each_alone(world: Path, script: Script, tmp_path: Path) -> None:
    """Lines, rows and conversations; what cannot be asked has an error in its place."""
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "red."}]
    table = [
        {"question": QUESTIONS[0], "id": 7, "answer": "right"},
        {"messages": [*talk, {"role": "user", "content": QUESTIONS[1]}]},
        {"instruction": "Answer.", "input": QUESTIONS[2], "system": "Be brief."},
        {"nothing": 1},
        {"question": "x" * 300},
        {"conversations": [{"from": "human", "value": QUESTIONS[3]}, {"from": "gpt", "value": "right"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table) + "{\n")
    command = ("chat.py", "--checkpoint", world / "chat", "--dtype=float32", "--max_new_tokens=9", "--temperature=1.2")
    done = script(*command, "--questions", tmp_path / "rows.jsonl", "--batch_size=3")
    assert done.returncode == 2
    assert f"not answered: 3 ({tmp_path}/rows.jsonl:4, {tmp_path}/rows.jsonl:5, {tmp_path}/rows.jsonl:7)" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["place"] for row in rows] == [f"{tmp_path}/rows.jsonl:{i}" for i in range(1, 8)]
    assert ["error" in row for row in rows] == [False, False, False, True, True, False, True]
    assert (rows[0]["id"], rows[0]["reference"], rows[5]["reference"]) == (7, "right", "right")
    assert {row["finish"] for row in rows if "answer" in row} <= {"end", "length"}
    alone = script(*command, "--ask", QUESTIONS[0])
    assert alone.stdout == rows[0]["answer"] + "\n"
    lines = script(*command, "--questions", "-", stdin=f"{QUESTIONS[3]}\n\n/{QUESTIONS[4]}\n{QUESTIONS[0]}\n")
    assert lines.returncode == 0, lines.stderr
    found = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [row["question"] for row in found] == [QUESTIONS[3], f"/{QUESTIONS[4]}", QUESTIONS[0]], "no commands here"
    assert [found[0]["answer"], found[2]["answer"]] == [rows[5]["answer"], rows[0]["answer"]]
    assert found[2]["place"] == "standard input:4"


def test_answers_to_a_file_go_on_where_they_stopped(world: Path, ask: Ask, call: Call, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("\n".join(QUESTIONS))
    out = tmp_path / "answers.jsonl"
    command = ("--checkpoint", world / "chat", "--questions", tmp_path / "q.txt", "--out", out)
    ask("chat", *command)
    whole = out.read_bytes()
    assert [row["question"] for row in rows_of(out)] == QUESTIONS
    out.write_bytes(whole[: whole.index(QUESTIONS[3].encode())])  # a crash in the fourth line
    _, err = ask("chat", *command)
    assert f"{out}:4: cut short; the question is asked again" in err
    assert f"{out}: 3 of 6 are there already" in err
    assert out.read_bytes() == whole
    (tmp_path / "q.txt").write_text("\n".join(reversed(QUESTIONS)))
    status, _, err = call("chat", "--dtype=float32", *command)
    assert (status, out.read_bytes()) == (2, whole)
    assert f"{out}:1: not the answer to {tmp_path}/q.txt:1" in err


def test_lines_that_fail_do_not_end_a_conversation(world: Path, script: Script) -> None:
    lines = [QUESTIONS[0], "/etc/passwd?", "x" * 300, "/temperature hot", QUESTIONS[1]]
    done = script("chat.py", "--checkpoint", world / "chat", "--dtype=float32", stdin="\n".join(lines).encode() + b"\n\xff\n")
    assert done.returncode == 2
    answers = done.stdout.split("\n")
    assert [bool(answer) for answer in answers] == [True, False, False, True, False, False]
    assert [line.split(":")[1] for line in done.stderr.splitlines() if line.startswith("standard input:")] == ["2", "3", "4", "6"]
    assert done.stderr.splitlines()[-1] == "error: 4 of 6 lines of standard input failed"
    assert "each line is answered with the earlier ones in view" in done.stderr


def test_a_passage_on_standard_input_goes_before_the_question(world: Path, script: Script, tmp_path: Path) -> None:
    command = ("chat.py", "--checkpoint", world / "chat", "--dtype=float32")
    passage, question = f"{NAMES[3]} is red.", QUESTIONS[0]
    done = script(*command, "--ask", question, stdin=f"{passage}\n")
    assert "goes before the question" in done.stderr
    assert done.stdout == script(*command, "--ask", f"{passage}\n\n{question}").stdout
    (tmp_path / "lines.txt").write_text(f"{question}\n{passage}\n")
    with (tmp_path / "lines.txt").open("rb") as file:
        os.lseek(file.fileno(), len(question) + 1, os.SEEK_SET)  # as in `while read line; do ... done < lines.txt`
        loop = subprocess.run([sys.executable, *map(str, command), "--ask", question], cwd=ROOT, stdin=file, capture_output=True)
    assert (loop.returncode, loop.stderr) == (0, b"")
    reader, writer = os.pipe()  # inherited, silent, and never closed
    monkey = "import chat, sys; chat.PIPE_SECONDS = 0.1; sys.exit(chat.read_passage())"
    silent = subprocess.run([sys.executable, "-c", monkey], cwd=ROOT, stdin=reader, capture_output=True, timeout=60)
    os.close(writer)
    assert b"asking without a passage" in silent.stderr


def test_a_console_that_is_not_utf8_shows_escapes_and_valid_json(world: Path, script: Script) -> None:
    command = ("sample.py", "--checkpoint", world / "base", "--prompt=ação 🦜", "--max_new_tokens=2", "--temperature=0")
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    shown, utf8 = script(*command, env=ascii_only), script(*command)
    assert shown.returncode == 0
    assert shown.stdout == utf8.stdout.encode("ascii", "backslashreplace").decode()
    assert shown.stderr.count("the console's encoding, ascii, lacks some characters") == 1
    rows = [json.loads(script(*command, "--json", env=env).stdout) for env in (ascii_only, None)]
    assert rows[0] == rows[1]
    assert rows[0]["prompt"] == "ação 🦜"


def test_keys_typed_during_an_answer_are_not_shown() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "r") as stream:
        before = termios.tcgetattr(stream)
        with contextlib.suppress(KeyboardInterrupt), without_echo(stream):
            os.write(master, b"typed\n")
            assert select.select([stream], [], [], 10)[0], "the kernel has handled the keys"
            raise KeyboardInterrupt
        assert termios.tcgetattr(stream) == before
        assert not select.select([master], [], [], 0.2)[0], "shown"
        assert not select.select([stream], [], [], 0.2)[0], "kept for the next prompt"
        os.write(master, b"x")
        assert os.read(master, 9) == b"x", "shown again"
    os.close(master)


def test_a_conversation_in_a_terminal(world: Path, tmp_path: Path) -> None:
    """Pasted lines, a stopped answer, commands, and Ctrl-D, through a pseudo-terminal."""
    master, slave = pty.openpty()
    command = [sys.executable, "chat.py", "--checkpoint", str(world / "chat"), "--max_new_tokens=100000", "--dtype=float32"]
    environment = os.environ | {"TERM": "xterm", "NO_COLOR": "1"}
    command += ENDLESS  # the answer goes on until it is stopped
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True, close_fds=True
    )
    os.close(slave)
    seen = everything = ""

    def until(*texts: str) -> None:
        """Read what the terminal shows until these texts have come, one after another."""
        nonlocal seen, everything
        deadline = time.monotonic() + 60
        for text in texts:
            while text not in seen:
                assert time.monotonic() < deadline, f"{text!r} is not in {seen!r}"
                if select.select([master], [], [], 1)[0]:
                    data = os.read(master, 65536).decode(errors="replace")
                    if "\x1b[6n" in data:  # where is the cursor?
                        os.write(master, b"\x1b[1;1R")
                    seen += data
                    everything += data
            seen = seen.partition(text)[2]

    try:
        until(">")
        os.write(master, b"\x1b[200~What is\nthe flag?\x1b[201~\r")
        until("the flag?")
        time.sleep(0.5)
        os.write(master, b"KEYS")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        until("tokens/s", ">")
        os.write(master, f"/save {tmp_path}/talk.jsonl\r".encode())
        until("saved to", ">")
        os.write(master, b"/nonsense\r")
        until("error: /nonsense: no such command", ">")
        os.write(master, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(master)
    assert "KEYS" not in everything
    (row,) = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert row["messages"][0]["content"] == "What is\nthe flag?"
    assert row["messages"][1]["content"]

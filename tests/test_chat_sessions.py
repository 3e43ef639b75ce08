"""What chat.py keeps: the cache between turns, conversations in files, questions for the next session."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Script

import chat
from model import GPT, GPTConfig
from papagaio.errors import UserError
from papagaio.generation.chat import Chat, Reply
from papagaio.generation.engine import Engine, Request
from papagaio.generation.options import SamplingOptions
from papagaio.generation.prefixes import Prefixes
from papagaio.tokenizer import ByteTokenizer

GREEDY = SamplingOptions(temperature=0, max_new_tokens=12)


@pytest.fixture
def counted() -> tuple[Engine, list[int]]:
    """An engine with random weights, and how many tokens the model reads in each forward pass."""
    torch.manual_seed(0)
    shape = dict(block_size=512, n_layer=2, n_head=2, n_embd=32, zero_init=False, window_pattern="SL")
    model, read = GPT(GPTConfig(vocab_size=ByteTokenizer().vocab_size, **shape)), []
    hidden = model.hidden

    def counting(ids: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        read.append(ids.numel())
        return hidden(ids, *more, **named)

    model.hidden = counting
    return Engine(model, ByteTokenizer(), is_chat=True), read


def tokens(engine: Engine, prompt: list[int], prefixes: Prefixes | None, stop_after: int = 99) -> list[int]:
    steps = engine.complete([Request(prompt)], GREEDY, end={-1}, prefixes=prefixes)
    return [step.token.id for step, _ in zip(steps, range(stop_after), strict=False)]


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_known_beginning_is_not_read_again_and_changes_nothing(position: str) -> None:
    torch.manual_seed(1)
    shape = dict(block_size=128, n_layer=2, n_head=2, n_embd=32, zero_init=False, position=position, smear=True, bigram_rows=64)
    engine = Engine(GPT(GPTConfig(vocab_size=ByteTokenizer().vocab_size, window_pattern="SL", **shape)), ByteTokenizer())
    prefixes = Prefixes(1000)
    text = engine.encode("Once upon a time there was a parrot that talked all day long.")
    for prompt in (text, [*text[:40], *b"and now something else"], text[:50], [*text, *b" More."]):
        assert tokens(engine, prompt, prefixes) == tokens(engine, prompt, None)
    assert prefixes.tokens > 0


def test_a_second_turn_reads_only_what_is_new(counted: tuple[Engine, list[int]]) -> None:
    engine, read = counted
    talk = Chat(engine, GREEDY)
    first = next(event for event in talk.ask("x" * 200) if isinstance(event, Reply))
    assert sum(read) == 203 + first.tokens
    read.clear()
    talk.turns[-1] = talk.turns[-1].model_copy(update={"content": ""})  # random bytes are no text that is encoded as it came
    list(talk.ask("y" * 5))
    assert sum(read[:1]) < 20
    read.clear()
    list(talk.retry())
    assert read[0] == 1


def test_an_answer_that_is_broken_off_is_known_as_far_as_it_got(counted: tuple[Engine, list[int]]) -> None:
    engine, read = counted
    prefixes = Prefixes(1000)
    prompt = engine.encode("a" * 50)
    begun = tokens(engine, prompt, prefixes, stop_after=4)
    read.clear()
    assert tokens(engine, [*prompt, *begun], prefixes)[:2] == tokens(engine, prompt, None)[4:6]
    assert read[0] <= 2


def test_prefixes_forget_what_was_used_longest_ago() -> None:
    class Kept:
        def __init__(self, ids: tuple[int, ...]) -> None:
            self.rows = type("Rows", (), {"filled": [len(ids)], "context": 999})()

        def beginning(self, row: int, ids: tuple[int, ...]) -> "Kept":
            return Kept(tuple(ids))

    prefixes, texts = Prefixes(100), [tuple(range(n, n + 40)) for n in (0, 100, 200)]
    for ids in texts:
        prefixes.keep(ids, Kept(ids), 0)
        prefixes.find(texts[0])
    assert set(prefixes.kept) == {texts[0], texts[2]}
    assert prefixes.tokens == 80
    longer = (*texts[0], 7, 8)
    prefixes.keep(longer, Kept(longer), 0)
    assert set(prefixes.kept) == {longer, texts[2]}
    prefixes.keep(texts[0], Kept(texts[0]), 0)  # the beginning of what is kept
    assert prefixes.tokens == 82
    assert prefixes.find(texts[0][:17]).rows.filled == [17]
    assert prefixes.find(texts[0][:15]) is None


def test_a_conversation_is_loaded_and_continued(world: Path, script: Script, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    first = script("chat.py", f"--checkpoint={world / 'chat'}", stdin=f"What is the flag of Aramia?\n/save {path}\n")
    assert first.returncode == 0, first.stderr
    again = script("chat.py", f"--checkpoint={world / 'chat'}", stdin=f"/load {path}\nAnd of Belmia?\n/save {path}\n")
    assert again.returncode == 0, again.stderr
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert rows[1][:2] == rows[0]
    assert [row["content"] for row in rows[1][2:3]] == ["And of Belmia?"]
    missing = script("chat.py", f"--checkpoint={world / 'chat'}", stdin="/load nowhere.jsonl\n")
    assert missing.returncode == 2
    assert "nowhere.jsonl" in missing.stderr


def test_load_takes_the_system_message(tmp_path: Path, counted: tuple[Engine, list[int]]) -> None:
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    talk = Chat(counted[0], GREEDY)
    assert chat.respond(talk, f"/load {tmp_path / 'x.jsonl'}") == "a conversation of 1 question, the last of them: a"
    assert (talk.system, [turn.content for turn in talk.turns]) == ("Be brief.", ["a", "b"])
    with pytest.raises(UserError, match="a name is needed"):
        chat.respond(talk, "/load")


def test_questions_are_kept_for_the_next_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    chat.open_history().append_string("Why?")
    path = tmp_path / "papagaio" / "chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(chat.open_history().load_history_strings()) == ["Why?"]
    monkeypatch.setenv("XDG_STATE_HOME", str(path))  # a file, where a directory is needed
    assert list(chat.open_history().load_history_strings()) == []

"""evaluate.py and what papagaio/evaluation.py measures for it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call, documents, make_dataset

from model import GPT, GPTConfig
from papagaio import evaluation
from papagaio.batches.choices import Choice
from papagaio.batches.conversations import Conversation
from papagaio.batches.windows import ValidationWindows
from papagaio.corpus.dataset import Dataset
from papagaio.errors import MachineError
from papagaio.evaluation import (
    Answer,
    answer_nats,
    answer_perplexity,
    choose,
    choose_shots,
    evaluate_loss,
    question_ids,
    text_batches,
    words,
)
from papagaio.generation.engine import Engine
from papagaio.report import Report
from papagaio.runs.checkpoint import contents, write_checkpoint
from papagaio.tokenizer import SPECIAL_TOKENS, ByteTokenizer, CharTokenizer

BYTES = ByteTokenizer()
EOT, _, USER, ASSISTANT, END = (BYTES.special[name] for name in SPECIAL_TOKENS)


def talk(question: str, answer: str, **more: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages=messages, place=f"qa.jsonl:{question}", **more)


@pytest.fixture
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=261, block_size=32, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.4)
    return gpt


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("The Brazilian real.", "en", ["brazilian", "real"]),
        ("O real brasileiro!", "pt", ["real", "brasileiro"]),
        ("O real brasileiro!", "en", ["o", "real", "brasileiro"]),
        ("A", "en", ["a"]),  # nothing but an article: it is the answer
        ("!", "en", ["!"]),
        ("L’eau de l'île", "fr", ["eau", "de", "île"]),
        ("Die Straße", "de", ["strasse"]),
        ("日本 語。", "ja", ["日", "本", "語"]),
        ("ｆｕｌｌ  width", "en", ["full", "width"]),
        ("the US$", "en-GB", ["us"]),
    ],
)
def test_words_are_normalized_by_language(text: str, language: str, expected: list[str]) -> None:
    assert words(text, language) == expected


def test_f1_is_the_overlap_of_words() -> None:
    def f1(said: str, right: str) -> float:
        return Answer(talk("q", right), said, False, True).f1

    assert f1("the cat sat", "a cat sat.") == 1
    assert f1("cat", "cat sat") == pytest.approx(2 / 3)
    assert f1("cat cat cat", "cat sat") == pytest.approx(2 / 5)  # each word as often as it is in both
    assert f1("", "cat") == 0
    assert f1("dog", "cat") == 0
    assert Answer(talk("q", "The Cat."), "cat", False, True).normalized
    assert not Answer(talk("q", "The Cat."), "cats", False, True).normalized


def test_texts_have_the_loss_of_the_same_documents_in_a_dataset(gpt: GPT, tmp_path: Path) -> None:
    texts = [b"first document", b"a second one " * 9, b"third"]
    dataset = make_dataset(tmp_path, [b"x" * 99], texts, 10_000)
    expected = evaluate_loss(gpt, ValidationWindows(dataset, 32, 2), BYTES, torch.float32)
    fragments = [(text.decode(), True) for text in texts]
    assert evaluate_loss(gpt, text_batches(fragments, BYTES, 32, 2), BYTES, torch.float32) == pytest.approx(expected)
    cut = [(texts[0].decode(), True), ("a second one " * 4, True), ("a second one " * 5, False), ("third", True)]
    assert evaluate_loss(gpt, text_batches(cut, BYTES, 32, 3), BYTES, torch.float32) == pytest.approx(expected)


def test_questions_are_asked_as_a_chat_or_as_text() -> None:
    shots = [talk("1+1?", "2"), talk("2+2?", "4")]
    prompt, answer = question_ids(BYTES, talk("3+3?", "6"), None, 99, 9)
    assert prompt == [EOT, USER, *b"3+3?", END, ASSISTANT]
    assert answer == [*b"6", END]
    prompt, answer = question_ids(BYTES, talk("3+3?", "6"), shots, 99, 9)
    assert prompt == [EOT, *b"1+1?\n2\n\n2+2?\n4\n\n3+3?\n"]
    assert answer == [*b"6\n"]
    assert question_ids(BYTES, talk("3+3?", "6"), shots, 25, 9)[0] == [EOT, *b"2+2?\n4\n\n3+3?\n"]
    assert question_ids(BYTES, talk("3+3?", "6"), shots, 14, 9)[0] == [EOT, *b"3+3?\n"]


def test_shots_are_of_the_questions_kind_and_never_the_question_itself() -> None:
    pool = [talk(str(i), "a", kind="ab"[i % 2]) for i in range(20)]
    for row in pool:
        shots = choose_shots(pool, row, 5)
        assert len(shots) == 5
        assert {shot.kind for shot in shots} == {row.kind}
        assert row.key not in {shot.key for shot in shots}
        assert shots == choose_shots(pool, row, 5)
    shots = choose_shots(pool, pool[0], 12)
    assert [shot.kind for shot in shots] == ["b"] * 3 + ["a"] * 9
    assert choose_shots([], pool[0], 4) == []


def test_nats_and_perplexity_are_their_definitions(gpt: GPT) -> None:
    questions = [([1, 2, 3], [4, 5]), ([6], [7]), ([8] * 30, [1] * 9), ([9, 9], [2, 3, 4])]
    nats = answer_nats(Engine(gpt, BYTES), questions, batch_size=2)
    for (prompt, answer), found in zip(questions, nats.tolist(), strict=True):
        if len(prompt) + len(answer) > 33:
            assert math.isnan(found)
            continue
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logs = gpt(ids[:, :-1])[0].log_softmax(-1)
        expected = -sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert found == pytest.approx(expected, rel=1e-4)
    assert answer_perplexity(nats, questions) == pytest.approx(math.exp(float(nats[[0, 1, 3]].sum()) / 6))


@pytest.mark.parametrize("shots", [None, []])
def test_the_choice_is_the_one_most_probable_by_the_byte(gpt: GPT, shots: list | None) -> None:
    rows = [Choice(question=f"q{i}", choices=["red", "a longer one", "é", "blue"], answer=0) for i in range(5)]
    picked = choose(Engine(gpt, BYTES), rows, shots)
    for row, found in zip(rows, picked, strict=True):
        pairs = [question_ids(BYTES, talk(row.question, choice), shots, 32, 0) for choice in row.choices]
        nats = answer_nats(Engine(gpt, BYTES), pairs).tolist()
        assert found == int(np.argmin([n / len(c.encode()) for n, c in zip(nats, row.choices, strict=True)]))
    with torch.no_grad():
        gpt.head.weight.zero_()  # now each token costs the same: 5/4, 7/6 and 3/2 of it a byte, the end included
    even = [Choice(question="q", choices=["reds", "éçã", "ab"], answer=0)]
    assert choose(Engine(gpt, BYTES), even, shots) == [1]
    long = [Choice(question="q" * 40, choices=["a", "b"], answer=0)]
    assert choose(Engine(gpt, BYTES), long, shots) == [-1]


def test_shots_leave_room_for_the_longest_choice(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any number of shots, all choices of a question follow the same prompt, and none is left out."""
    engine, shots = Engine(gpt, BYTES), [talk("1?", "2"), talk("3?", "4"), talk("5?", "6"), talk("7?", "8")]
    rows = [Choice(question=f"q{i}", choices=["a", "b", "a much longer one", "c"], answer=0) for i in range(8)]
    asked: list[tuple[list[int], list[int]]] = []
    monkeypatch.setattr(
        evaluation, "answer_nats", lambda engine, questions: asked.extend(questions) or answer_nats(engine, questions)
    )
    for count in range(5):
        report = Report()
        asked.clear()
        picked = choose(engine, rows, shots[:count], report)
        for row, found in zip(rows, picked, strict=True):
            shown = shots[:count][-1:]  # one shot and the longest choice fill 32 tokens
            pairs = [question_ids(BYTES, talk(row.question, choice), shown, 99, 0) for choice in row.choices]
            assert [asked.pop(0) for _ in pairs] == pairs
            nats = answer_nats(engine, pairs).tolist()
            assert found == int(np.argmin([n / len(c.encode()) for n, c in zip(nats, row.choices, strict=True)]))
        assert report.lines() == []
    partly = Choice(question="q" * 20, choices=["a", "a choice that does not fit"], answer=0, place="quiz.jsonl:1")
    report = Report()
    assert choose(engine, [partly], None, report) == [-1], "and not the one that fits"
    assert report.lines() == ["counted wrong, question and choices exceed the context of 32 tokens: 1 (quiz.jsonl:1)"]


def test_losses_that_are_not_finite_are_an_error(gpt: GPT) -> None:
    with torch.no_grad():
        gpt.norm = torch.nn.LayerNorm(16)
        gpt.norm.weight.fill_(math.nan)
    with pytest.raises(MachineError, match="not finite"):
        answer_nats(Engine(gpt, BYTES), [([1], [2])])


def test_checkpoints_of_other_tokenizers_keep_their_columns(world: Path, gpt: GPT, tmp_path: Path, call: Call) -> None:
    """A dataset is measured as text by a checkpoint of another tokenizer; what one cannot read is a dash."""
    characters = CharTokenizer("abc")
    small = GPT(GPTConfig(vocab_size=characters.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8))
    write_checkpoint(tmp_path / "bytes", contents(gpt, [], {"step": 1}), BYTES)
    write_checkpoint(tmp_path / "chars", contents(small, [], {"step": 1}), characters)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(Dataset(world / "data"), "val")))
    command = ("evaluate", "--dtype=float32", "--text", world / "data", held_out, "--checkpoint", tmp_path / "chars")
    status, out, err = call(*command, tmp_path / "bytes", world / "base")
    assert status == 0, err
    rows = [line.split()[-3:] for line in out.splitlines() if line.startswith("  bits per byte")]
    assert [row[0] for row in rows] == ["-", "-"]
    assert rows[0][1:] == rows[1][1:], "the dataset's text and the text itself"
    assert f"{tmp_path}/chars: text {world}/data is not measured: character 'T'" in err
    assert call(*command)[0] == 2, "nothing was measured"


def test_what_is_left_out_of_the_questions_is_said(world: Path, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"question": "Who?", "answer": "She.", "note": 1}\n{"question": "Who?"}\n')
    command = ("evaluate", "--checkpoint", world / "chat", "--questions", path)
    assert call(*command)[2].startswith(f"error: {path}:2: the keys question: none of the known shapes")
    status, _, err = call(*command, "--skip_bad")
    assert status == 0, err
    assert "left out, the keys question: none of the known shapes of a row" in err
    assert f'not read, key "note": 1 ({path}:1)' in err


def test_two_checkpoints_side_by_side(world: Path, tmp_path: Path, call: Call) -> None:
    quiz, result = tmp_path / "quiz.jsonl", tmp_path / "result.json"
    rows = [json.loads(line) for line in (world / "qa_test.jsonl").read_text().splitlines()]
    colours = ["red.", "blue.", "green.", "gold."]
    quiz.write_text(
        "".join(json.dumps({"question": r["question"], "choices": colours, "answer": r["answer"]}) + "\n" for r in rows)
    )
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(Dataset(world / "data"), "val")))
    status, out, err = call(
        *("evaluate", "--checkpoint", world / "base", world / "chat", "--questions", world / "qa_test.jsonl"),
        *("--shots_data", world / "qa_train.jsonl", "--shots=1", "--choices", quiz, "--show=2", "--json", result),
        *("--text", world / "data", held_out, "--dtype=float32"),
    )
    assert status == 0, err
    base, chat = (column["results"] for column in json.loads(result.read_text()))
    lines = [
        line["val_bpb"]
        for line in map(json.loads, (world / "base" / "metrics.jsonl").read_text().splitlines())
        if "val_bpb" in line
    ]
    assert base[f"text {world}/data"]["bits per byte"] == pytest.approx(lines[-1], rel=1e-4)
    assert base[f"text {held_out}"]["bits per byte"] == pytest.approx(lines[-1], rel=1e-4)
    asked = f"questions {world}/qa_test.jsonl"
    reported = (world / "finetune.out").read_text().splitlines()[-1].split()[3]
    assert f"{chat[asked]['exact match']:.3f}" == reported, "as finetune.py says"
    assert chat[asked]["exact match"] <= chat[asked]["exact match, normalized"] <= chat[asked]["F1"] + 1e-9
    assert chat[asked]["perplexity of the answers"] < base[asked]["perplexity of the answers"] / 2
    assert base[asked]["ended by itself"] > 0.5
    assert chat[f"choices {quiz}"]["accuracy"] >= 0.7
    assert chat[f"choices {quiz}"]["by chance"] == 0.25
    row = next(line for line in out.splitlines() if line.startswith("  exact match  "))
    assert row.split()[-2:] == [f"{column[asked]['exact match']:.4f}" for column in (base, chat)]
    assert out.count(f"  {world}/chat: ") == 2

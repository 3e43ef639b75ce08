"""papagaio/dialogue.py and the batches that finetune.py makes of it."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune import ConversationLoader, FinetuneOptions, fitting, pad
from model import GPT, GPTConfig
from papagaio.config import UserError
from papagaio.dialogue import Message, read_conversations, render, render_prompt
from papagaio.tokenizer import SPECIAL_TOKENS, ByteTokenizer

BYTES = ByteTokenizer()
EOT, SYSTEM, USER, ASSISTANT, END = (BYTES.special[name] for name in SPECIAL_TOKENS)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def contents(path: Path) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in c.messages] for c in read_conversations(path)]


def test_the_four_shapes(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(
        tmp_path / "qa.jsonl",
        {"messages": talk},
        {"question": "q", "answer": "a"},
        "",
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "more", "output": "a"},
    )
    plain = [("user", "q"), ("assistant", "a")]
    assert contents(path) == [[("system", "s"), *plain], plain, plain, plain, plain, [("user", "q\n\nmore"), ("assistant", "a")]]
    assert read_conversations(path)[-1].place.endswith("qa.jsonl:7")


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": role} for role in roles]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ({"question": "q"}, "none of the shapes"),
        ([1], "none of the shapes"),
        ({"question": 1, "answer": "a"}, "content: .*string"),
        ({"question": "q", "answer": None}, "content: .*string"),
        ({"question": "q", "answer": "  "}, "empty answer"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        (turns("user", "user", "assistant"), "take turns"),
        (turns("assistant"), "take turns"),
        (turns("user"), "last message must be the assistant's"),
        (turns("user", "assistant", "user"), "last message must be the assistant's"),
        (turns("system"), "last message"),
        (turns("user", "system", "assistant"), "take turns"),
        (turns("user", "robot"), "role"),
    ],
)
def test_wrong_lines_are_named(line: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", {"question": "q", "answer": "a"}, line)
    with pytest.raises(UserError, match=rf"qa\.jsonl:2: .*{message}"):
        read_conversations(path)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_conversations(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="no questions"):
        read_conversations(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "q", "answer": "a"}\n{"question": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl:2: not UTF-8 at byte 14"):
        read_conversations(tmp_path / "latin.jsonl")


def test_the_template_and_its_mask() -> None:
    messages = [Message(role="user", content="q?"), Message(role="assistant", content="a"), Message(role="user", content="r")]
    tokens = render(BYTES, [*messages, Message(role="assistant", content="bc")])
    assert tokens.ids == [EOT, USER, *b"q?", END, ASSISTANT, *b"a", END, USER, *b"r", END, ASSISTANT, *b"bc", END]
    assert [i for i, learnt in enumerate(tokens.learnt) if learnt] == [6, 7, 12, 13, 14]
    assert render_prompt(BYTES, messages) == tokens.ids[:12]
    assert render_prompt(BYTES, [Message(role="system", content="s")]) == [EOT, SYSTEM, *b"s", END, ASSISTANT]


@given(
    st.sampled_from(["system", "user", "assistant"]), st.lists(st.sampled_from([*SPECIAL_TOKENS, "x", "<|", "|>"])).map("".join)
)
def test_no_content_becomes_a_special_token(role: str, content: str) -> None:
    ids = render(BYTES, [Message(role=role, content=content)]).ids
    assert [token for token in ids if token >= 256] == [EOT, BYTES.special[f"<|{role}|>"], END]


def conversations(tmp_path: Path, *pairs: tuple[str, str]) -> list:
    return read_conversations(write(tmp_path / "qa.jsonl", *({"question": q, "answer": a} for q, a in pairs)))


def options(tmp_path: Path, **values: object) -> FinetuneOptions:
    return FinetuneOptions(init_from="x", data=(tmp_path / "qa.jsonl",), out_dir="y", **values)


PAIRS = [("question " * (i % 4), "answer" * (1 + i % 3) + str(i)) for i in range(10)]


def test_a_padded_batch_has_the_loss_and_gradients_of_its_examples_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=261, block_size=128, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.2)
    examples = fitting(conversations(tmp_path, *PAIRS), BYTES, 128)
    loader = ConversationLoader(examples, options(tmp_path, batch_size=10, micro_batch_size=2), None)
    parts = loader(0)
    assert sum(float(part.weights.sum()) for part in parts) == pytest.approx(1)
    together = sum(gpt(*part) for part in parts)
    together.backward()
    grads = [p.grad.clone() for p in gpt.parameters()]
    gpt.zero_grad()
    supervised = sum(sum(tokens.learnt) for tokens in examples)
    alone = torch.zeros(())
    for tokens in examples:
        ids, learnt = torch.tensor(tokens.ids), torch.tensor(tokens.learnt)
        logits = gpt(ids[None, :-1])[0]
        nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        alone = alone + nats[learnt[1:]].sum() / supervised  # each supervised token weighs the same
    alone.backward()
    assert torch.allclose(together, alone, atol=1e-5)
    for ours, p in zip(grads, gpt.parameters(), strict=True):
        assert torch.allclose(ours, p.grad, atol=1e-5)


def test_every_end_token_and_only_answers_are_supervised(tmp_path: Path) -> None:
    examples = fitting(conversations(tmp_path, *PAIRS), BYTES, 128)
    batch = pad(examples, 1.0)
    learnt = [bytes(t for t in row[row != -100].tolist() if t < 256).decode() for row in batch.targets]
    assert learnt == [answer for _, answer in PAIRS]
    assert all(row[row != -100][-1] == END for row in batch.targets)
    assert ((batch.weights > 0) == (batch.targets != -100)).all()


def test_every_conversation_comes_once_an_epoch(tmp_path: Path) -> None:
    examples = fitting(conversations(tmp_path, *PAIRS), BYTES, 128)
    loader = ConversationLoader(examples, options(tmp_path, batch_size=5), None)

    def epoch(first: int) -> list[bytes]:
        rows = [row for step in (first, first + 1) for part in loader(step) for row in part.targets]
        return sorted(bytes(t for t in row.tolist() if 0 <= t < 256) for row in rows)

    assert epoch(0) == epoch(2) == sorted(answer.encode() for _, answer in PAIRS)
    assert not all(torch.equal(a.ids, b.ids) for a, b in zip(loader(0), loader(2), strict=True))


def test_too_long_conversations_are_dropped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = conversations(tmp_path, ("q", "a"), ("q" * 100, "a"))
    assert len(fitting(found, BYTES, 50)) == 1
    assert "1 dropped as too long" in capsys.readouterr().err
    with pytest.raises(UserError, match="every conversation is longer"):
        fitting(found[1:], BYTES, 50)
    length = len(render(BYTES, found[0].messages).ids)
    assert len(fitting(found[:1], BYTES, length - 1)) == 1  # the last token is only a target
    with pytest.raises(UserError, match="longer"):
        fitting(found[:1], BYTES, length - 2)

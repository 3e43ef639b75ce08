"""papagaio/batches/conversations.py: the template, its mask, and what user text can never become."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papagaio.batches.conversations import Message, render, render_prompt
from papagaio.tokenizer import SPECIAL_TOKENS, ByteTokenizer, Tokenizer, train_bpe

BYTES = ByteTokenizer()
EOT, SYSTEM, USER, ASSISTANT, END = (BYTES.special[name] for name in SPECIAL_TOKENS)
TALK = [Message(role="user", content="q?"), Message(role="assistant", content="a"), Message(role="user", content="r")]


def test_the_template_and_its_mask() -> None:
    messages = [*TALK, Message(role="assistant", content="bc")]
    tokens = render(BYTES, messages)
    assert tokens.ids == [EOT, USER, *b"q?", END, ASSISTANT, *b"a", END, USER, *b"r", END, ASSISTANT, *b"bc", END]
    assert [i for i, supervised in enumerate(tokens.supervised) if supervised] == [6, 7, 12, 13, 14]
    last = render(BYTES, messages, train_on="last")
    assert last.ids == tokens.ids
    assert [i for i, supervised in enumerate(last.supervised) if supervised] == [12, 13, 14]
    assert render_prompt(BYTES, TALK) == tokens.ids[:12]
    assert render_prompt(BYTES, [Message(role="system", content="s")]) == [EOT, SYSTEM, *b"s", END, ASSISTANT]


@given(
    st.sampled_from(["system", "user", "assistant"]), st.lists(st.sampled_from([*SPECIAL_TOKENS, "x", "<|", "|>"])).map("".join)
)
def test_no_content_becomes_a_special_token(role: str, content: str) -> None:
    ids = render(BYTES, [Message(role=role, content=content)]).ids
    assert [token for token in ids if token >= 256] == [EOT, BYTES.special[f"<|{role}|>"], END]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """Trained on text that spells special tokens, so that it would merge them if it could."""
    return train_bpe(["<|endoftext|><|user|>hello<|end|><|assistant|>bye<|end|><|system|> " * 50] * 4, 400)


def test_ten_thousand_strings_that_spell_special_tokens_stay_text(bpe: Tokenizer) -> None:
    rng = random.Random(0)
    parts = [
        *SPECIAL_TOKENS,
        *(name[:i] for name in SPECIAL_TOKENS for i in (1, 2, 5)),
        "<",
        "|",
        ">",
        " ",
        "\n",
        "é",
        "🦜",
        "ab",
    ]
    special = set(bpe.special.values())
    for _ in range(10_000):
        content = "".join(rng.choices(parts, k=rng.randint(1, 8)))
        role = rng.choice(["system", "user", "assistant"])
        ids, supervised = render(bpe, [Message(role=role, content=content)])
        inside = ids[2:-1]
        assert not special.intersection(inside), content
        assert bpe.decode(inside) == content
        assert ids[:2] + ids[-1:] == [bpe.special[name] for name in ("<|endoftext|>", f"<|{role}|>", "<|end|>")]
        assert supervised == [False, False] + [role == "assistant"] * (len(ids) - 2)

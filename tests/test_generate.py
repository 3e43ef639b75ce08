"""papagaio/generate.py: each filter against its definition, streaming of text, batches against single rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import GPT, GPTConfig
from papagaio.config import SamplingOptions
from papagaio.generate import (
    generate,
    greedy_batch,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample_token,
    stream_text,
)
from papagaio.tokenizer import ByteTokenizer

LOGITS = st.lists(st.floats(-20, 20), min_size=1, max_size=12, unique=True).map(lambda row: torch.tensor([row]))


def options(**values: object) -> SamplingOptions:
    return SamplingOptions(checkpoint="x", **values)


def kept(logits: Tensor) -> set[int]:
    return set((logits[0] > -torch.inf).nonzero().flatten().tolist())


@given(LOGITS, st.integers(0, 20))
def test_top_k_keeps_the_k_largest(logits: Tensor, k: int) -> None:
    found = kept(keep_top_k(logits, k))
    assert len(found) == min(k or 12, logits.size(1))
    dropped = set(range(logits.size(1))) - found
    assert all(logits[0, i] >= logits[0, j] for i in found for j in dropped)


@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_p(logits: Tensor, p: float) -> None:
    probabilities = logits[0].double().softmax(0)
    found = kept(keep_top_p(logits, p))
    mass = float(probabilities[list(found)].sum())
    assert mass >= p - 1e-5
    smallest = min(found, key=lambda i: float(probabilities[i]))
    assert mass - float(probabilities[smallest]) < p + 1e-5, "one fewer would have been enough"
    others = set(range(len(probabilities))) - found
    assert all(probabilities[smallest] >= probabilities[i] - 1e-6 for i in others)


@given(LOGITS, st.floats(0.01, 1))
def test_min_p_keeps_what_is_near_the_best(logits: Tensor, p: float) -> None:
    probabilities = logits[0].double().softmax(0)
    ratio = probabilities / probabilities.max()
    for i in range(len(ratio)):
        if abs(float(ratio[i]) - p) > 1e-5:
            assert (i in kept(keep_min_p(logits, p))) == (float(ratio[i]) > p)


def test_repetition_penalty_is_ctrls() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    assert penalize_repetition(logits, torch.tensor([[0, 1, 0]]), 2.0).tolist() == [[1.0, -4.0, 3.0, -3.0]]


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, [0.6, 0.3, 0.1]), (0.5, [0.36, 0.09, 0.01]), (2.0, [0.6**0.5, 0.3**0.5, 0.1**0.5])]
)
def test_draws_follow_the_distribution_at_a_temperature(temperature: float, expected: list[float]) -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, 3)
    ids = torch.zeros(20_000, 1, dtype=torch.int64)
    drawn = sample_token(logits, ids, options(temperature=temperature), torch.Generator().manual_seed(0))
    frequencies = drawn.bincount(minlength=3) / 20_000
    assert torch.allclose(frequencies, torch.tensor(expected) / sum(expected), atol=0.015)


def test_temperature_zero_is_greedy_and_filters_combine() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    ids = torch.tensor([[3]])
    generator = torch.Generator().manual_seed(0)
    assert sample_token(logits, ids, options(temperature=0), generator).tolist() == [1]
    drawn = {int(sample_token(logits, ids, options(temperature=5, top_k=3, min_p=0.7), generator)) for _ in range(200)}
    assert drawn == {1, 2}
    assert int(sample_token(logits, torch.tensor([[1]]), options(temperature=0, repetition_penalty=10), generator)) == 2


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}]
)
def test_options_refuse_what_inverts_or_empties_the_distribution(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        options(**wrong)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=261, block_size=24, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.4)
    return gpt


def test_greedy_generation_is_the_argmax_of_the_model(gpt: GPT) -> None:
    ids = [1, 2, 3]
    for token in generate(gpt, [1, 2, 3], options(temperature=0, max_new_tokens=40), block_size=24):
        with torch.no_grad():
            assert token == int(gpt(torch.tensor([ids[-24:]]))[0, -1].argmax())
        ids.append(token)
    assert len(ids) == 43


def test_the_seed_decides_and_banned_tokens_never_come(gpt: GPT) -> None:
    def draw(seed: int, **more: object) -> list[int]:
        return list(generate(gpt, [1], options(temperature=1.5, max_new_tokens=60, seed=seed), block_size=24, **more))

    assert draw(1) == draw(1) != draw(2)
    assert max(draw(1)) < 261
    common = set(draw(1)) | set(draw(2))
    assert not common & set(draw(1, banned=common))


def test_generation_stops_before_an_end_token(gpt: GPT) -> None:
    whole = list(generate(gpt, [1], options(temperature=0, max_new_tokens=30), block_size=24))
    end = whole[10]
    assert (
        list(generate(gpt, [1], options(temperature=0, max_new_tokens=30), block_size=24, end=[end])) == whole[: whole.index(end)]
    )


def test_greedy_batch_gives_each_row_what_it_gets_alone(gpt: GPT) -> None:
    prompts = [[1], [2, 3, 4, 5, 6], [7, 8], [9] * 12]
    alone = [list(generate(gpt, prompt, options(temperature=0, max_new_tokens=10), block_size=24)) for prompt in prompts]
    end = alone[1][4]
    for prompt, row, tokens in zip(prompts, greedy_batch(gpt, prompts, 10, end), alone, strict=True):
        expected = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert row == expected, prompt


BYTES = ByteTokenizer()


@given(st.text(max_size=40))
def test_streaming_gives_whole_characters_and_all_of_them(text: str) -> None:
    pieces = list(stream_text(BYTES, BYTES.encode(text)))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces) or "�" in text


@settings(max_examples=300)
@given(st.text("ab\n🦜", max_size=20), st.lists(st.text("ab\n🦜", min_size=1, max_size=4), min_size=1, max_size=3))
def test_streaming_ends_before_the_first_stop_text(text: str, stop: list[str]) -> None:
    cuts = [text.index(s) for s in stop if s in text]
    # A stop text that is complete earlier wins over one that began earlier and is complete later.
    ends = [text.index(s) + len(s) for s in stop if s in text]
    seen = text[: min(ends)] if ends else text
    expected = text[: min(text.index(s) for s in stop if s in seen)] if cuts else text
    assert "".join(stream_text(BYTES, BYTES.encode(text), stop)) == expected


def test_a_broken_character_at_the_end_is_shown_as_such() -> None:
    assert "".join(stream_text(BYTES, list("é".encode()[:1]))) == "�"

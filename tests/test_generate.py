"""papagaio/generation: each filter against its definition, streaming of text, batches and threads against single rows."""

import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import GPT, GPTConfig
from papagaio.errors import MachineError, UserError
from papagaio.generation.decoding import Row
from papagaio.generation.engine import Engine, Request, Step
from papagaio.generation.options import ModelOptions, SamplingOptions
from papagaio.generation.sampling import (
    Sampler,
    draw,
    filtered,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from papagaio.generation.streaming import TextStream
from papagaio.runs.checkpoint import model_maker
from papagaio.tokenizer import ByteTokenizer

LOGITS = st.lists(st.floats(-20, 20), min_size=1, max_size=12, unique=True).map(lambda row: torch.tensor([row]))


BYTES = ByteTokenizer()
options = SamplingOptions


def complete(
    gpt: GPT,
    requests: Sequence[Request],
    options: SamplingOptions,
    end: Collection[int] = (),
    banned: Collection[int] = (),
    **more: int,
) -> Iterator[Step]:
    """Without the special tokens' effect, unless given."""
    return Engine(gpt, BYTES).complete(requests, options, end=end, banned=banned, **more)


def generate(gpt: GPT, prompt: list[int], options: SamplingOptions, **more: Collection[int]) -> list[int]:
    """The tokens after the prompt, without an end token."""
    steps = complete(gpt, [Request(prompt, options.seed)], options, **more)
    return [step.token.id for step in steps if step.finish != "end"]


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
    seen = torch.tensor([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, -3.0]]


def test_frequency_penalty_bias_and_bans_are_their_formulas() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0]])
    row = Row(0, [0, 0], 0, 9, TextStream(BYTES))  # what the prompt holds is not counted
    row.ids += [1, 1, 1, 2]

    def adjusted(banned: Collection[int] = (), **values: object) -> list[list[float]]:
        return Sampler(options(**values), 3, banned, None, logits.device).adjusted(logits, [row]).tolist()

    assert adjusted(frequency_penalty=0.5) == [[2.0, -3.5, 2.5]]
    assert adjusted(presence_penalty=0.5) == [[2.0, -2.5, 2.5]]
    assert adjusted(logit_bias=("0=-1", "2=4.0")) == [[1.0, -2.0, 7.0]]
    assert adjusted(banned={0, 1}) == [[-math.inf, -math.inf, 3.0]]
    assert logits.tolist() == [[2.0, -2.0, 3.0]], "the functions are pure"


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, [0.6, 0.3, 0.1]), (0.5, [0.36, 0.09, 0.01]), (2.0, [0.6**0.5, 0.3**0.5, 0.1**0.5])]
)
def test_draws_follow_the_distribution_at_a_temperature(temperature: float, expected: list[float]) -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, 3)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    frequencies = draw(filtered(logits, options(temperature=temperature)), uniform).bincount(minlength=3) / 20_000
    assert torch.allclose(frequencies, torch.tensor(expected) / sum(expected), atol=0.015)


@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_a_draw_is_where_the_cumulated_probability_passes(logits: Tensor, uniform: float) -> None:
    reached = logits[0].double().softmax(0).cumsum(0).tolist()
    token = int(draw(logits, torch.tensor([uniform], dtype=torch.float64)))
    assert reached[token] >= uniform - 1e-6
    assert token == 0 or reached[token - 1] <= uniform + 1e-6


@given(st.floats(0, 1, exclude_max=True), st.sets(st.integers(0, 9), min_size=1, max_size=9))
def test_what_is_ruled_out_is_never_drawn(uniform: float, banned: set[int]) -> None:
    logits = Sampler(options(), 10, banned, None, torch.device("cpu")).adjusted(torch.zeros(1, 10), [])
    for u in (uniform, 0.0, math.nextafter(1, 0)):
        assert int(draw(logits, torch.tensor([u], dtype=torch.float64))) not in banned


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 4e-38, 1e-30, 9e-6])
def test_a_temperature_near_0_is_greedy(gpt: GPT, temperature: float) -> None:
    greedy = generate(gpt, [1], options(temperature=0, max_new_tokens=8), banned={3})
    assert generate(gpt, [1], options(temperature=temperature, max_new_tokens=8), banned={3}) == greedy
    assert generate(gpt, [1], options(temperature=1e-5, max_new_tokens=8), banned={3}) == greedy, "just above the floor"


def test_the_highest_temperature_still_bans(gpt: GPT) -> None:
    assert set(generate(gpt, [1], options(temperature=1e6, max_new_tokens=40), banned=range(2, 261))) <= {0, 1}


@pytest.mark.parametrize("extreme", [{"repetition_penalty": 1e-300}, {"frequency_penalty": -1e300}], ids=str)
def test_options_that_overflow_are_not_the_models_fault(gpt: GPT, extreme: dict) -> None:
    with pytest.raises(UserError, match="penalty"):
        generate(gpt, [1], options(temperature=1, max_new_tokens=8, **extreme))


def test_a_literal_backslash_in_a_stop_text_gets_a_hint() -> None:
    assert options(stop=("\n", "n", "\\")).hints() == []
    (hint,) = options(stop=(r"\n",)).hints()
    assert hint.startswith(r"--stop '\n' is searched for literally")
    assert r"$'\n'" in hint


def test_filters_combine() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    assert kept(filtered(logits, options(temperature=5, top_k=3, min_p=0.7))) == {1, 2}
    # Temperature first: at 0.2 the best has 0.993 of the probability, at 1 only 0.64.
    assert kept(filtered(logits, options(temperature=0.2, top_p=0.9))) == {1}
    assert kept(filtered(logits, options(temperature=1, top_p=0.9))) == {1, 2, 0}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-0.1, math.nan, math.inf, 1e39)),
        *({"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"repetition_penalty": 0}, {"frequency_penalty": math.nan}),
        *({"logit_bias": (word,)} for word in ("5", "a=1", "5=", "5=nan", "5=1=2", "5=1" + "0" * 40)),
    ],
    ids=str,
)
def test_options_refuse_what_inverts_or_empties_the_distribution(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        options(**wrong)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=261, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.4)
    return gpt


def draw_all(gpt: GPT, prompts: list[list[int]], seed: int = 1, batch_size: int = 1, **values: object) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    requests = [Request(prompt, seed) for prompt in prompts]
    more = {name: values.pop(name) for name in ("banned", "end") if name in values}
    for step in complete(gpt, requests, options(**values), batch_size=batch_size, **more):
        found[step.index].append(step.token.id)
    return found


def test_the_seed_decides_and_banned_tokens_never_come(gpt: GPT) -> None:
    def draw(seed: int, **more: object) -> list[int]:
        return generate(gpt, [1], options(temperature=1.5, max_new_tokens=60, seed=seed), **more)

    assert draw(1) == draw(1) != draw(2)
    assert max(draw(1)) < 261
    common = set(draw(1)) | set(draw(2))
    assert not common & set(draw(1, banned=common))


def test_generation_stops_before_an_end_token(gpt: GPT) -> None:
    whole = generate(gpt, [1], options(temperature=0, max_new_tokens=30))
    end = whole[10]
    assert generate(gpt, [1], options(temperature=0, max_new_tokens=30), end=[end]) == whole[: whole.index(end)]


def test_greedy_gives_each_row_what_it_gets_alone(gpt: GPT) -> None:
    prompts = [[1], [2, 3, 4, 5, 6], [7, 8], [9] * 12]
    alone = [generate(gpt, prompt, options(temperature=0, max_new_tokens=10)) for prompt in prompts]
    end = alone[1][4]
    for prompt, row, tokens in zip(prompts, Engine(gpt, BYTES).greedy(prompts, 10, end), alone, strict=True):
        expected = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert row == expected, prompt


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 260), min_size=1, max_size=20), min_size=1, max_size=7), st.integers(1, 4))
def test_a_seed_gives_the_same_tokens_whatever_the_batch(gpt: GPT, prompts: list[list[int]], batch_size: int) -> None:
    values = {"temperature": 1.0, "max_new_tokens": 8, "frequency_penalty": 0.3, "repetition_penalty": 1.1, "end": range(30)}
    alone = [draw_all(gpt, [prompt], **values)[0] for prompt in prompts]
    assert draw_all(gpt, prompts, batch_size=batch_size, **values) == alone


def test_rows_that_are_finished_make_room_for_the_next(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten requests in three rows: no forward pass of more rows, and none of fewer as long as some wait."""
    sizes = []
    hidden = gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda ids, **more: sizes.append(tuple(ids.shape)) or hidden(ids, **more))
    prompts = [[i, i + 1, i + 2] for i in range(10)]
    found = draw_all(gpt, prompts, batch_size=3, temperature=1.5, max_new_tokens=9, end=range(0, 260, 4))
    assert len({len(row) for row in found}) > 3
    steps = [rows for rows, T in sizes if T == 1]
    assert max(steps) == 3
    assert sum(steps) == sum(map(len, found))
    assert steps == sorted(steps, reverse=True), "full until the queue is empty"


def test_samples_of_a_prompt_share_what_was_read(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    hidden = gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda ids, **more: read.append(ids.shape) or hidden(ids, **more))
    found = draw_all(gpt, [[5] * 20] * 7, batch_size=2, temperature=0, max_new_tokens=3)
    assert found == [found[0]] * 7
    assert [shape for shape in read if shape[1] > 1] == [(1, 19)]


def test_a_request_may_have_a_limit_of_its_own(gpt: GPT) -> None:
    whole = draw_all(gpt, [[1]], temperature=0, max_new_tokens=6)[0]
    requests = [Request([1], limit=limit) for limit in (2, 9, None, 1)]
    steps = list(complete(gpt, requests, options(temperature=0, max_new_tokens=6), batch_size=4))
    found = [[step.token.id for step in steps if step.index == i] for i in range(4)]
    assert found == [whole[:2], whole, whole, whole[:1]]
    assert Engine(gpt, BYTES).greedy([[1], [1]], [2, 4], -1) == [whole[:2], whole[:4]]


def test_ends_and_lengths_are_told(gpt: GPT) -> None:
    whole = draw_all(gpt, [[1]], temperature=0, max_new_tokens=12)[0]
    end = whole[4]
    (cut,) = draw_all(gpt, [[1]], temperature=0, max_new_tokens=12, end=[end])
    assert cut == whole[: whole.index(end) + 1]
    steps = list(complete(gpt, [Request([1])], options(temperature=0, max_new_tokens=12), end=[end]))
    assert [step.finish for step in steps] == [None] * (len(steps) - 1) + ["end"]
    steps = list(complete(gpt, [Request([1])], options(temperature=0, max_new_tokens=3)))
    assert [step.finish for step in steps] == [None, None, "length"]


def test_banned_and_biased_tokens(gpt: GPT) -> None:
    def tokens(**values: object) -> list[int]:
        return draw_all(gpt, [[1]], temperature=0.7, max_new_tokens=10, **values)[0]

    assert not set(tokens(logit_bias=tuple(f"{token}=-1000" for token in set(tokens())))) & set(tokens())
    assert set(tokens(logit_bias=("42=1000",))) == {42}
    assert len(set(tokens(logit_bias=("42=40",), frequency_penalty=100))) == 10
    with pytest.raises(UserError, match="token 261: the vocabulary has the ids 0 to 260"):
        tokens(logit_bias=("261=1",))


def test_threads_that_share_an_engine_get_the_tokens_that_each_gets_alone(gpt: GPT) -> None:
    """Also between the tokens: what a completion switches on in its thread is off while it waits for its caller."""
    engine = Engine(gpt, BYTES, torch.bfloat16)
    sampling = options(temperature=1.2, max_new_tokens=40, repetition_penalty=1.1)
    requests = [[Request([i, 7, j], seed=i) for j in range(3)] for i in range(8)]

    def tokens(asked: list[Request]) -> list[tuple[int, int]]:
        found = []
        for step in engine.complete(asked, sampling, batch_size=2):
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            found.append((step.index, step.token.id))
        return found

    alone = [tokens(asked) for asked in requests]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(tokens, requests)) == alone


def test_a_model_in_training_is_as_it_was(gpt: GPT) -> None:
    gpt.train()
    before = {name: id(module) for name, module in gpt.named_modules()}
    steps = Engine(gpt, BYTES).complete([Request([1])] * 2, options(max_new_tokens=3))
    assert next(steps)
    assert not gpt.training
    steps.close()
    assert gpt.training
    assert {name: id(module) for name, module in gpt.named_modules()} == before
    assert all(p.requires_grad for p in gpt.parameters())
    gpt.eval()


def test_log_probabilities_are_the_models_own(gpt: GPT) -> None:
    """Whatever options bend the draw."""
    ids = [1, 2, 3]
    bent = options(temperature=2, top_k=5, logit_bias=("9=3",), max_new_tokens=6)
    for step in complete(gpt, [Request(ids, 1)], bent, top=3):
        with torch.no_grad():
            logprobs = gpt(torch.tensor([ids]))[0, -1].log_softmax(0)
        assert step.token.logprob == pytest.approx(float(logprobs[step.token.id]), abs=1e-4)
        assert [token for token, _ in step.token.top] == logprobs.topk(3).indices.tolist()
        assert step.token.top[0][1] == pytest.approx(float(logprobs.max()), abs=1e-4)
        ids.append(step.token.id)


def test_logits_that_are_not_finite_are_the_machines_failure(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "logits", lambda x: torch.full((len(x), 261), math.nan))
    with pytest.raises(MachineError, match="not finite"):
        draw_all(gpt, [[1]])


def stream(tokens: list[int], stop: list[str] = ()) -> list[str]:
    text = TextStream(BYTES, stop)
    pieces = []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.close()]


@given(st.text(max_size=40))
def test_streaming_gives_whole_characters_and_all_of_them(text: str) -> None:
    pieces = stream(BYTES.encode(text))
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
    assert "".join(stream(BYTES.encode(text), stop)) == expected


def test_a_broken_character_at_the_end_is_shown_as_such() -> None:
    assert "".join(stream(list("é".encode()[:1]))) == "�"


@pytest.mark.parametrize("text", ["e\u0301a\u0301", "ac\u0327a\u0303o", "👩\u200d🚀👍🏽", "🇧🇷🇵🇹!", "नि", "a\n\u0301"])
def test_streaming_does_not_part_a_character_from_its_marks(text: str) -> None:
    pieces = [piece for piece in stream(BYTES.encode(text)) if piece]
    clusters = regex.findall(r"\X", text)
    assert "".join(pieces) == text
    assert set(pieces) <= {"".join(clusters[i:j]) for i in range(len(clusters)) for j in range(i + 1, len(clusters) + 1)}


def test_text_comes_one_character_late_and_lines_at_once() -> None:
    assert stream(list(b"ab\nc")) == ["", "a", "b\n", "", "c"]


def test_int8_is_for_a_cpu(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papagaio.runtime.pick_device", lambda name: torch.device("meta"))
    options = ModelOptions(checkpoint=world / "chat", quantize="int8")
    with pytest.raises(UserError, match="--quantize=int8: its products are for a CPU, and the device is meta"):
        Engine.open(model_maker(GPT, GPTConfig), options)

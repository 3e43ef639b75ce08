"""Decoding with the cache against the model without: logits, greedy tokens, beyond the context, beside Hugging Face."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import hugging_face_gpt2, hugging_face_nanochat, random_ids, random_model
from torch import nn

from model import GPT, PRESETS, GPTConfig
from papagaio.generation import decoding
from papagaio.generation.cache import Cache
from papagaio.generation.engine import Engine, Request
from papagaio.generation.layers import Int8Linear, RowLinear, prepare
from papagaio.generation.options import SamplingOptions
from papagaio.runtime import computes_bfloat16
from papagaio.tokenizer import ByteTokenizer

VARIANTS = {
    "modern": {},
    "gpt2": PRESETS["gpt2"],
    "frontier": PRESETS["frontier"],
    "grouped": {"n_kv_head": 2},
    "windows": {"window_pattern": "SL", "window_size": 5},
    "sinusoidal": {"position": "sinusoidal", "n_kv_head": 1},
    "learned and smeared": {"position": "learned", "smear": True, "bigram_rows": 50, "value_embed_interval": 1, "n_kv_head": 2},
}


@pytest.fixture
def restore_onednn() -> Iterator[None]:
    enabled = torch.backends.mkldnn.enabled
    yield
    torch.backends.mkldnn.enabled = enabled


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def greedy(gpt: GPT, prompt: list[int], count: int) -> list[int]:
    return greedy_batch(gpt, [prompt], count)[0]


def greedy_batch(gpt: GPT, prompts: list[list[int]], count: int, end: int = -1) -> list[list[int]]:
    return Engine(gpt, ByteTokenizer()).greedy(prompts, count, end)


@torch.no_grad()
def uncached(gpt: GPT, prompt: list[int], count: int, half: bool = False) -> list[int]:
    """The reference: the whole context read again for every token. With `half`, half of it is forgotten when it is full."""
    ids, start = list(prompt), 0
    for _ in range(count):
        if half and len(ids) - start > gpt.config.block_size:
            start = len(ids) - 1 - gpt.config.block_size // 2
        ids.append(int(gpt(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids[len(prompt) :]


@each_variant
@pytest.mark.parametrize("fixed", [False, True])
@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(1, 31), max_size=12, unique=True))
@torch.no_grad()
def test_logits_in_any_pieces_are_those_of_the_whole(variant: str, fixed: bool, cuts: list[int]) -> None:
    gpt, ids = random_model(**VARIANTS[variant]), random_ids()
    cache = Cache(gpt.config, 3, slots=32 if fixed else 0, fixed=fixed)
    pieces = []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 32], strict=True):
        part = ids[:, start:stop]
        cache.make_room(stop - start)
        pieces.append(gpt.logits(gpt.hidden(part, cache=cache)))
        cache.advance(part, [stop - start] * 3)
    assert (torch.cat(pieces, 1) - gpt(ids)).abs().max() < 1e-4


@each_variant
@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_rows_of_different_lengths_have_the_logits_that_each_has_alone(variant: str, fixed: bool) -> None:
    gpt, ids, lengths = random_model(**VARIANTS[variant]), random_ids(), [9, 1, 14]
    cache = Cache(gpt.config, 3, slots=32 if fixed else 0, fixed=fixed)
    cache.make_room(14)
    gpt.hidden(ids[:, :14], cache=cache)  # padded with whatever stands there
    cache.advance(ids[:, :14], lengths)
    cache = cache.select([2, 0, 1])
    other = Cache(gpt.config, 1)
    other.make_room(4)
    gpt.hidden(ids[:1, 20:24], cache=other)
    other.advance(ids[:1, 20:24], [4])
    cache.put([2], other)
    cache.make_room(1)
    found = gpt.logits(gpt.hidden(ids[:, 30:31], cache=cache))[:, 0]
    for i, before in enumerate((ids[2, :14], ids[0, :9], ids[0, 20:24])):
        alone = gpt(torch.cat((before, ids[i, 30:31]))[None])[0, -1]
        assert (found[i] - alone).abs().max() < 1e-4


@each_variant
def test_greedy_output_is_the_uncached_one(variant: str) -> None:
    gpt = random_model(**VARIANTS[variant])
    prompts = [random_ids(1, length)[0].tolist() for length in (1, 3, 8, 20, 5)]
    expected = [uncached(gpt, prompt, 12) for prompt in prompts]
    assert [greedy(gpt, prompt, 12) for prompt in prompts] == expected
    assert greedy_batch(gpt, prompts, 12, end=97) == expected


def with_windows(gpt: GPT, **options: object) -> GPT:
    """The same model with a longer context, of which every layer sees no more than before."""
    longer = random_model(**options | {"block_size": 400})
    longer.load_state_dict(gpt.state_dict())
    windows = [window or gpt.config.block_size for window in gpt.config.windows]
    longer.config = type("Config", (GPTConfig,), {"windows": windows})(**dataclasses.asdict(longer.config))
    return longer


@pytest.mark.parametrize("variant", ["modern", "grouped", "frontier", "windows"])
def test_rotary_positions_go_on_beyond_the_context_by_dropping_the_oldest(variant: str) -> None:
    """As a model whose every block looks back block_size tokens at most would."""
    gpt = random_model(**VARIANTS[variant])
    longer = with_windows(gpt, **VARIANTS[variant])
    prompt = random_ids(1, 20)[0].tolist()
    assert greedy(gpt, prompt, 320) == uncached(longer, prompt, 320)  # more than the slots there are: they are used again


@pytest.mark.parametrize("variant", ["modern", "frontier"])
@torch.no_grad()
def test_every_token_beyond_the_context_sees_as_many_as_before(variant: str) -> None:
    """Also right after room was made: 300 tokens do not fit into 256 slots."""
    gpt = random_model(**VARIANTS[variant])
    longer = with_windows(gpt, **VARIANTS[variant])
    ids, cache, found = random_ids(2, 300), Cache(gpt.config, 2), []
    for start in range(0, 300, 5):
        part = ids[:, start : start + 5]
        cache.make_room(5)
        found.append(gpt.logits(gpt.hidden(part, cache=cache)))
        cache.advance(part, [5, 5])
    assert cache.rows.slots == 256
    assert (torch.cat(found, 1) - longer(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("variant", ["gpt2", "sinusoidal", "learned and smeared"])
def test_other_positions_begin_again_with_half_the_context(variant: str) -> None:
    gpt = random_model(**VARIANTS[variant])
    prompt = random_ids(1, 20)[0].tolist()
    expected = uncached(gpt, prompt, 70, half=True)
    assert greedy(gpt, prompt, 70) == expected
    assert greedy_batch(gpt, [prompt[:3], prompt], 70, end=97)[1] == expected


def test_steps_tell_when_the_context_is_full() -> None:
    engine = Engine(random_model(), ByteTokenizer())
    steps = list(engine.complete([Request([1] * 10)] * 2, SamplingOptions(temperature=0, max_new_tokens=40), end=(), banned=()))
    assert [step.truncated for step in steps] == [i >= 23 for i in range(40)] * 2


@pytest.mark.parametrize(("options", "twin"), [(PRESETS["gpt2"], hugging_face_gpt2), ({"n_kv_head": 2}, hugging_face_nanochat)])
def test_greedy_output_is_hugging_faces(options: dict, twin: Callable[[GPT], nn.Module]) -> None:
    gpt = random_model(**options)
    theirs = twin(gpt)
    for length in (1, 6, 12):
        prompt = random_ids(1, length)
        asked = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
        expected = theirs.generate(prompt, max_new_tokens=20, min_new_tokens=20, **asked)[0, length:]
        assert greedy(gpt, prompt[0].tolist(), 20) == expected.tolist()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("outputs", [64, 97])
@torch.inference_mode()
def test_layers_for_decoding_are_linear(rows: int, outputs: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(128, outputs), torch.randn(rows, 1, 128)
    expected = layer(x)
    assert torch.allclose(RowLinear(layer.weight, layer.bias)(x), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = RowLinear(layer.weight.bfloat16(), layer.bias)(x)
        assert half.dtype == torch.bfloat16
        assert torch.allclose(half, layer(x), atol=0.02)
    eight = Int8Linear(layer.weight, layer.bias)
    rounded = eight.weight * eight.scale[:, None]
    assert (rounded - layer.weight).abs().max() <= layer.weight.abs().max() / 254 * 1.001, "half a step"
    exact = x.bfloat16().float() @ rounded.T + layer.bias
    assert torch.allclose(eight(x), exact, atol=0.02)


def test_in_bfloat16_a_batch_of_rows_gives_the_same_whether_onednn_is_on_or_not(restore_onednn: None) -> None:
    """prepare switches it off for products of one row; the products of several rows must not lose it."""
    if not computes_bfloat16("cpu"):
        pytest.skip("no bfloat16 in this CPU")
    layer, x = nn.Linear(128, 96).bfloat16(), torch.randn(5, 7, 128).bfloat16()
    expected = layer(x)
    gpt = random_model().bfloat16()
    prepare(gpt)
    assert not torch.backends.mkldnn.enabled
    assert torch.equal(RowLinear(layer.weight, layer.bias)(x), expected)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@each_variant
@torch.inference_mode()
def test_a_prepared_model_gives_nearly_the_same_logits(variant: str, quantize: str) -> None:
    gpt, ids = random_model(**VARIANTS[variant]), random_ids()
    before = gpt(ids)
    prepare(gpt, quantize)
    assert not any(type(module) is nn.Linear for module in gpt.modules())
    difference = (gpt(ids) - before).norm() / before.norm()
    assert difference < (1e-5 if quantize == "none" else 0.05)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("variant", ["modern", "gpt2", "frontier"])
def test_the_compiled_step_gives_the_same_tokens(variant: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end at different times, and requests that wait; on a CPU the compiler's front end alone."""
    if device == "cpu":
        compiled_step = torch.compile(decoding.next_logits, backend="eager", dynamic=False)
        monkeypatch.setattr(decoding, "compiled_next_logits", lambda device_type: compiled_step)
    gpt = random_model(**VARIANTS[variant]).to(device)
    prepare(gpt)
    requests = [Request(random_ids(1, length)[0].tolist()) for length in (9, 2, 5)]
    options = SamplingOptions(temperature=0, max_new_tokens=14)

    def tokens(compiled: bool, end: list[int]) -> list[list[int]]:
        engine = Engine(gpt, ByteTokenizer(), compiled=compiled)
        found: list[list[int]] = [[], [], []]
        for step in engine.complete(requests, options, batch_size=2, end=end, banned=()):
            found[step.index].append(step.token.id)
        return found

    end = [tokens(False, [])[0][3]]  # the first request ends early
    expected = tokens(False, end)
    assert min(map(len, expected)) < 14
    assert tokens(True, end) == expected

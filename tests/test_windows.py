"""papagaio/batches/windows.py: every window once an epoch, the same ones for the same seed and step, validation without gaps."""

import hashlib
import itertools
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from papagaio.batches.mixture import Mixture, mix, parse_source, permute
from papagaio.batches.prefetch import Prefetch
from papagaio.batches.windows import Batch, ValidationWindows, WindowLoader
from papagaio.errors import UserError
from papagaio.tokenizer import CharTokenizer
from papagaio.training.corpora import Corpora, Validation


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


@given(st.integers(1, 10**12), st.integers(0, 2**63), st.integers(0, 10**6), st.lists(st.integers(0, 10**12), max_size=20))
@settings(max_examples=50, deadline=None)
def test_permute_takes_an_array_at_once(size: int, seed: int, epoch: int, places: list[int]) -> None:
    places = [place % size for place in places]
    alone = [int(permute(np.array([place]), size, seed, epoch)[0]) for place in places]
    assert permute(np.array(places, np.int64), size, seed, epoch).tolist() == alone


def test_mix_is_splitmix64() -> None:
    """The first numbers of splitmix64 from the seed 1234567, as published with it; for integers and arrays alike."""
    assert mix(1234567) == 6457827717110365317
    assert mix(np.array([1234567], np.uint64)).tolist() == [6457827717110365317]
    assert mix(1, 2, np.array([3, 2**64 - 1], np.uint64)).tolist() == [mix(1, 2, 3), mix(1, 2, 2**64 - 1)]


def test_permute_differs_by_seed_and_epoch_and_mixes() -> None:
    orders = [permute(np.arange(1000), 1000, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.15


@given(st.integers(2, 40), st.integers(1, 7), st.lists(st.integers(1, 150), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_an_epoch_visits_every_window_once(tmp_path_factory: pytest.TempPathFactory, T: int, B: int, sizes: list[int]) -> None:
    documents = [bytes(range(size)) for size in sizes]
    dataset = make_dataset(tmp_path_factory.mktemp("data"), documents, shard_tokens=1024)
    stream = np.concatenate(dataset.shards("train"))
    try:
        loader = WindowLoader(dataset, "train", T, B, seed=5)
    except UserError:
        assert len(stream) < T + 1
        return
    rows = torch.cat([loader(step)[0].ids for step in range(2 * loader.n_windows)])
    epoch = rows[: loader.n_windows]
    starts = []
    for row in epoch.numpy():
        found = [i for i in range(len(stream) - T) if (stream[i : i + T] == row).all()]
        assert found, "a window that is not in the data"
        starts.append(found)
    if len(sizes) == 1:  # windows of one counting document are told apart by their first token
        first = sorted(found[0] for found in starts)
        assert all(b - a == T for a, b in itertools.pairwise(first)), "windows overlap or leave gaps"
        assert len(stream) - 1 - len(first) * T < 2 * T, "more than one window's tokens are left out"


def test_targets_are_the_next_tokens_and_weights_sum_to_one(tmp_path: Path) -> None:
    loader = WindowLoader(make_dataset(tmp_path, [bytes(range(200))], shard_tokens=1000), "train", 8, 4, seed=1)
    (batch,) = loader(3)
    assert batch.ids.shape == batch.targets.shape == batch.weights.shape == (4, 8)
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    assert batch.weights.sum() == pytest.approx(1)
    parts = list(batch.split(2))
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [bytes(range(200)) * 20], shard_tokens=1024)
    loader, again, other = (WindowLoader(dataset, "train", 16, 4, seed) for seed in (1, 1, 2))
    for step in (0, 7, 3, 500):
        assert torch.equal(loader(step)[0].ids, again(step)[0].ids)
        assert not torch.equal(loader(step)[0].ids, other(step)[0].ids)
    assert not torch.equal(loader(0)[0].ids, loader(1)[0].ids)


def test_the_same_windows_whatever_the_batch_size(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [bytes(range(200)) * 20], shard_tokens=1024)
    small, large = (WindowLoader(dataset, "train", 16, size, 1) for size in (2, 6))
    assert torch.equal(torch.cat([small(step)[0].ids for step in range(3)]), large(0)[0].ids)


def test_documents_are_numbered(tmp_path: Path) -> None:
    documents = [bytes([i]) * (5 + 7 * i % 40) for i in range(100)]
    dataset = make_dataset(tmp_path, documents, shard_tokens=700)
    loader = WindowLoader(dataset, "train", 16, 8, 1, document_mask=True)
    plain = WindowLoader(dataset, "train", 16, 8, 1)
    for step in range(30):
        (batch,), (unmasked,) = loader(step), plain(step)
        assert unmasked.doc_ids is None
        assert torch.equal(batch.ids, unmasked.ids)
        assert torch.equal(batch.doc_ids, (batch.ids == 256).cumsum(1))


def test_threads_may_ask_for_different_steps_at_once(tmp_path: Path) -> None:
    """The training loop asks for the places of a step while the prefetching thread reads another one. Here, another thread
    runs before each line of the loader's methods."""
    dataset = make_dataset(tmp_path, [bytes(range(200)) * 20], shard_tokens=1024)
    loader, mixture = WindowLoader(dataset, "train", 16, 4, 1), Mixture([50, 30], [1.5, 2.0], 3)
    for owner, get, others in ((loader, loader.places, (5000,)), (mixture, mixture, (500, 540))):
        runs = []

        def interrupt(frame: FrameType, event: str, argument: Any, owner=owner, get=get, others=others, runs=runs) -> Any:  # noqa: ANN001
            if frame.f_locals.get("self") is not owner:
                return None
            thread = threading.Thread(target=lambda: runs.append(get(*others)))
            thread.start()
            thread.join()
            return interrupt

        arguments = tuple(range(0, 40 * len(others), 40))
        alone, tracer = get(*arguments), sys.gettrace()
        sys.settrace(interrupt)
        interrupted = get(*arguments)
        sys.settrace(tracer)
        assert interrupted == alone
        assert len(runs) > 5
        assert all(run == get(*others) for run in runs)


class Recorded:
    """A loader that notes the steps it is asked for."""

    def __init__(self, loader: WindowLoader) -> None:
        self.loader, self.asked = loader, []
        self.epochs, self.places = loader.epochs, loader.places

    def __call__(self, step: int) -> list[Batch]:
        self.asked.append(step)
        if step < 0:
            raise ValueError("no such step")
        return self.loader(step)


def test_the_next_batch_is_prefetched(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [bytes(range(200)) * 20], shard_tokens=1024)
    loader = Recorded(WindowLoader(dataset, "train", 16, 4, 1))
    with Prefetch(loader, torch.device("cpu")) as prefetch:
        for step in (3, 4, 5, 9):
            assert torch.equal(prefetch(step)[0].ids, loader.loader(step)[0].ids)
        prefetch.waiting[10].result()
        assert (prefetch.epochs(7), prefetch.places(7)) == (loader.epochs(7), loader.places(7))
    assert loader.asked[:4] == [3, 4, 5, 6]
    assert loader.asked[-2:] == [9, 10]
    with Prefetch(loader, torch.device("cpu")) as prefetch, pytest.raises(ValueError, match="no such step"):
        prefetch(-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_for_a_gpu_wait_in_pinned_memory(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [bytes(range(200)) * 20], shard_tokens=1024)
    loader = WindowLoader(dataset, "train", 16, 4, 1, document_mask=True)
    with Prefetch(loader, torch.device("cuda")) as prefetch:
        for step in range(3):
            (batch,) = prefetch(step)
            assert all(tensor.is_pinned() for tensor in batch)
            for tensor, expected in zip(batch.to(torch.device("cuda")), loader(step)[0], strict=True):
                assert torch.equal(tensor.cpu(), expected)


def test_validation_may_be_masked_too(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [b"x" * 200], [b"abc", b"defg"], shard_tokens=1024)
    (batch,) = ValidationWindows(dataset, 12, 2, document_mask=True)
    assert batch.doc_ids.tolist() == [[1] * 4 + [2] * 8]  # of the last, four are padding


def test_epochs_start_windows_at_other_tokens(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [bytes(range(256)) * 4], shard_tokens=2000)
    loader = WindowLoader(dataset, "train", 16, 1, 1)
    first = {int(loader(epoch * loader.n_windows)[0].ids[0, 1]) % 16 for epoch in range(12)}
    assert len(first) > 3


@pytest.mark.parametrize("block_size", [4, 7, 100])
def test_validation_predicts_every_token_but_the_first_once(tmp_path: Path, block_size: int) -> None:
    text = bytes(range(1, 60))
    dataset = make_dataset(tmp_path, [b"x" * 200], [text], shard_tokens=1024)
    batches = ValidationWindows(dataset, block_size, 3)
    predicted = torch.cat([batch.targets[batch.targets != -100] for batch in batches])
    assert predicted.tolist() == list(text)
    assert sum(float(batch.weights.sum()) for batch in batches) == len(text)
    for batch in batches:
        assert ((batch.targets == -100) == (batch.weights == 0)).all()


def test_validation_of_some_tokens_is_spread_over_the_split(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [b"x" * 200], [bytes(range(100))], shard_tokens=1024)
    batches = ValidationWindows(dataset, 10, 2, max_tokens=25)
    assert torch.cat([batch.targets for batch in batches]).flatten().tolist() == [
        *range(10),
        *range(30, 40),
        *range(60, 70),
    ]
    whole = ValidationWindows(dataset, 10, 2, max_tokens=10**6)
    assert torch.cat([batch.targets for batch in whole]).flatten().tolist() == [*range(100)]


def test_too_short_a_corpus_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [b"short"], [])
    with pytest.raises(UserError, match=r"train split has 6 tokens, fewer than one block of 6 \+ 1"):
        WindowLoader(dataset, "train", 6, 1, 0)
    assert WindowLoader(dataset, "train", 5, 1, 0).n_windows == 1
    with pytest.raises(UserError, match="val split is empty"):
        ValidationWindows(dataset, 5, 1)


def test_batch_moves_and_splits_together() -> None:
    batch = Batch(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2))
    assert [len(part.weights) for part in batch.split(2)] == [2, 2, 1]
    assert batch.to(torch.device("cpu")).ids.dtype == torch.int64


def test_several_datasets_are_visited_as_often_as_their_weights_say(tmp_path: Path) -> None:
    """With weights 3 and 0.5, an epoch has each window of the first three times and half of the second's, in one random order."""
    first = make_dataset(tmp_path / "a", [b"a" * 161, b"x"], shard_tokens=1024)
    second = make_dataset(tmp_path / "b", [b"b" * 321, b"y"], shard_tokens=1024)
    loader = WindowLoader([first, second], "train", 16, 5, seed=3, repeats=(3, 0.5))
    counts = [WindowLoader(each, "train", 16, 5, seed=3).n_windows for each in (first, second)]
    assert loader.n_windows == 3 * counts[0] + round(counts[1] / 2)
    drawn = [place for step in range(2 * loader.n_windows // 5) for place in loader.places(step)]
    assert len(drawn) == 2 * loader.n_windows // 5 * 5
    of_first = sum(place.startswith(str(first.directory)) for place in drawn)
    assert of_first == pytest.approx(6 * counts[0], abs=4)
    again = WindowLoader([first, second], "train", 16, 5, seed=3, repeats=(3, 0.5))
    for step in (7, 2):  # a pure function of the step
        assert torch.equal(loader(step)[0].ids, again(step)[0].ids)
    with pytest.raises(UserError, match="its weight leaves none of its"):
        WindowLoader([first, second], "train", 16, 5, seed=3, repeats=(1, 0.001))


def test_sources_have_weights(tmp_path: Path) -> None:
    odd = tmp_path / "odd:3"
    odd.mkdir()
    assert parse_source("out/a") == ("out/a", 1)
    assert parse_source("out/a:0.5") == ("out/a", 0.5)
    assert parse_source(str(odd)) == (str(odd), 1)
    assert parse_source(f"{odd}:2") == (str(odd), 2)
    assert parse_source("hf://name:config") == ("hf://name:config", 1)
    for word in ("a:0", "a:-1", "a:nan", "a:inf"):
        with pytest.raises(ValueError, match="positive"):
            parse_source(word)


def test_one_dataset_of_weight_one_gives_the_batches_it_always_gave(tmp_path: Path) -> None:
    """The hash was taken before datasets had weights: the demo's weights depend on it."""
    dataset = make_dataset(tmp_path, [bytes(range(200)) * 20, b"another document " * 90], shard_tokens=1024)
    loader, digest = WindowLoader(dataset, "train", 16, 6, 7, document_mask=True), hashlib.sha256()
    for step in range(200):
        for tensor in loader(step)[0]:
            digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == "701df9b27ec105af3ffc89a79109790b7aee0b3db72e6b1b022f6b35834c14f1"


def test_a_mixture_of_a_trillion_items_stores_no_list() -> None:
    mixture = Mixture([10**12, 10**9], [1, 2.5], 3)
    assert mixture.size == 10**12 + 25 * 10**8
    assert len(set(mixture(10**12, 10**12 + 1000))) > 990


def test_corpora_have_names_and_an_identity(tmp_path: Path) -> None:
    first = make_dataset(tmp_path / "a" / "data", [b"one text " * 50])
    second = make_dataset(tmp_path / "b" / "data", [b"another " * 50])
    paths = [str(first.directory), str(second.directory)]
    assert Corpora(paths).names == ["a/data", "b/data"]
    assert Corpora(paths[:1]).names == ["data"]
    assert Corpora(paths[:1]).sha256 == first.sha256
    words = (paths, paths[::-1], [f"{paths[0]}:2", paths[1]], [f"{paths[0]}:0.1", paths[1]], [f"{paths[0]}:0.1000001", paths[1]])
    assert len({Corpora(each).sha256 for each in words}) == 5
    tokens = [each.splits["train"]["tokens"] for each in (first, second)]
    assert Corpora([f"{paths[0]}:3", paths[1]]).epoch_tokens == 3 * tokens[0] + tokens[1]
    with pytest.raises(UserError, match=r"is named twice; give it a weight instead"):
        Corpora([paths[0], f"{tmp_path}/b/../a/data"])
    letters = make_dataset(tmp_path / "c", [b"abc"], tokenizer=CharTokenizer(sorted(set("abc validation text"))))
    with pytest.raises(UserError, match=r"a/data and .*/c have different tokenizers; prepare one of them again with --tokenizer"):
        Corpora([paths[0], str(letters.directory)])


def test_validation_of_several_datasets_is_bounded_and_weighted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of 1 and 5 nats, with shares of 3 to 1, are 2 nats; eval_tokens bounds the whole."""
    for name, val in (("a", [b"validation " * 100]), ("b", [b"x"] * 551)):  # b has half a byte per token
        make_dataset(tmp_path / name, [b"text " * 100], val, 2000)
    corpora = Corpora([str(tmp_path / "a"), str(tmp_path / "b")])
    validation = Validation(corpora, [0.75, 0.25], 10, 4, 400, document_mask=False)
    assert [len(part.starts) for part in validation.parts] == [30, 10]
    assert (validation.tokens, validation.whole) == (400, 2203)
    found = iter([{"val_loss": 1.0, "val_bpb": 2.0}, {"val_loss": 5.0, "val_bpb": 6.0}])
    monkeypatch.setattr("papagaio.training.corpora.evaluate_loss", lambda *_: next(found))
    assert validation(torch.nn.Module(), torch.float32) == pytest.approx(
        {
            "val_loss": 2.0,
            "val_bpb": (0.75 * 1100 / 1101 * 2 + 0.125 * 6) / (0.75 * 1100 / 1101 + 0.125),
            "val_loss/a": 1.0,
            "val_loss/b": 5.0,
        }
    )

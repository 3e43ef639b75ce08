"""papagaio/batches/packing.py: conversations packed into rows have the loss and the gradients that they have one by one."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, PRESETS, GPTConfig
from papagaio.batches.conversations import Conversation, render
from papagaio.batches.packing import ConversationLoader, Example, Mixture, collate, encode, evaluation_batches, pack
from papagaio.batches.share import share
from papagaio.batches.windows import Batch, WindowLoader
from papagaio.report import Report
from papagaio.tokenizer import SPECIAL_TOKENS, ByteTokenizer

BYTES = ByteTokenizer()
EOT, SYSTEM, USER, ASSISTANT, END = (BYTES.special[name] for name in SPECIAL_TOKENS)


def talk(*contents: str, weight: float = 1.0) -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation(messages=messages, weight=weight, place=f"qa.jsonl:{contents[0]}")


TALKS = [talk("question " * (i % 4) + "?", "answer" * (1 + i % 3) + str(i), weight=1 + i % 2) for i in range(9)]
TALKS.append(talk("a", "b", "c", "d"))


def examples(talks: list[Conversation] = TALKS, block_size: int = 128, **options: str) -> list[Example]:
    return encode(talks, BYTES, block_size, Report(), **options)


def loader(found: list[Example], batch_size: int, **options: object) -> ConversationLoader:
    return ConversationLoader(found, Mixture([len(found)], [1.0], 0), batch_size, 128, **options)


def random_model(preset: str, block_size: int = 128, **options: object) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=261, block_size=block_size, n_layer=2, n_head=2, n_embd=32, **PRESETS[preset] | options))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.2)
    return gpt


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("modern", {}),
        ("gpt2", {}),
        ("frontier", {}),
        ("modern", {"n_kv_head": 1, "window_pattern": "SL", "window_size": 5}),
        ("modern", {"position": "sinusoidal"}),
    ],
)
@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_has_the_loss_and_gradients_of_its_examples_one_by_one(preset: str, options: dict, packing: bool) -> None:
    gpt = random_model(preset, **options)
    found = examples()
    (batch,) = loader(found, len(found), packing=packing)(0)
    assert len(batch.ids) == (3 if packing else len(found))
    assert float(batch.weights.sum()) == pytest.approx(1)
    together = sum(gpt(*micro) for micro in batch.split(2))
    together.backward()
    grads = {name: p.grad.clone() for name, p in gpt.named_parameters()}
    gpt.zero_grad()
    total = sum(example.weight * int(example.supervised.sum()) for example in found)
    alone = torch.zeros(())
    for example in found:
        ids, supervised = torch.from_numpy(example.ids.astype(np.int64)), torch.from_numpy(example.supervised)
        nats = torch.nn.functional.cross_entropy(gpt(ids[None, :-1])[0], ids[1:], reduction="none")
        alone = alone + nats[supervised[1:]].sum() * example.weight / total  # each supervised token counts by its weight
    alone.backward()
    assert torch.allclose(together, alone, atol=1e-5)
    for name, p in gpt.named_parameters():
        assert torch.allclose(grads[name], p.grad, atol=1e-5), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_rows_on_a_gpu_have_the_loss_that_they_have_on_a_cpu() -> None:
    gpt = random_model("modern")
    found = examples()
    (batch,) = loader(found, len(found))(0)
    here = gpt(*batch)
    there = gpt.to("cuda")(*batch.to(torch.device("cuda")))
    assert torch.allclose(here, there.cpu(), atol=1e-4)


def test_no_token_of_a_row_sees_another_conversation() -> None:
    gpt = random_model("frontier").eval()
    found = examples()[:3]
    batch = collate([found], 128, 1.0)
    other = batch.ids.clone()
    other[0, : found[0].length] = 65  # another first conversation
    with torch.no_grad():
        before, after = gpt(*batch._replace(targets=None)), gpt(other, None, None, batch.doc_ids)
    second = slice(found[0].length, None)
    assert torch.equal(before[0, second], after[0, second])
    assert not torch.allclose(before[0, : found[0].length], after[0, : found[0].length])


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 100))
def test_packing_keeps_all_and_leaves_little_room(lengths: list[int], width: int) -> None:
    rows = pack(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < n <= width for n in used)
    # Never two rows that would fit into one.
    assert all(a + b > width for i, a in enumerate(used) for b in used[:i])


def test_every_end_token_and_only_answers_are_supervised() -> None:
    batch = collate([examples()], 1000, 1.0)
    supervised = batch.targets[batch.targets != -100].tolist()
    assert supervised.count(END) == 11
    assert bytes(t for t in supervised if t < 256).decode() == "".join(m.content for c in TALKS for m in c.messages[1::2])
    assert not set(supervised) - set(range(256)) - {END}
    assert ((batch.weights > 0) == (batch.targets != -100)).all()
    last = examples(train_on="last")[-1]
    assert last.ids[last.supervised].tolist() == [*b"d", END]


def test_too_long_is_dropped_or_cut_and_always_leaves_something_to_learn() -> None:
    talks = [talk("q", "a"), talk("q", "a" * 100), talk("q" * 100, "a"), talk("q" * 44, "ab")]
    report = Report()
    assert len(encode(talks, BYTES, 50, report)) == 2
    assert report.places == {"dropped, longer than the context of 50 tokens": ["qa.jsonl:q", f"qa.jsonl:{'q' * 100}"]}
    report = Report()
    whole, cut, edge = encode(talks, BYTES, 50, report, too_long="truncate")
    assert report.places == {"dropped, no room for an answer in the context of 50 tokens": [f"qa.jsonl:{'q' * 100}"]}
    assert cut.ids.tolist() == render(BYTES, talks[1].messages).ids[:51]
    assert END not in cut.ids[cut.supervised].tolist(), "an end that was cut off is not supervised"
    assert whole.ids[whole.supervised].tolist() == [*b"a", END]
    assert edge.ids[edge.supervised].tolist() == [*b"ab", END]
    assert edge.length == 50  # the last token is only a target
    assert len(encode(talks[3:], BYTES, 49, Report())) == 0
    (cut,) = encode(talks[3:], BYTES, 49, Report(), too_long="truncate")
    assert cut.ids[cut.supervised].tolist() == [*b"ab"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0])), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_a_mixture_has_each_as_often_as_its_file_says(files: list[tuple[int, float]], seed: int) -> None:
    counts, weights = zip(*files, strict=True)
    mixture = Mixture(counts, weights, seed)
    extra = [round((w - int(w)) * n) for n, w in files]
    assert mixture.size == sum(n * int(w) + e for (n, w), e in zip(files, extra, strict=True))
    if mixture.size == 0:
        return
    epochs = 4
    drawn = Counter(mixture(0, epochs * mixture.size))
    first = 0
    for (count, weight), more in zip(files, extra, strict=True):
        times = [drawn[first + i] for i in range(count)]
        assert sum(times) == epochs * (count * int(weight) + more)
        assert max(times) - min(times) <= 1, "each in turn"
        first += count
    again = Mixture(counts, weights, seed)
    assert [again(n, n + 1) for n in (7, 3, 5)] == [mixture(7, 8), mixture(3, 4), mixture(5, 6)]
    assert again(3, 6) == mixture(3, 4) + mixture(4, 5) + mixture(5, 6)


def test_every_conversation_comes_once_an_epoch() -> None:
    batches = loader(examples(), 5)

    def epoch(first: int) -> list[int]:
        return sorted(int(t) for step in (first, first + 1) for batch in batches(step) for t in batch.targets[batch.targets >= 0])

    assert epoch(0) == epoch(2) == sorted(int(t) for e in examples() for t in e.ids[e.supervised])
    assert not torch.equal(batches(0)[0].targets, batches(2)[0].targets)
    assert batches.epochs(4) == 2


def test_the_ranks_of_a_step_have_it_together() -> None:
    gpt = random_model("modern")
    whole = gpt(*loader(examples(), 10)(0)[0])
    for world_size in (2, 3, 7):  # of three rows
        parts = [share(loader(examples(), 10)(0)[0], rank, world_size) for rank in range(world_size)]
        assert len({len(part.ids) for part in parts}) == 1
        assert sum(gpt(*part) for part in parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_replayed_text_weighs_as_much_as_the_answers(tmp_path_factory: pytest.TempPathFactory) -> None:
    dataset = make_dataset(tmp_path_factory.mktemp("replay"), [b"some text " * 100], shard_tokens=2000)
    windows = WindowLoader(dataset, "train", 128, 2, 0)
    answers, text = loader(examples(), 5, replay=windows)(3)
    assert float(answers.weights.sum()) == pytest.approx(1)
    assert float(text.weights.sum()) == pytest.approx(1)
    assert torch.equal(text.ids, windows(3)[0].ids)


def test_evaluation_has_all_examples_once() -> None:
    found = examples()
    for packing in (True, False):
        batches: list[Batch] = evaluation_batches(found, 128, 2, packing)
        supervised = sorted(int(t) for batch in batches for t in batch.targets[batch.targets >= 0])
        assert supervised == sorted(int(t) for e in found for t in e.ids[e.supervised])
        assert all(len(batch.ids) <= 2 for batch in batches)

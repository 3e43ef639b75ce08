"""papagaio/batches/preferences.py: DPO against its formula, and that it moves the margin."""

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from papagaio.batches import preferences as preference
from papagaio.batches.conversations import Message, Preference, render
from papagaio.batches.packing import Mixture
from papagaio.report import Report
from papagaio.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def pair(question: str, chosen: str, rejected: str) -> Preference:
    user, *answers = (Message(role=r, content=c) for r, c in (("user", question), ("assistant", chosen), ("assistant", rejected)))
    return Preference(messages=[user], chosen=answers[0], rejected=answers[1], place=f"p.jsonl:{question}")


EARLIER = [Message(role="user", content="hi"), Message(role="assistant", content="hello")]  # an answer that is not compared
ROWS = [pair(f"say {i}", "good" + "!" * (i % 3), "bad" * (1 + i % 2)) for i in range(5)]
ROWS.append(ROWS[0].model_copy(update={"messages": [*EARLIER, Message(role="user", content="again")]}))


def model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(vocab_size=261, block_size=64, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.2)
    return gpt


def pairs() -> list[preference.Pair]:
    return preference.encode_pairs(ROWS, BYTES, 64, Report())


def log_probability(gpt: GPT, row: Preference, answer: Message) -> torch.Tensor:
    """By hand: the sum over the answer's tokens and its end."""
    ids, supervised = map(torch.tensor, render(BYTES, [*row.messages, answer], train_on="last"))
    nats = torch.nn.functional.cross_entropy(gpt(ids[None, :-1])[0], ids[1:], reduction="none")
    return -nats[supervised[1:]].sum()


def test_the_loss_is_dpos_and_so_are_its_gradients() -> None:
    start, gpt = model(0), model(1)
    found = pairs()
    reference = preference.reference_log_probabilities(start, found, torch.float32, batch_size=4)
    loader = preference.PairLoader(found, Mixture([6], [1.0], 0), 6, reference)
    (batch,) = loader(0)
    loss = sum(preference.objective(0.3)(gpt, micro) for micro in batch.split(4))
    loss.backward()
    grads = [p.grad.clone() for p in gpt.parameters()]
    gpt.zero_grad()
    expected = torch.zeros(())
    for row in ROWS:
        rewards = [log_probability(gpt, row, a) - log_probability(start, row, a).detach() for a in (row.chosen, row.rejected)]
        expected = expected - torch.nn.functional.logsigmoid(0.3 * (rewards[0] - rewards[1])) / len(ROWS)
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(grads, gpt.parameters(), strict=True))
    measured = preference.evaluate_pairs(gpt, batch.split(4), 0.3, torch.float32)
    assert measured["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    margins = [
        sum(s * (log_probability(gpt, r, a) - log_probability(start, r, a)).item() for s, a in ((1, r.chosen), (-1, r.rejected)))
        for r in ROWS
    ]
    assert measured["val_reward_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 6)
    assert measured["val_reward_margin"] == pytest.approx(0.3 * sum(margins) / 6, rel=1e-4)


def test_at_the_start_the_loss_is_that_of_a_coin_and_training_moves_the_margin() -> None:
    gpt = model()
    found = pairs()
    reference = preference.reference_log_probabilities(gpt, found, torch.float32)
    loader = preference.PairLoader(found, Mixture([6], [1.0], 0), 6, reference)
    objective = preference.objective(0.1)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3)
    losses = []
    for step in range(15):
        (batch,) = loader(step)
        loss = objective(gpt, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[-1] < 0.5
    measured = preference.evaluate_pairs(gpt, [loader(0)[0]], 0.1, torch.float32)
    assert measured["val_reward_accuracy"] == 1
    assert measured["val_reward_margin"] > 0.3


def test_pairs_that_do_not_fit_are_counted_once() -> None:
    report = Report()
    rows = [ROWS[0], pair("q" * 60, "a", "b"), pair("q", "a", "b" * 60)]
    assert len(preference.encode_pairs(rows, BYTES, 64, report)) == 1
    assert {reason: len(places) for reason, places in report.places.items()} == {
        "dropped, longer than the context of 64 tokens": 2
    }


def test_a_batch_splits_and_moves_together() -> None:
    (batch,) = preference.PairLoader(pairs(), Mixture([6], [1.0], 0), 5, torch.arange(12.0).view(6, 2))(2)
    parts = [part.to(torch.device("cpu")) for part in batch.split(2)]
    assert [type(part) for part in parts] == [preference.PairBatch] * 3
    for whole, *split in zip(batch, *parts, strict=True):
        assert torch.equal(whole, torch.cat(split))

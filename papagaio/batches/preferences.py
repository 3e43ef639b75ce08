"""Preference tuning with DPO: make the better of two answers to a question more probable, and the worse one less.

Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290). The implicit reward r of an answer is its log-probability
under the model minus its log-probability under the reference, the model before tuning:

    loss = -log sigmoid(beta (r(chosen) - r(rejected)))

The reference log-probabilities do not change: they are computed once, before training.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papagaio.batches.conversations import Conversation, Preference
from papagaio.batches.packing import Example, MixtureLoader, TooLong, collate, encode
from papagaio.batches.windows import Batch, Objective, likelihood
from papagaio.report import Report
from papagaio.runtime import autocast, evaluating
from papagaio.tokenizer import Tokenizer
from papagaio.training.parallel import ALONE, World


class Pair(NamedTuple):
    """A question with its better and its worse answer, each pair of question and answer as an Example."""

    chosen: Example
    rejected: Example

    @property
    def length(self) -> int:
        return max(self.chosen.length, self.rejected.length)

    @property
    def place(self) -> str:
        return self.chosen.place


class PairBatch(NamedTuple):
    """Pairs of an optimizer step: ids and targets (B, 2, T) int64, the chosen answer first; weights (B,), which sum to 1 over a
    step; reference (B, 2), the log-probability in nats of each answer under the reference model."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    reference: Tensor

    # Batch's methods apply to any named tuple of tensors.
    split, to, pin_memory, _each = Batch.split, Batch.to, Batch.pin_memory, Batch._each


def encode_pairs(
    rows: Iterable[Preference], tokenizer: Tokenizer, block_size: int, report: Report, too_long: TooLong = "drop"
) -> list[Pair]:
    """The pairs that fit into block_size. Only the two answers are supervised, not the question or earlier answers."""
    pairs = []
    for row in rows:
        sides = [Conversation(messages=[*row.messages, answer], place=row.place) for answer in (row.chosen, row.rejected)]
        dropped = Report()  # of its own, so that a pair is counted once and not for each side
        examples = encode(sides, tokenizer, block_size, dropped, too_long, train_on="last")
        if len(examples) < 2:
            report.note(next(iter(dropped.places)), row.place)
        elif np.array_equal(examples[0].ids, examples[1].ids):  # cut to the context
            report.note("dropped, chosen and rejected are the same within the context", row.place)
        else:
            pairs.append(Pair(*examples))
    return pairs


def log_probabilities(model: Any, batch: PairBatch) -> Tensor:
    """The log-probability in nats (B, 2) of each answer of a batch: the sum over its tokens."""
    nats = model(batch.ids.flatten(0, 1), batch.targets.flatten(0, 1), reduction="none")  # (2 B, T), 0 where the target is -100
    return -nats.float().sum(1).view_as(batch.reference)


def margins(model: Any, batch: PairBatch) -> Tensor:
    """The reward of the chosen answer minus that of the rejected one (B,), before the factor beta."""
    reward = log_probabilities(model, batch) - batch.reference  # (B, 2)
    return reward[:, 0] - reward[:, 1]


def objective(beta: float) -> Objective:
    """DPO's loss for a PairBatch; next-token prediction for a Batch of replayed pretraining text."""

    def loss(model: Any, batch: Batch | PairBatch) -> Tensor:
        if isinstance(batch, Batch):
            return likelihood(model, batch)
        return (batch.weights * -F.logsigmoid(beta * margins(model, batch))).sum()

    return loss


def collate_pairs(pairs: Sequence[Pair], reference: Tensor) -> PairBatch:
    """Pairs with their reference log-probabilities (B, 2) as a PairBatch, padded on the right, which causal attention ignores."""
    width = max(pair.length for pair in pairs)
    sides = collate([[example] for pair in pairs for example in pair], width, 1.0)
    ids, targets = (tensor.view(-1, 2, width) for tensor in (sides.ids, sides.targets))
    return PairBatch(ids, targets, torch.full((len(pairs),), 1 / len(pairs)), reference)


@dataclass
class PairLoader(MixtureLoader):
    """Batches of pairs: `loader(step)` is a pure function of step and seed. All pairs have the same weight."""

    reference: Tensor  # (N, 2)

    def __call__(self, step: int) -> list[Batch | PairBatch]:
        numbers = sorted(self.drawn(step), key=lambda i: self.items[i].length)  # micro-batches of pairs of similar length
        pairs = collate_pairs([self.items[i] for i in numbers], self.reference[numbers])
        return [pairs, *(self.replay(step) if self.replay else [])]


@torch.no_grad()  # inference mode would spoil the parameters that FSDP puts together
def reference_log_probabilities(
    model: nn.Module, pairs: Sequence[Pair], dtype: torch.dtype, batch_size: int = 32, world: World = ALONE
) -> Tensor:
    """The log-probabilities (N, 2) of all pairs under the model as it is, chosen first. Several ranks share the pairs out."""
    device = next(model.parameters()).device
    found = torch.zeros(len(pairs), 2)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].length)
    for start, counts in world.deal(range(0, len(order), batch_size)):
        numbers = order[start : start + batch_size]
        batch = collate_pairs([pairs[i] for i in numbers], found[numbers]).to(device)
        with evaluating(model), autocast(device, dtype):
            found[numbers] = log_probabilities(model, batch).cpu() * counts
    return world.sum_(found)


@torch.no_grad()  # inference mode would spoil the parameters that FSDP puts together
def evaluate_pairs(
    model: nn.Module, batches: Iterable[PairBatch], beta: float, dtype: torch.dtype, world: World = ALONE
) -> dict[str, float]:
    """val_loss: mean DPO loss. val_reward_accuracy: share of pairs whose chosen answer has the higher reward.
    val_reward_margin: mean difference of the rewards, times beta."""
    device = next(model.parameters()).device
    with evaluating(model), autocast(device, dtype):
        parts = [
            beta * margins(model, batch.to(device)).double()[: None if counts else 0] for batch, counts in world.deal(batches)
        ]
    margin = torch.cat(parts).cpu()
    sums = torch.tensor([-F.logsigmoid(margin).sum(), (margin > 0).sum(), margin.sum(), len(margin)], dtype=torch.float64)
    loss, right, total, count = world.sum_(sums).tolist()
    return {"val_loss": loss / count, "val_reward_accuracy": right / count, "val_reward_margin": total / count}

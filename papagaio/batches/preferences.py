"""Preference tuning: of two answers to a question, make the better one more probable, and the worse one less.

DPO (Direct Preference Optimization, Rafailov et al. 2023, arXiv:2305.18290). With the log-probability of an answer under the
model, less that under the model that tuning began with, as its implicit reward r,

    loss = -log sigmoid(beta (r(chosen) - r(rejected)))

The reference log-probabilities do not change: they are computed once, and stored beside the run.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from papagaio.batches.conversations import Conversation, Preference
from papagaio.batches.packing import Example, Mixture, TooLong, collate, encode, fingerprint, replayed, taken_from
from papagaio.batches.questions import Report
from papagaio.batches.windows import Batch, WindowLoader
from papagaio.runtime import autocast, evaluating
from papagaio.tokenizer import Tokenizer


class Pair(NamedTuple):
    """A question with its better and its worse answer."""

    chosen: Example
    rejected: Example

    @property
    def length(self) -> int:
        return max(self.chosen.length, self.rejected.length)

    @property
    def place(self) -> str:
        return self.chosen.place


class PairBatch(NamedTuple):
    """Pairs of an optimizer step, or some of them: ids, targets (B, 2, T) int64, the chosen answer first; weights (B,), which
    sum to 1 over a step; reference (B, 2), the log-probability in nats of each answer under the model to begin with."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    reference: Tensor

    def split(self, size: int) -> Iterator["PairBatch"]:
        """Micro-batches of `size` pairs."""
        return (PairBatch(*(tensor[i : i + size] for tensor in self)) for i in range(0, len(self.ids), size))

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pin_memory(self) -> "PairBatch":
        return PairBatch(*(tensor.pin_memory() for tensor in self))


def encode_pairs(
    rows: Iterable[Preference], tokenizer: Tokenizer, block_size: int, report: Report, too_long: TooLong = "drop"
) -> list[Pair]:
    """The pairs that fit into block_size; only the answers' tokens count, not the question's or those of earlier turns."""
    pairs = []
    for row in rows:
        sides = [Conversation(messages=[*row.messages, answer], place=row.place) for answer in (row.chosen, row.rejected)]
        lost = Report()  # one line for a pair, not one for each side
        examples = encode(sides, tokenizer, block_size, lost, too_long, train_on="last")
        if len(examples) == 2:
            pairs.append(Pair(*examples))
        else:
            report.drop(next(iter(lost.places)), row.place)
    return pairs


def log_probabilities(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """Log-probability in nats (N,) of the targets (N, T) that are not -100, a row's together."""
    hidden = model.hidden(ids)  # (N, T, C)
    wanted = targets != -100
    rows = wanted.nonzero()[:, 0]  # (M,) the row of each target
    nats = F.cross_entropy(model.logits(hidden[wanted]).float(), targets[wanted], reduction="none")  # (M,)
    return torch.zeros(len(ids), device=ids.device).index_add(0, rows, -nats)


def margins(model: Any, batch: PairBatch) -> Tensor:
    """How much more the chosen answer's reward is than the rejected one's (B,), before beta."""
    found = log_probabilities(model, batch.ids.flatten(0, 1), batch.targets.flatten(0, 1)).view_as(batch.reference)
    reward = found - batch.reference
    return reward[:, 0] - reward[:, 1]


def objective(beta: float) -> Callable[[Any, Batch | PairBatch], Tensor]:
    """What train.fit minimises: DPO's loss of pairs, the usual one of pretraining text that is mixed in."""

    def loss(model: Any, batch: Batch | PairBatch) -> Tensor:
        if isinstance(batch, Batch):
            return model(*batch)
        return (batch.weights * -F.logsigmoid(beta * margins(model, batch))).sum()

    return loss


def collate_pairs(pairs: Sequence[Pair], reference: Tensor) -> PairBatch:
    """Pairs padded on the right, where causal attention never looks."""
    width = max(pair.length for pair in pairs)
    sides = collate([[example] for pair in pairs for example in pair], width, 1.0)
    ids, targets = (tensor.view(-1, 2, width) for tensor in (sides.ids, sides.targets))
    return PairBatch(ids, targets, torch.full((len(pairs),), 1 / len(pairs)), reference)


class PairLoader:
    """Batches of pairs: `loader(step)` is a pure function of step and seed; each pair weighs the same."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        reference: Tensor,
        mixture: Mixture,
        batch_size: int,
        replay: WindowLoader | None = None,
        replay_weight: float = 1.0,
    ) -> None:
        self.pairs, self.reference, self.mixture, self.batch_size = pairs, reference, mixture, batch_size
        self.replay, self.replay_weight = replay, replay_weight

    def __call__(self, step: int) -> list[Batch | PairBatch]:
        numbers = [self.mixture(n) for n in range(step * self.batch_size, (step + 1) * self.batch_size)]
        numbers.sort(key=lambda i: self.pairs[i].length)  # so that a micro-batch has pairs of like length
        pairs = collate_pairs([self.pairs[i] for i in numbers], self.reference[numbers])
        return [pairs, *replayed(self.replay, self.replay_weight, step)]

    def epochs(self, step: int) -> float:
        """Passes over the pairs after `step` steps."""
        return step * self.batch_size / self.mixture.size

    def places(self, step: int) -> list[str]:
        """The file and line of each pair of a step, and its windows of pretraining text."""
        return taken_from(self.pairs, self.mixture, self.batch_size, self.replay, step)


class AsAnswers:
    """A loader of pairs whose answers are to be learnt one like the other: what a step of DPO costs, for --dry_run."""

    def __init__(self, loader: PairLoader) -> None:
        self.loader, self.epochs, self.places = loader, loader.epochs, loader.places

    def __call__(self, step: int) -> list[Batch]:
        batches = []
        for batch in self.loader(step):
            if isinstance(batch, PairBatch):
                ids, targets = batch.ids.flatten(0, 1), batch.targets.flatten(0, 1)
                batch = Batch(ids, targets, (targets != -100).float())
            batches.append(batch)
        return batches


@torch.inference_mode()
def reference_log_probabilities(model: nn.Module, pairs: Sequence[Pair], dtype: torch.dtype, batch_size: int = 32) -> Tensor:
    """(N, 2) of all pairs, chosen first, under the model as it is."""
    device = next(model.parameters()).device
    found = torch.zeros(len(pairs), 2)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].length)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = collate_pairs([pairs[i] for i in numbers], found[numbers]).to(device)
        with evaluating(model), autocast(device, dtype):
            sums = log_probabilities(model, batch.ids.flatten(0, 1), batch.targets.flatten(0, 1))
        found[numbers] = sums.view(-1, 2).float().cpu()
    return found


def stored_reference(path: Path, model: nn.Module, weights_sha256: str, pairs: Sequence[Pair], dtype: torch.dtype) -> Tensor:
    """The reference log-probabilities (N, 2): from the file, if it is of this model and these pairs; else computed and stored."""
    key = f"{weights_sha256} {dtype} {fingerprint(chain.from_iterable(pairs))}"
    try:
        with safe_open(path, "pt") as file:
            found, said = file.get_tensor("log_probabilities"), file.metadata() or {}
            if said.get("made_of") == key and said.get("sha256") == _sha256(found):
                return found
    except (OSError, SafetensorError):
        pass  # none yet, or cut short: made anew
    found = reference_log_probabilities(model, pairs, dtype)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({"log_probabilities": found}, temporary, metadata={"made_of": key, "sha256": _sha256(found)})
    temporary.replace(path)
    return found


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@torch.inference_mode()
def evaluate_pairs(model: nn.Module, batches: Iterable[PairBatch], beta: float, dtype: torch.dtype) -> dict[str, float]:
    """val_loss; val_reward_accuracy, the share of pairs whose chosen answer has the higher reward; val_reward_margin, by how
    much, the mean, times beta."""
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        with evaluating(model), autocast(device, dtype):
            found.append(beta * margins(model, batch.to(device)).double())
    margin = torch.cat(found)
    return {
        "val_loss": float(-F.logsigmoid(margin).mean()),
        "val_reward_accuracy": float((margin > 0).double().mean()),
        "val_reward_margin": float(margin.mean()),
    }

"""Batches of conversations: several packed into a row, so that short questions and answers leave no compute to padding.

    row      <|endoftext|><|user|>Who?<|end|><|assistant|>She.<|end|><|endoftext|><|user|>When? ...
    doc_ids  1            1       1   1      1            1   1      2            2       2

Each token sees its own conversation alone, and positions begin anew with each, so that a packed row has the loss and the
gradients of its conversations one by one. A step's loss is the mean over its supervised tokens, whatever row they are in.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from papagaio.batches.conversations import Conversation, Taught, render
from papagaio.batches.questions import Report
from papagaio.batches.windows import Batch, WindowLoader, mix, permute
from papagaio.errors import located
from papagaio.tokenizer import Tokenizer

TooLong = Literal["drop", "truncate"]


class Example(NamedTuple):
    """A conversation as token ids (N,), for each whether it is learnt (N,), the weight of its tokens in the loss, and where it
    stands (file:line)."""

    ids: NDArray[np.uint32]
    learnt: NDArray[np.bool_]
    weight: float = 1.0
    place: str = ""

    @property
    def length(self) -> int:
        """Places in a row: the last token is a target alone."""
        return len(self.ids) - 1


def encode(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    block_size: int,
    report: Report,
    too_long: TooLong = "drop",
    train_on: Taught = "all",
) -> list[Example]:
    """The conversations as examples that fit into block_size; what is left out goes into the report.

    With too_long="truncate" a long one is cut at its end; the end token that is cut off is not learnt. An example always has
    a token to learn.
    """
    examples = []
    for conversation in conversations:
        with located(conversation.place):  # a character that the tokenizer does not know
            ids, learnt = render(tokenizer, conversation.messages, train_on)
        if len(ids) > block_size + 1:
            if too_long == "drop":
                report.drop(f"longer than the context of {block_size} tokens", conversation.place)
                continue
            ids, learnt = ids[: block_size + 1], learnt[: block_size + 1]
        if not any(learnt):
            report.drop(f"no room for an answer in the context of {block_size} tokens", conversation.place)
            continue
        examples.append(Example(np.array(ids, np.uint32), np.array(learnt), conversation.weight, conversation.place))
    return examples


def fingerprint(examples: Iterable[Example]) -> str:
    """The sha256 of examples: equal where tokens, what is learnt of them, weights and order are."""
    found = hashlib.sha256()
    for example in examples:
        found.update(f"{len(example.ids)} {example.weight} ".encode() + example.ids.tobytes() + example.learnt.tobytes())
    return found.hexdigest()


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of numbers of `lengths`, each row's sum at most `width`: the longest first, each into the fullest row that has room.

    >>> pack([3, 5, 2, 6], 8)
    [[3, 2], [1, 0]]

    (Best-fit decreasing: Johnson 1974, at most 11/9 of the fewest rows and one; in practice a few percent above.)
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left of a row, its number), in order
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert lengths[number] <= width, "encode leaves out what is longer"
        place = bisect_left(room, (lengths[number],))
        left, row = room.pop(place) if place < len(room) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        insort(room, (left - lengths[number], row))
    return rows


def collate(rows: Sequence[Sequence[Example]], width: int, total: float) -> Batch:
    """Rows of examples as a batch (B, width); a supervised token's weight is its example's divided by `total`.

    Targets are -100 but where answers are learnt. What is left of a row is a document of its own.
    """
    ids = np.zeros((len(rows), width), np.int64)
    targets = np.full((len(rows), width), -100, np.int64)
    weights = np.zeros((len(rows), width), np.float32)
    doc_ids = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            place = np.s_[i, start : start + example.length]
            ids[place] = example.ids[:-1]
            targets[place] = np.where(example.learnt[1:], example.ids[1:].astype(np.int64), -100)
            weights[place] = example.learnt[1:] * (example.weight / total)
            doc_ids[place] = number
            start += example.length
    return Batch(*map(torch.from_numpy, (ids, targets, weights, doc_ids)))


def supervised_weight(examples: Iterable[Example]) -> float:
    """Supervised tokens of the examples, each counted with its example's weight."""
    return sum(float(example.weight) * int(example.learnt[1:].sum()) for example in examples)


class Mixture:
    """Numbers of examples from several files in the order of training: `mixture(n)` is the n-th, a pure function of n and seed.

    An epoch has every example as often as its file's weight says; of a weight's fraction, so many in turn.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.counts, self.seed = counts, seed
        self.firsts = np.cumsum([0, *counts[:-1]])
        self.copies = [int(weight) for weight in weights]
        self.extra = [round((weight - int(weight)) * count) for weight, count in zip(weights, counts, strict=True)]
        self.size = sum(n * copies for n, copies in zip(counts, self.copies, strict=True)) + sum(self.extra)
        self.latest: tuple[int, NDArray[np.int64]] | None = None

    def __call__(self, number: int) -> int:
        epoch, place = divmod(number, self.size)
        if self.latest is None or self.latest[0] != epoch:
            self.latest = epoch, self._epoch(epoch)
        return int(self.latest[1][permute(place, self.size, self.seed, epoch)])

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        parts = []
        for i, (first, count) in enumerate(zip(self.firsts, self.counts, strict=True)):
            parts.append(first + np.tile(np.arange(count), self.copies[i]))
            drawn = np.arange(epoch * self.extra[i], (epoch + 1) * self.extra[i])
            turns, index = np.divmod(drawn, count)
            for turn in np.unique(turns):
                index[turns == turn] = permute(index[turns == turn], count, int(mix(self.seed, i)), int(turn))
            parts.append(first + index)
        return np.concatenate(parts)


class ConversationLoader:
    """Batches of conversations: `loader(step)` is a pure function of step and seed.

    A step has batch_size conversations, packed into rows as wide as the context, or, without packing, a row each, as wide as
    the longest. The weights of the answers sum to 1; those of the pretraining text, where there is some, sum to
    replay_weight more. Of world_size ranks, each has its part of the rows.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        mixture: Mixture,
        batch_size: int,
        width: int,
        *,
        packing: bool = True,
        replay: WindowLoader | None = None,
        replay_weight: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples, self.mixture, self.batch_size, self.width, self.packing = examples, mixture, batch_size, width, packing
        self.replay, self.replay_weight = replay, replay_weight
        self.part = slice(rank, None, world_size)
        self.world_size = world_size

    def __call__(self, step: int) -> list[Batch]:
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = [self.examples[self.mixture(number)] for number in numbers]
        rows, width = arrange(chosen, self.width, self.packing)
        rows += [[]] * (-len(rows) % self.world_size)
        return [collate(rows[self.part], width, supervised_weight(chosen)), *replayed(self.replay, self.replay_weight, step)]

    def epochs(self, step: int) -> float:
        """Passes over the conversations after `step` steps."""
        return step * self.batch_size / self.mixture.size

    def places(self, step: int) -> list[str]:
        """The file and line of each conversation of a step, and its windows of pretraining text."""
        return taken_from(self.examples, self.mixture, self.batch_size, self.replay, step)


def taken_from(items: Sequence[Any], mixture: Mixture, batch_size: int, replay: WindowLoader | None, step: int) -> list[str]:
    """Where the examples or pairs of a step stand, and the windows that are mixed in."""
    numbers = range(step * batch_size, (step + 1) * batch_size)
    return [items[mixture(number)].place for number in numbers] + (replay.places(step) if replay is not None else [])


def replayed(replay: WindowLoader | None, weight: float, step: int) -> list[Batch]:
    """The pretraining text of a step, where there is some, its weights summing to `weight`."""
    return [batch._replace(weights=batch.weights * weight) for batch in replay(step)] if replay is not None else []


def arrange(examples: Sequence[Example], width: int, packing: bool) -> tuple[list[list[Example]], int]:
    """Examples in rows, and the width of these."""
    if not packing:
        return [[example] for example in examples], max(example.length for example in examples)
    return [[examples[i] for i in row] for row in pack([example.length for example in examples], width)], width


def evaluation_batches(examples: Sequence[Example], width: int, batch_size: int, packing: bool = True) -> list[Batch]:
    """All examples once; the weight of a supervised token is its example's."""
    rows, width = arrange(examples, width, packing)
    return [collate(rows[i : i + batch_size], width, 1.0) for i in range(0, len(rows), batch_size)]

"""Batches of conversations, several packed into each row, so that little is computed for padding.

    row      <|endoftext|><|user|>Who?<|end|><|assistant|>She.<|end|><|endoftext|><|user|>When? ...
    doc_ids  1            1       1   1      1            1   1      2            2       2

A token attends to its own conversation only, and positions restart with each conversation, so a packed row has the loss and the
gradients of its conversations computed one by one. The loss of a step is the mean over all its supervised tokens.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from papagaio.batches.conversations import Conversation, TrainOn, render
from papagaio.batches.mixture import Mixture
from papagaio.batches.windows import Batch, WindowLoader
from papagaio.errors import located
from papagaio.report import Report
from papagaio.tokenizer import Tokenizer

TooLong = Literal["drop", "truncate"]


class Example(NamedTuple):
    """A conversation as token ids (N,) with its loss mask (N,), the weight of its tokens in the loss, and its file:line."""

    ids: NDArray[np.uint32]
    supervised: NDArray[np.bool_]
    weight: float = 1.0
    place: str = ""

    @property
    def length(self) -> int:
        """Slots that it takes in a row: one fewer than its tokens, because the last token is a target only."""
        return len(self.ids) - 1


def encode(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    block_size: int,
    report: Report,
    too_long: TooLong = "drop",
    train_on: TrainOn = "all",
) -> list[Example]:
    """The conversations as examples that fit into block_size; those that are dropped are noted in `report`.

    With too_long="truncate", a long conversation loses its end. Every example has at least one supervised token.
    """
    examples = []
    for conversation in conversations:
        with located(conversation.place):  # for characters that are not in the tokenizer's vocabulary
            ids, supervised = render(tokenizer, conversation.messages, train_on)
        if not any(supervised):
            report.note("dropped, its answers are marked as not to be trained on", conversation.place)
            continue
        if len(ids) > block_size + 1:
            if too_long == "drop":
                report.note(f"dropped, longer than the context of {block_size} tokens", conversation.place)
                continue
            ids, supervised = ids[: block_size + 1], supervised[: block_size + 1]
        if not any(supervised):  # all that is supervised was cut off
            report.note(f"dropped, no room for an answer in the context of {block_size} tokens", conversation.place)
            continue
        examples.append(Example(np.array(ids, np.uint32), np.array(supervised), conversation.weight, conversation.place))
    return examples


def fingerprint(examples: Iterable[Example]) -> str:
    """The sha256 of the examples' tokens, loss masks and weights, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{len(example.ids)} {example.weight} ".encode() + example.ids.tobytes() + example.supervised.tobytes())
    return digest.hexdigest()


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Distribute items of these lengths over rows of at most `width`: the indices of the items in each row.

    >>> pack([3, 5, 2, 6], 8)
    [[3, 2], [1, 0]]

    The longest items come first, each goes into the fullest row with room for it (best-fit decreasing: Johnson 1974, at most
    11/9 of the fewest rows plus one; in practice a few percent above).
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free slots of a row, index of the row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert lengths[i] <= width, "encode drops or truncates what is longer"
        fullest = bisect_left(room, (lengths[i],))
        free, row = room.pop(fullest) if fullest < len(room) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(room, (free - lengths[i], row))
    return rows


def arrange(examples: Sequence[Example], width: int, packing: bool) -> tuple[list[list[Example]], int]:
    """Examples in rows, and the width of the rows: `width` if packed, else one example per row, as wide as the longest."""
    if not packing:
        return [[example] for example in examples], max(example.length for example in examples)
    return [[examples[i] for i in row] for row in pack([example.length for example in examples], width)], width


def collate(rows: Sequence[Sequence[Example]], width: int, total: float) -> Batch:
    """Rows of examples as a Batch (B, width). A supervised token has the weight of its example divided by `total`.

    Targets of tokens that are not supervised are -100. The padding of a row has doc_id 0.
    """
    shape = (len(rows), width)
    ids, targets, doc_ids = np.zeros(shape, np.int64), np.full(shape, -100), np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            slots = np.s_[i, start : start + example.length]
            ids[slots] = example.ids[:-1]
            targets[slots] = np.where(example.supervised[1:], example.ids[1:].astype(np.int64), -100)
            weights[slots] = example.supervised[1:] * (example.weight / total)
            doc_ids[slots] = number
            start += example.length
    return Batch(*map(torch.from_numpy, (ids, targets, weights, doc_ids)))


def supervised_weight(examples: Iterable[Example]) -> float:
    """The number of supervised tokens, each counted with the weight of its example."""
    return sum(float(example.weight) * int(example.supervised[1:].sum()) for example in examples)


def evaluation_batches(examples: Sequence[Example], width: int, batch_size: int, packing: bool = True) -> list[Batch]:
    """All examples once, in batches of batch_size rows. A supervised token has the weight of its example."""
    rows, width = arrange(examples, width, packing)
    return [collate(rows[i : i + batch_size], width, 1.0) for i in range(0, len(rows), batch_size)]


@dataclass
class MixtureLoader:
    """Base of the loaders of examples and of pairs: what a step draws from them, and the pretraining text mixed in (`replay`)."""

    items: Sequence[Any]
    mixture: Mixture
    batch_size: int
    replay: WindowLoader | None = field(default=None, kw_only=True)

    def drawn(self, step: int) -> list[int]:
        """The numbers of the items of a step."""
        return self.mixture(step * self.batch_size, (step + 1) * self.batch_size)

    def epochs(self, step: int) -> float:
        return step * self.batch_size / self.mixture.size

    def places(self, step: int) -> list[str]:
        return [*(self.items[i].place for i in self.drawn(step)), *(self.replay.places(step) if self.replay else [])]


@dataclass
class ConversationLoader(MixtureLoader):
    """Batches of conversations: `loader(step)` is a pure function of step and seed.

    A step has batch_size conversations, packed into rows of `width` tokens; without packing, each has a row of its own, and all
    rows are as wide as the longest. The weights of the answers sum to 1, those of the replayed text to 1 more.
    """

    width: int
    packing: bool = True

    def __call__(self, step: int) -> list[Batch]:
        examples = [self.items[i] for i in self.drawn(step)]
        rows, width = arrange(examples, self.width, self.packing)
        batch = collate(rows, width, supervised_weight(examples))
        return [batch, *(self.replay(step) if self.replay else [])]

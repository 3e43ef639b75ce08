"""What a new tokenizer learns from: a sample of the training split, or every character of the corpus."""

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

from papagaio.corpus.assembly import Documents, Selection
from papagaio.corpus.options import PrepareOptions, ReadingOptions
from papagaio.corpus.plan import Task
from papagaio.corpus.reading import read
from papagaio.corpus.split import TextHash
from papagaio.tokenizer import text_chunks

KEPT_BYTES = 2**25  # a corpus up to this size is kept in memory rather than read twice


def characters(task: Task, config: ReadingOptions) -> set[str]:
    """Every character in the documents of a task."""
    return set().union(*(set(fragment.text) for span in task for fragment in read(span, config)))


def training_sample(tasks: list[Task], config: PrepareOptions, val_tasks: Sequence[Task] = ()) -> Iterator[str]:
    """Up to `config.sample_bytes` of text of the training split, taken evenly from the whole corpus.

    The split is decided as for the shards; `val_tasks` are the text of --val_input. A document of which the sample has only a
    part is an exception: that part may be in the sample even if it will be held out. Raises UserError if there is no text.
    """
    sizes = [span.size for task in tasks for span in task]
    n = min(256, len(tasks))
    sampled, room = [tasks[i * len(tasks) // n] for i in range(n)], -(-config.sample_bytes // n)
    kept = list(_fragments(sampled, room, config)) if all(sizes) and sum(sizes) < KEPT_BYTES else None
    val = _documents(_fragments(val_tasks, sys.maxsize, config))
    found = Documents(*map(np.concatenate, zip(val, _documents(kept or _fragments(sampled, room, config)), strict=True)))
    whole = n == len(tasks) and sum(sizes) <= config.sample_bytes
    n_val = len(val.digest) if config.val_input else None
    selection = Selection(lambda: iter([found]), config, n_val, corpus_bytes=0 if whole else sum(sizes))
    ((_, chosen, cut, _),) = selection.of_split("train")
    beginning = (found.bytes.astype(float) * (1 - config.val_fraction)).astype(np.uint64)  # of a document that is cut
    left = np.where(chosen, found.bytes, np.where(cut, beginning, 0))[len(val.digest) :].tolist()  # bytes to learn from
    print(f"training a tokenizer on {sum(left):,} bytes of text", file=sys.stderr)
    for number, text in kept or _fragments(sampled, room, config):
        if left[number] > 0:
            left[number] -= len(text.encode())
            yield from text_chunks(text if left[number] >= 0 else text.encode()[: left[number]].decode(errors="ignore"))


def _documents(fragments: Iterable[tuple[int, str]]) -> Documents:
    """The documents of numbered fragments. Instead of their tokens, the characters without whitespace at the ends are counted."""
    columns = [array("Q") for _ in Documents._fields]
    for _, document in groupby(fragments, key=lambda pair: pair[0]):
        digest, n_bytes, n_characters = TextHash(), 0, 0
        for _, text in document:
            data = text.encode()
            digest.update(data)
            n_bytes, n_characters = n_bytes + len(data), n_characters + len(text.strip())
        for column, value in zip(columns, (digest.value(), n_bytes, n_characters), strict=True):
            column.append(value)
    return Documents(*(np.array(column, np.uint64) for column in columns))


def _fragments(tasks: Sequence[Task], room: int, config: PrepareOptions) -> Iterator[tuple[int, str]]:
    """(number of the document, text of a fragment) of up to `room` characters from each task."""
    number, inside = 0, False
    for task in tasks:
        left = room
        for text, first, last in (fragment for span in task for fragment in read(span, config)):
            if inside and (first or left <= 0):  # the rest of the last document is in a task that is not in the sample
                number, inside = number + 1, False
            if left <= 0:
                break
            yield number, text
            left -= len(text)
            number, inside = number + last, not last

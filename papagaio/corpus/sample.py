"""What a new tokenizer learns from: a sample of the training split, or every character of the corpus."""

import sys
from array import array
from collections.abc import Iterator
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


def training_sample(tasks: list[Task], config: PrepareOptions) -> Iterator[str]:
    """Up to `config.sample_bytes` of text of the training split, taken evenly from the whole corpus.

    The split is decided as for the shards. A document of which the sample has only a part is an exception: that part may be in
    the sample even if the document will be held out. Raises UserError if there is no text.
    """
    sizes = [span.size for task in tasks for span in task]
    kept = list(_sampled(tasks, config)) if all(sizes) and sum(sizes) < KEPT_BYTES else None
    columns = [array("Q") for _ in Documents._fields]  # instead of tokens, characters without whitespace at the ends
    for _, document in groupby(kept or _sampled(tasks, config), key=lambda pair: pair[0]):
        digest, n_bytes, n_characters = TextHash(), 0, 0
        for _, text in document:
            data = text.encode()
            digest.update(data)
            n_bytes, n_characters = n_bytes + len(data), n_characters + len(text.strip())
        for column, value in zip(columns, (digest.value(), n_bytes, n_characters), strict=True):
            column.append(value)
    found = Documents(*(np.array(column, np.uint64) for column in columns))
    selection = Selection(lambda: iter([found]), config)
    ((_, chosen, _),) = selection.of_split("train")
    room = int(found.bytes[chosen].sum())
    print(f"training a tokenizer on {room:,} bytes of text", file=sys.stderr)
    if not selection.limit:  # a single document is cut
        room = int(room * (1 - config.val_fraction))
    for number, text in kept or _sampled(tasks, config):
        if chosen[number] and room > 0:
            room -= len(text.encode())
            yield from text_chunks(text if room >= 0 else text.encode()[:room].decode(errors="ignore"))


def _sampled(tasks: list[Task], config: PrepareOptions) -> Iterator[tuple[int, str]]:
    """(number of the document, text of a fragment) from up to 256 tasks, an equal part of the sample from each."""
    n = min(256, len(tasks))
    number, inside = 0, False
    for task in (tasks[i * len(tasks) // n] for i in range(n)):
        room = -(-config.sample_bytes // n)
        for text, first, last in (fragment for span in task for fragment in read(span, config)):
            if inside and (first or room <= 0):  # the rest of the last document is in a task that is not in the sample
                number, inside = number + 1, False
            if room <= 0:
                break
            yield number, text
            room -= len(text)
            number, inside = number + last, not last

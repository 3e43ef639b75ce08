"""Encodes the tasks of a plan into pieces, in several processes.

A piece is two files: the tokens of a task, and an index with an entry for each document (or for each leaf of a document that
several workers share). The index is written last and makes the piece complete. Pieces do not depend on each other: in whatever
order they are made, and however often that is interrupted, the shards made from them are the same, byte for byte.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from papagaio.corpus.dataset import token_dtype
from papagaio.corpus.options import PrepareOptions, ReadingOptions
from papagaio.corpus.plan import Task
from papagaio.corpus.reading import leaves, read
from papagaio.corpus.rows import COMPRESSED
from papagaio.corpus.spans import Span
from papagaio.corpus.split import TextHash, text_hash
from papagaio.corpus.text import blocks_of, detect_encoding
from papagaio.corpus.workers import in_parallel
from papagaio.errors import MachineError, UserError, located
from papagaio.files import parse_json, printable, sync_and_close, write_whole
from papagaio.report import Report
from papagaio.tokenizer import Tokenizer, text_chunks
from papagaio.tokenizer_files import load_tokenizer

INDEX = np.dtype([("digest", "<u8"), ("bytes", "<u8"), ("tokens", "<u8"), ("last", "?")])

_tokenizers: dict[Path, Tokenizer] = {}  # by directory; a forked worker inherits that of its parent


def encode(work: Path, tasks: dict[int, Task], tokenizer: Tokenizer, config: PrepareOptions) -> None:
    """Make the pieces of these tasks (by number) that are not in the work directory yet."""
    missing = {number: task for number, task in tasks.items() if not piece_paths(work, number)[1].exists()}
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing):,} of {len(tasks):,} pieces are there already", file=sys.stderr)
    check_disk(work, list(missing.values()), tokenizer, config)
    _tokenizers[work] = tokenizer
    jobs = [(encode_task, work, number, task, config) for number, task in missing.items()]
    for _ in in_parallel(jobs, config.workers, [sum(span.size for span in task) for task in missing.values()]):
        pass


def encode_task(work: Path, number: int, task: Task, config: ReadingOptions) -> None:
    """Make one piece. Runs in a worker, which loads the tokenizer if it was not forked."""
    if work not in _tokenizers:
        _tokenizers[work] = load_tokenizer(work / "tokenizer")
    piece = PieceWriter(work, number, _tokenizers[work])
    for span in task:
        piece.add(span, config)
    piece.finish()


def check_disk(work: Path, tasks: list[Task], tokenizer: Tokenizer, config: PrepareOptions) -> None:
    """Raises MachineError if the disk has less room than the shards will take, estimated from the first text."""
    beginning = next((fragment.text[: 2**18] for task in tasks for span in task for fragment in read(span, config)), "")
    try:
        per_byte = len(tokenizer.encode_array(beginning)) / max(1, len(beginning.encode()))
    except UserError:  # a worker will find it and name its place
        return
    n_bytes = sum(span.size * (4 if span.path.lower().endswith(COMPRESSED) else 1) for task in tasks for span in task)
    # Pieces are deleted while they are copied to train shards; the val shards are written while all pieces exist.
    needed = n_bytes * per_byte * token_dtype(tokenizer).itemsize * (1.1 + config.val_fraction)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise MachineError(f"{work.parent}: about {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free")


def piece_paths(work: Path, number: int) -> tuple[Path, Path]:
    """The files of a piece: tokens, and index."""
    return work / "pieces" / f"{number:06d}.tokens", work / "pieces" / f"{number:06d}.npy"


def piece_report(work: Path, number: int) -> tuple[Report, int]:
    """What was left out of a piece, and how many characters of it are U+FFFD because they could not be decoded."""
    path = piece_paths(work, number)[1].with_suffix(".json")
    report = Report()
    if not path.exists():  # nothing to report
        return report, 0
    found = parse_json(path.read_text(encoding="utf-8"), path)
    report.counts, report.places = found["counts"], found["places"]
    return report, found["replaced"]


class PieceWriter:
    """Encodes spans into a piece, with a few megabytes in memory at a time."""

    def __init__(self, work: Path, number: int, tokenizer: Tokenizer) -> None:
        self.tokens_path, self.index_path = piece_paths(work, number)
        self.tokenizer, self.dtype = tokenizer, token_dtype(tokenizer)
        self.start = np.array([tokenizer.start], self.dtype).tobytes()
        self.index: list[tuple[int, int, int, bool]] = []
        self.file = self.tokens_path.with_suffix(".tmp").open("wb")
        self.report, self.replaced = Report(), 0

    def add(self, span: Span, config: ReadingOptions) -> None:
        """Encode the documents of a span. Raises UserError with the place of a text that cannot be read or encoded."""
        self.path, self.replacing = span.path, config.errors == "replace"
        found = leaves(span, config)
        for leaf in found:
            fragments = list(read(leaf, config))
            self._begin(fragments[0].first)
            self._encode("".join(fragment.text for fragment in fragments))
            self._end(text_hash(b"".join(blocks_of(leaf.path, leaf.start, leaf.stop))), fragments[-1].last)
        for text, first, last in [] if found else read(span, config, self.report if config.skip_bad else None):
            if first:
                self._begin()
            self._encode(text)
            if last:
                self._end()
        if config.encoding == "auto" and span.stop < 0 and span.kind != "parquet":
            encoding = detect_encoding(span.path)
            if encoding != "utf-8":
                self.report.note(f"read as {encoding}", printable(span.path))

    def _begin(self, first: bool = True) -> None:
        self.offset, self.blank, self.hash, self.n_bytes, self.rest = self.file.tell(), True, TextHash(), 0, ""
        if first:
            self.file.write(self.start)

    def _encode(self, text: str) -> None:
        """Encode all complete chunks of the text so far; the last chunk may grow with the text that follows."""
        data = text.encode()
        self.replaced += text.count("\ufffd") if self.replacing else 0
        self.hash.update(data)
        self.n_bytes += len(data)
        self.blank = self.blank and not text.strip()
        *complete, self.rest = text_chunks(self.rest + text) or [""]
        for chunk in complete:
            self._write(chunk)

    def _end(self, leaf_hash: int | None = None, last: bool = True) -> None:
        self._write(self.rest)
        if self.blank and leaf_hash is None:  # an empty document gets no tokens
            self.file.seek(self.offset)
            self.file.truncate()
        n_tokens = (self.file.tell() - self.offset) // self.dtype.itemsize
        self.index.append((self.hash.value() if leaf_hash is None else leaf_hash, self.n_bytes, n_tokens, last))

    def _write(self, text: str) -> None:
        with located(self.path):
            ids = self.tokenizer.encode_array(text)
        assert ids.size == 0 or int(ids.max()) < self.tokenizer.vocab_size, "a token id would wrap"
        self.file.write(ids.astype(self.dtype).tobytes())

    def finish(self) -> None:
        path = self.index_path.with_suffix(".json")
        path.unlink(missing_ok=True)
        if self.report.counts or self.replaced:
            found = {"counts": self.report.counts, "places": self.report.places, "replaced": self.replaced}
            write_whole(path, json.dumps(found))
        sync_and_close(self.file)
        Path(self.file.name).rename(self.tokens_path)
        with self.index_path.with_suffix(".tmp").open("wb") as file:
            np.save(file, np.array(self.index, INDEX), allow_pickle=False)
            sync_and_close(file)
        self.index_path.with_suffix(".tmp").rename(self.index_path)

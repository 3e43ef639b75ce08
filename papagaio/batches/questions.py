"""Files of questions and answers (JSON lines, JSON, CSV, Parquet): read, check, and split into training and held-out rows.

papagaio/batches/shapes.py has the shapes of the rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from papagaio.batches.choices import Choice, multiple_choice
from papagaio.batches.conversations import Conversation, Preference
from papagaio.batches.shapes import SHAPES, Dropped, Fields, Problem, conversation_or_preference
from papagaio.corpus.rows import Row, read_rows
from papagaio.corpus.split import held_out_below, text_hash
from papagaio.errors import UserError
from papagaio.report import Report

RowT = TypeVar("RowT", Conversation, Preference)


class Reader:
    """Reads files of questions. What is left out, and keys that are not read, are counted in `report`; rows that cannot be read
    in `bad`, of which `check` makes one error, unless `skip_bad`."""

    def __init__(
        self, encoding: str = "utf-8", skip_bad: bool = False, question_key: str | None = None, answer_key: str | None = None
    ) -> None:
        self.encoding, self.skip_bad = encoding, skip_bad
        self.keys = (question_key or "question").strip().lower(), (answer_key or "answer").strip().lower()
        self.named = bool(question_key or answer_key)
        self.report, self.bad = Report(), Report()

    def examples(self, path: str | Path) -> list[Conversation] | list[Preference]:
        """All rows of a file, which must be of one kind."""
        rows = [row for row in self._rows(path, self._example) if row is not None]
        for row in rows:
            if type(row) is not type(rows[0]):
                kinds = "rows with one answer and rows with chosen and rejected answers"
                raise UserError(f"{row.place}: {kinds} need files of their own")
        if not rows and not self.bad.counts:
            raise UserError(f"{path}: no questions and answers in this file")
        return rows

    def conversations(self, path: str | Path) -> list[Conversation]:
        """All conversations of a file. Raises UserError for preferences."""
        rows = self.examples(path)
        if rows and not isinstance(rows[0], Conversation):
            raise UserError(f"{rows[0].place}: a row with chosen and rejected answers; rows with one answer are needed here")
        return rows

    def choices(self, path: str | Path) -> list[Choice]:
        """All multiple-choice questions of a file."""
        rows = list(self._rows(path, self._choice))
        if not rows and not self.bad.counts:
            raise UserError(f"{path}: no questions with choices in this file")
        return rows

    def check(self) -> Report:
        """The report. Raises UserError that names all kinds of bad rows of the files so far, with their first places; with
        skip_bad they are in the report instead."""
        bad = self.bad
        if bad.counts and not self.skip_bad:
            parts = []
            for reason, count in bad.counts.items():
                first, *others = bad.places[reason]
                more = f" (and {count - 1:,} more: {', '.join(others)}{', ...' if count > 1 + len(others) else ''})" * (count > 1)
                parts.append(f"{first}: {reason}{more}")
            cure = "; --skip_bad leaves such rows out" if sum(bad.counts.values()) > 1 else ""
            raise UserError("; ".join(parts) + cure)
        for reason, count in bad.counts.items():
            for i, place in enumerate(bad.places[reason]):
                self.report.note(f"left out, {reason}", place, count - len(bad.places[reason]) + 1 if i == 0 else 1)
        self.bad = Report()
        return self.report

    def _rows(self, path: str | Path, make: Any) -> Iterator[Any]:
        for row in hub_rows(str(path)) if str(path).startswith("hf://") else read_rows(str(path), self.encoding):
            place, _, error, _ = row
            try:
                if error:
                    raise Problem(error)
                yield make(row)
            except Dropped as reason:
                self.report.note(f"left out, {reason}", place)
            except Problem as reason:
                self.bad.note(str(reason), place)

    def _example(self, row: Row) -> Conversation | Preference:
        if not isinstance(row.value, dict):
            raise Problem(f"not an object with keys: none of the known shapes of a row: {SHAPES}")
        fields = Fields(row.value, row.typed)
        example = conversation_or_preference(fields, row.place, self.keys, self.named)
        for key in fields.unread():
            self.report.note(f'not read, key "{key}"', row.place)
        return example

    def _choice(self, row: Row) -> Choice:
        if not isinstance(row.value, dict):
            raise Problem("question, choices and answer are needed")
        fields = Fields(row.value, row.typed)
        choice = multiple_choice(fields, row.place)
        for key in fields.unread():
            self.report.note(f'not read, key "{key}"', row.place)
        return choice


def hub_rows(name: str) -> Iterator[Row]:
    """The rows of a dataset of the Hugging Face hub, hf://NAME[:CONFIG][:SPLIT]."""
    from papagaio.corpus.tables import hub_dataset

    for number, value in enumerate(hub_dataset(name), 1):
        yield Row(f"{name}:row {number}", {key: each for key, each in value.items() if each is not None})


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file. Raises UserError naming the bad rows."""
    reader = Reader()
    rows = reader.conversations(path)
    reader.check()
    return rows


def read_examples(path: Path) -> list[Conversation] | list[Preference]:
    """All rows of a file, which must be of one kind. Raises UserError naming the bad rows."""
    reader = Reader()
    rows = reader.examples(path)
    reader.check()
    return rows


def read_choices(path: Path) -> list[Choice]:
    """All multiple-choice questions of a file. Raises UserError naming the bad rows."""
    reader = Reader()
    rows = reader.choices(path)
    reader.check()
    return rows


def select(rows: Iterable[RowT], report: Report, known: set[str], keep_duplicates: bool = False) -> list[RowT]:
    """The rows without empty answers, equal pairs and duplicates, which are noted in `report`. Adds the rows' keys to `known`."""
    kept = []
    for row in rows:
        if not all(answer.content.strip() for answer in row.answers):
            report.note("dropped, empty answer", row.place)
        elif isinstance(row, Preference) and row.chosen.content == row.rejected.content:
            report.note("dropped, chosen and rejected are the same", row.place)
        elif row.key in known and not keep_duplicates:
            report.note("dropped, a duplicate", row.place)
        else:
            known.add(row.key)
            kept.append(row)
    return kept


def hold_out(rows: Sequence[RowT], fraction: float) -> tuple[list[RowT], list[RowT]]:
    """Split into (training, held out) by a hash of each row: a row stays on its side when others are added, and equal rows stay
    together. With fraction > 0, at least one row is held out, unless that would leave none to train on."""
    hashes = [text_hash(row.key.encode()) for row in rows]
    limit = held_out_below(hashes, fraction)
    parts: tuple[list[RowT], list[RowT]] = ([], [])
    for row, digest in zip(rows, hashes, strict=True):
        parts[digest < limit].append(row)
    return parts

"""Files of questions and answers (JSON lines, JSON, CSV, Parquet): read, check, and split into training and held-out rows.

papagaio/batches/shapes.py has the shapes of the rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from papagaio.batches.choices import NEEDED, Choice, multiple_choice
from papagaio.batches.conversations import Conversation, Preference
from papagaio.batches.shapes import KNOWN, PAIRS, Dropped, Fields, Problem, conversation_or_preference, plain_name
from papagaio.corpus.folders import find_files
from papagaio.corpus.rows import Row, detect_format, read_rows
from papagaio.corpus.spans import BadInput
from papagaio.corpus.split import held_out_below, text_hash
from papagaio.corpus.tables import hub_dataset, hub_rows
from papagaio.errors import UserError
from papagaio.files import printable
from papagaio.report import Report

RowT = TypeVar("RowT", Conversation, Preference, Choice)


class Reader:
    """Reads files of questions. What is left out is counted in `report`, keys that are not read in `unread`, and rows that cannot
    be read in `bad`, of which `check` makes one error, unless `skip_bad`. `encoding` may be "auto"."""

    def __init__(
        self, encoding: str = "utf-8", skip_bad: bool = False, question_key: str | None = None, answer_key: str | None = None
    ) -> None:
        self.encoding, self.skip_bad = encoding, skip_bad
        self.named = ()  # pairs of keys of question and answer; one of them may have a usual name
        if question_key or answer_key:
            named = [(plain_name(question_key or q), plain_name(answer_key or a)) for q, a in PAIRS]
            self.named = tuple(dict.fromkeys(named))
        self.report, self.unread, self.bad = Report(), Report(), Report()

    def files(self, name: str) -> list[str]:
        """The files of questions that a name stands for: a file, the tables of a directory or pattern, or hf://NAME itself."""
        found = find_files([name], self.report, encoding=self.encoding)
        if found == [name]:
            return found
        tables = [file for file in found if self._is_table(file)]
        for file in (file for file in found if file not in set(tables)):
            self.report.note("passed over, no rows but text", printable(file))
        if not tables:
            raise UserError(f"{name}: no questions in .jsonl, .json, .csv or .parquet files ({'; '.join(self.report.lines())})")
        return tables

    def _is_table(self, file: str) -> bool:
        try:
            return detect_format(file, self.encoding) is not None
        except BadInput:  # `examples` counts it
            return True

    def examples(self, path: str | Path) -> list[Conversation] | list[Preference]:
        """All rows of a file, which must be of one kind. None if all are bad or left out, as `report` says."""
        make = partial(conversation_or_preference, named=self.named)
        rows = self._rows(path, make, "questions and answers", f"none of the {KNOWN}")
        for row in rows:
            if type(row) is not type(rows[0]):
                kinds = "rows with one answer and rows with chosen and rejected answers"
                raise UserError(f"{row.place}: {kinds} need files of their own")
        return rows

    def conversations(self, path: str | Path) -> list[Conversation]:
        """All conversations of a file. Raises UserError for preferences."""
        rows = self._some(path, self.examples(path))
        if rows and not isinstance(rows[0], Conversation):
            raise UserError(f"{rows[0].place}: a row with chosen and rejected answers; rows with one answer are needed here")
        return rows

    def choices(self, path: str | Path) -> list[Choice]:
        """All multiple-choice questions of a file."""
        return self._some(path, self._rows(path, multiple_choice, "questions with choices", NEEDED))

    def check(self) -> Report:
        """The report, with one line for all keys that the same rows have and that were not read. Raises UserError that names all
        kinds of bad rows of the files so far, with their first places; with skip_bad they are in the report instead."""
        bad = self.bad
        if bad.counts and not self.skip_bad:
            parts = []
            for reason, count in bad.counts.items():
                first, *others = bad.places[reason]
                more = f" (and {count - 1:,} more: {', '.join(others)}{', ...' if count > 1 + len(others) else ''})" * (count > 1)
                parts.append(f"{first}: {reason}{more}")
            cure = "; --skip_bad leaves such rows out" if sum(bad.counts.values()) > 1 else ""
            raise UserError("; ".join(parts) + cure)
        self.report.merge(bad, "left out, ")
        together: dict[tuple[int, tuple[str, ...]], list[str]] = {}
        for key, count in self.unread.counts.items():
            together.setdefault((count, tuple(self.unread.places[key])), []).append(f'"{key}"')
        for (count, places), keys in together.items():
            reason = f"not read, key{'s' * (len(keys) > 1)} {', '.join(keys)}"
            self.report.counts[reason], self.report.places[reason] = count, list(places)
        self.unread, self.bad = Report(), Report()
        return self.report

    def _rows(self, path: str | Path, make: Callable[[Fields, str], RowT], what: str, needed: str) -> list[RowT]:
        """What `make` makes of the rows of a file. Rows that are no objects are bad: `needed` says what would be right.

        Raises UserError if the file has no rows at all; its message calls them `what`.
        """
        found, empty = [], True
        try:
            for row in self._file(str(path)):
                empty = False
                try:
                    if row.error or not isinstance(row.value, dict):
                        raise Problem(row.error or f"not an object with keys: {needed}")
                    fields = Fields(row.value, row.typed)
                    found.append(make(fields, row.place))
                    for key in fields.unread():
                        self.unread.note(key, row.place)
                except Dropped as reason:
                    self.report.note(f"left out, {reason}", row.place)
                except Problem as reason:
                    self.bad.note(str(reason), row.place)
        except BadInput as error:  # of the file as a whole
            empty = False
            self.bad.note(str(error).removeprefix(f"{error.place}: "), error.place)
        if empty:
            raise UserError(f"{path}: no {what} in this file")
        return found

    def _file(self, name: str) -> Iterator[Row]:
        """The rows of a file or of a dataset of the hub, hf://NAME[:CONFIG][:SPLIT]."""
        if not name.startswith("hf://"):
            yield from read_rows(name, self.encoding)
            return
        for number, value in hub_rows(name, hub_dataset(name)):
            yield Row(f"{name}:row {number}", {key: each for key, each in value.items() if each is not None})

    def _some(self, path: str | Path, rows: list[RowT]) -> list[RowT]:
        """The rows of a file that must have some. Raises UserError if all of them are left out."""
        if not rows and (self.skip_bad or not self.bad.counts):
            reports = (self.bad, self.report)
            first = next((first for report in reports if (first := report.first(Path(path))) != str(path)), str(path))
            raise UserError(f"{first}; no questions are left in this file")
        return rows


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

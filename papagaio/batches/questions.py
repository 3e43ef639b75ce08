"""Files of questions and answers (JSON lines, JSON, CSV, Parquet): read, check, and split into training and held-out rows.

A row has one of these shapes, recognised by its keys. It may also have `weight`, `kind` and `language`.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"question": "...", "answer": "..."}      {"prompt": "...", "completion": "..."}
    {"instruction": "...", "input": "...", "output": "..."}
    {"prompt": "...", "chosen": "...", "rejected": "..."}           for preference tuning
    {"question": "...", "choices": ["...", "..."], "answer": 0}     for evaluate.py's multiple choice
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import Field, ValidationError, model_validator

from papagaio.batches.conversations import Conversation, Preference, Strict
from papagaio.corpus.split import held_out_below, text_hash
from papagaio.corpus.tables import open_parquet
from papagaio.corpus.text import blocks_of
from papagaio.errors import UserError
from papagaio.files import GIVE_TEXT, parse_json, refuse_pickle
from papagaio.report import Report

RowT = TypeVar("RowT", Conversation, Preference)
ModelT = TypeVar("ModelT", bound=Strict)
OPTIONAL = ("weight", "kind", "language")
SHAPES = "messages; question and answer; prompt and completion; instruction, input and output; prompt, chosen and rejected"


class Source(NamedTuple):
    """A file of --data, and how often an epoch has each of its rows."""

    path: Path
    weight: float


def parse_source(word: str) -> Source:
    """`qa.jsonl:2` -> Source(qa.jsonl, 2.0). Raises ValueError if the file is missing or the weight is not positive."""
    name, weight = word, 1.0
    if ":" in word and not Path(word).exists():
        with suppress(ValueError):  # not a number: the colon is part of the name
            weight = float(word.rpartition(":")[2])
            name = word.rpartition(":")[0]
    if not 0 < weight < math.inf:
        raise ValueError(f"{word}: the weight after the colon must be a positive number, such as 2 or 0.5")
    if not Path(name).is_file():
        raise ValueError(f"{name}: no such file; questions and answers in .jsonl, .json, .csv or .parquet are needed")
    return Source(Path(name), weight)


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file. Raises UserError naming file and line, also for a row of preference tuning."""
    rows = read_examples(path)
    if not isinstance(rows[0], Conversation):
        raise UserError(f"{rows[0].place}: a row with chosen and rejected answers; rows with one answer are needed here")
    return rows


def read_examples(path: Path) -> list[Conversation] | list[Preference]:
    """All rows of a file, which must be of one kind. Raises UserError naming file and line."""
    rows = [_example(value, place) for place, value in read_rows(path)]
    if not rows:
        raise UserError(f"{path}: no questions and answers in this file")
    for row in rows:
        if type(row) is not type(rows[0]):
            raise UserError(
                f"{row.place}: rows with one answer and rows with chosen and rejected answers need files of their own"
            )
    return rows


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of every row. The file name tells .json, .csv, .tsv and .parquet; all other files are JSON lines."""
    refuse_pickle(path, GIVE_TEXT)
    kind = path.name.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind == "parquet":
        yield from _parquet_rows(path)
        return
    try:
        data = b"".join(blocks_of(str(path), 0, -1))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a file of questions and answers is needed") from None
    data = data.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark is not part of the text
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line_start = data.rfind(b"\n", 0, error.start) + 1
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 at byte {error.start - line_start} of the line") from None
    if kind in ("csv", "tsv"):
        yield from _csv_rows(path, text, "\t" if kind == "tsv" else ",")
    elif kind == "json" and text.lstrip().startswith("["):
        yield from _json_array(path, text)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, parse_json(line, lambda place=place: place)


def _json_array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON array, each with the number of the line on which it begins."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    line, counted, end = 1, 0, text.index("[") + 1
    for value in parse_json(text, path):
        start = between.match(text, end).end()
        line, counted = line + text.count("\n", counted, start), start
        yield f"{path}:{line}", value
        _, end = decoder.raw_decode(text, start)


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table whose first line names the columns. Empty cells of the optional columns are left out."""
    csv.field_size_limit(2**24)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1  # on which the row begins that is read next
    try:
        columns = next(reader, [])
        line = reader.line_num + 1
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(columns):
                raise UserError(f"{place}: {len(columns)} columns are needed, as in the first line")
            value: dict[str, Any] = {key: cell for key, cell in zip(columns, cells, strict=True) if cell or key not in OPTIONAL}
            with suppress(KeyError, ValueError):  # what is not a number is refused as in other files
                value["weight"] = float(value["weight"])
            yield place, value
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow

    number = 0
    with open_parquet(str(path)) as file:
        try:
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024)), 1):
                yield f"{path}:row {number}", {key: value for key, value in row.items() if value is not None}
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged near row {number + 1}: {error}") from None


def _example(value: Any, place: str) -> Conversation | Preference:
    """A row as a conversation or a preference, by its keys."""
    match value:
        case {"prompt": question, "chosen": chosen, "rejected": rejected}:
            fields = {"messages": _messages("user", question), "chosen": _answer(chosen), "rejected": _answer(rejected)}
            return _checked(Preference, fields, place)
        case {"messages": messages}:
            fields = {"messages": messages}
        case {"question": question, "answer": answer} | {"prompt": question, "completion": answer}:
            fields = {"messages": [*_messages("user", question), *_messages("assistant", answer)]}
        case {"instruction": question, "output": answer}:
            more = value.get("input") or ""
            if not isinstance(more, str):
                raise UserError(f"{place}: input: Input should be a valid string")
            if isinstance(question, str) and more.strip():
                question = f"{question}\n\n{more}"
            fields = {"messages": [*_messages("user", question), *_messages("assistant", answer)]}
        case _:
            keys = f"the keys {', '.join(map(str, value))}" if isinstance(value, dict) and value else "not an object with keys"
            raise UserError(f"{place}: {keys}: none of the known shapes of a row: {SHAPES}")
    return _checked(Conversation, fields | {key: value[key] for key in OPTIONAL if key in value}, place)


def _messages(role: str, content: Any) -> Any:
    """A list with one message; `content` itself if it is already a list of messages, as in TRL's files."""
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _answer(content: Any) -> Any:
    """The assistant's message; its content may be a list with that one message."""
    return content[0] if isinstance(content, list) and len(content) == 1 else {"role": "assistant", "content": content}


def _checked(kind: type[ModelT], fields: dict[str, Any], place: str) -> ModelT:
    try:
        return kind(**fields, place=place)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None


class Choice(Strict):
    """A multiple-choice question. `answer` is the right choice's text, its number from 0, or its letter (A, B, ...)."""

    question: str = Field(min_length=1)
    choices: list[str] = Field(min_length=2)
    answer: int | str
    place: str = ""  # file:line

    @model_validator(mode="after")
    def _check(self) -> "Choice":
        if any(not choice.strip() for choice in self.choices):
            raise ValueError("an empty choice")
        self.right()
        return self

    def right(self) -> int:
        """The number of the right choice, from 0."""
        count = len(self.choices)
        numbers = {chr(ord("A") + i): i for i in range(count)} | {self.choices[i]: i for i in reversed(range(count))}
        number = self.answer if isinstance(self.answer, int) else numbers.get(self.answer, -1)
        if not 0 <= number < count:
            raise ValueError(f"answer {self.answer!r} is none of the {count} choices, nor the number or letter of one")
        return number


def read_choices(path: Path) -> list[Choice]:
    """All multiple-choice questions of a file. Raises UserError naming file and line."""
    rows, keys = [], ("question", "choices", "answer")
    for place, value in read_rows(path):
        if not isinstance(value, dict) or not value.keys() >= set(keys):
            raise UserError(f"{place}: question, choices and answer are needed")
        rows.append(_checked(Choice, {key: value[key] for key in keys}, place))
    if not rows:
        raise UserError(f"{path}: no questions with choices in this file")
    return rows


def select(rows: Iterable[RowT], report: Report, known: set[str], keep_duplicates: bool = False) -> list[RowT]:
    """The rows without empty answers and duplicates, which are noted in `report`. Adds the rows' keys to `known`."""
    kept = []
    for row in rows:
        if not all(answer.content.strip() for answer in row.answers):
            report.note("dropped, empty answer", row.place)
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

"""Files of questions and answers: JSON lines, JSON, CSV and Parquet, read, checked, and parted into training and held out.

A row is one of these, recognised by its keys; besides, it may have `weight`, `kind` and `language`:

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
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from papagaio.batches.conversations import Conversation, Preference
from papagaio.corpus.dataset import share
from papagaio.corpus.tables import open_parquet
from papagaio.corpus.text import blocks_of
from papagaio.errors import UserError
from papagaio.files import GIVE_TEXT, parse_json, refuse_pickle

Said = TypeVar("Said", Conversation, Preference)
Row = TypeVar("Row", bound=BaseModel)
SHAPES = "messages; question and answer; prompt and completion; instruction, input and output; prompt, chosen and rejected"


class Source(NamedTuple):
    """A file of --data, and how often an epoch has each of its conversations: `qa.jsonl:2` twice, `qa.jsonl:0.5` every other."""

    path: Path
    weight: float


def parse_source(word: str) -> Source:
    """`qa.jsonl:2` -> Source(qa.jsonl, 2.0). Raises ValueError for a weight that is none, or a file that is not there."""
    name, colon, number = word.rpartition(":")
    if not colon or Path(word).exists():
        name, number = word, "1"
    try:
        weight = float(number)
    except ValueError:
        name, weight = word, 1.0
    if not 0 < weight < math.inf:
        raise ValueError(f"{word}: the weight after the colon must be a positive number, such as 2 or 0.5")
    if not Path(name).is_file():
        raise ValueError(f"{name}: no such file; questions and answers in .jsonl, .json, .csv or .parquet are needed")
    return Source(Path(name), weight)


def read_conversations(path: Path) -> list[Conversation]:
    """Every conversation of a file. Raises UserError naming file and line; also for pairs of preference tuning."""
    rows = read_examples(path)
    for row in rows:
        if not isinstance(row, Conversation):
            raise UserError(f"{row.place}: chosen and rejected answers, where questions and answers are needed")
    return rows


def read_examples(path: Path) -> list[Conversation] | list[Preference]:
    """Every row of a file, all conversations or all preferences. Raises UserError naming file and line."""
    rows = [_example(value, place) for place, value in read_rows(path)]
    if not rows:
        raise UserError(f"{path}: no questions and answers in there")
    for row in rows:
        if type(row) is not type(rows[0]):
            raise UserError(f"{row.place}: chosen and rejected answers and plain ones in one file; they need two files, two runs")
    return rows


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of every row: of .json, .csv, .tsv and .parquet by the name, of any other file a line of JSON each."""
    refuse_pickle(path, GIVE_TEXT)
    kind = path.name.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind == "parquet":
        yield from _parquet_rows(path)
        return
    try:
        data = b"".join(blocks_of(str(path), 0, -1))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a file of questions and answers is needed") from None
    data = data.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is not text
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
    """The elements of a JSON array, each with the line that it begins in."""
    decoder, skip = json.JSONDecoder(), re.compile(r"\s*")
    position, line, counted, first = text.index("[") + 1, 1, 0, True
    while True:
        position = skip.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            rest = text[position + 1 :].strip()
            if rest:
                raise UserError(f"{path}:{line}: not JSON: {rest[:10]!r} after the end of the list")
            return
        if not first:
            if text[position : position + 1] != ",":
                raise UserError(f"{path}:{line}: not JSON: a comma or ] is needed")
            position = skip.match(text, position + 1).end()
            line, counted = line + text.count("\n", counted, position), position
        first = False
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise UserError(f"{path}:{line}: JSON nested too deep") from None
        except ValueError:
            raise UserError(f"{path}:{line}: a number with thousands of digits") from None
        yield f"{path}:{line}", value


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table whose first line names its columns. Empty cells of `weight`, `kind` and `language` are left out."""
    csv.field_size_limit(2**24)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        line = reader.line_num + 1 if reader.fieldnames else 1
        for row in reader:
            place = f"{path}:{line}"
            if None in row or None in row.values():
                raise UserError(f"{place}: {len(reader.fieldnames)} columns are needed, as the first line names")
            value = {key: cell for key, cell in row.items() if cell or key not in ("weight", "kind", "language")}
            if "weight" in value:
                try:
                    value["weight"] = float(value["weight"])
                except ValueError:
                    raise UserError(f"{place}: weight: {value['weight']!r} is not a number") from None
            yield place, value
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow

    number = 0
    with open_parquet(str(path)) as file:
        try:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", {key: value for key, value in row.items() if value is not None}
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged near row {number + 1}: {error}") from None


def _example(value: Any, place: str) -> Conversation | Preference:
    """Recognise a row's shape by its keys."""
    question: Any
    match value:
        case {"prompt": question, "chosen": chosen, "rejected": rejected}:
            fields = {"messages": _said("user", question), "chosen": _answer(chosen), "rejected": _answer(rejected)}
            return _checked(Preference, fields, place)
        case {"messages": messages}:
            fields = {"messages": messages}
        case {"question": question, "answer": answer} | {"prompt": question, "completion": answer}:
            fields = {"messages": [*_said("user", question), *_said("assistant", answer)]}
        case {"instruction": question, "output": answer}:
            more = value.get("input") or ""
            if not isinstance(more, str):
                raise UserError(f"{place}: input: Input should be a valid string")
            if isinstance(question, str) and more.strip():
                question = f"{question}\n\n{more}"
            fields = {"messages": [*_said("user", question), *_said("assistant", answer)]}
        case _:
            keys = f"the keys {', '.join(map(str, value))}" if isinstance(value, dict) and value else "not an object with keys"
            raise UserError(f"{place}: {keys}: none of the shapes with {SHAPES}")
    extras = {key: value[key] for key in ("weight", "kind", "language") if key in value}
    return _checked(Conversation, fields | extras, place)


def _said(role: str, content: Any) -> Any:
    """A message; where a list of messages stands already (as TRL writes them), that."""
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _answer(content: Any) -> Any:
    """An answer; also where it stands as a list of one message."""
    if isinstance(content, list) and len(content) == 1:
        return content[0]
    return {"role": "assistant", "content": content}


def _checked(kind: type[Row], fields: dict[str, Any], place: str) -> Row:
    try:
        return kind(**fields, place=place)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None


class Choice(BaseModel):
    """A question with several answers, and the number of the right one."""

    model_config = ConfigDict(frozen=True, strict=True)

    question: str = Field(min_length=1)
    choices: list[str] = Field(min_length=2)
    answer: int | str
    place: str = ""

    @model_validator(mode="after")
    def _is_among_them(self) -> "Choice":
        if any(not choice.strip() for choice in self.choices):
            raise ValueError("an empty choice")
        self.right()
        return self

    def right(self) -> int:
        """The number of the right choice, which the file tells as that number (from 0), its text, or its letter (A, B, ...)."""
        if isinstance(self.answer, int):
            number = self.answer
        elif self.answer in self.choices:
            number = self.choices.index(self.answer)
        else:
            number = ord(self.answer) - ord("A") if len(self.answer) == 1 else -1
        if not 0 <= number < len(self.choices):
            raise ValueError(
                f"answer {self.answer!r} is none of the {len(self.choices)} choices, nor their number from 0, nor letter"
            )
        return number


def read_choices(path: Path) -> list[Choice]:
    """Every {"question", "choices", "answer"} of a file. Raises UserError naming file and line."""
    rows = []
    for place, value in read_rows(path):
        if not isinstance(value, dict) or not {"question", "choices", "answer"} <= value.keys():
            raise UserError(f"{place}: question, choices and answer are needed")
        rows.append(_checked(Choice, {key: value[key] for key in ("question", "choices", "answer")}, place))
    if not rows:
        raise UserError(f"{path}: no questions with choices in there")
    return rows


class Report:
    """What was left out and why, with the places: `dropped, empty answer: 3 (qa.jsonl:4, qa.jsonl:9, qa.jsonl:12)`."""

    SHOWN = 5

    def __init__(self) -> None:
        self.places: dict[str, list[str]] = {}

    def drop(self, reason: str, place: str) -> None:
        self.places.setdefault(reason, []).append(place)

    def lines(self) -> list[str]:
        found = []
        for reason, places in self.places.items():
            shown = ", ".join(places[: self.SHOWN]) + (", ..." if len(places) > self.SHOWN else "")
            found.append(f"dropped, {reason}: {len(places):,} ({shown})")
        return found

    def first(self, path: Path) -> str:
        """The first place in a file that was left out, and why, for an error where nothing is left of it."""
        found = (f"{p}: {why}" for why, places in self.places.items() for p in places if p.startswith(f"{path}:"))
        return next(found, str(path))


def select(rows: Iterable[Said], report: Report, known: set[str], keep_duplicates: bool = False) -> list[Said]:
    """The rows that can be learnt from: without empty answers, and each conversation once. `known` takes in what was said."""
    kept = []
    for row in rows:
        if row.has_empty_answer:
            report.drop("empty answer", row.place)
        elif row.said in known and not keep_duplicates:
            report.drop("a duplicate", row.place)
        else:
            known.add(row.said)
            kept.append(row)
    return kept


def hold_out(rows: Sequence[Said], fraction: float) -> tuple[list[Said], list[Said]]:
    """(training, held out), by a hash of what is said: adding conversations moves none, and equal ones stay together.

    Of a few, one at least is held out, if that leaves any.
    """
    lowest = min((share(row.said) for row in rows), default=0.0)
    limit = max(fraction, math.nextafter(lowest, 1)) if fraction else 0.0
    held_out = [row for row in rows if share(row.said) < limit]
    training = [row for row in rows if share(row.said) >= limit]
    return (training, held_out) if training else (held_out, [])

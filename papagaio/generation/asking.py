"""Independent questions from a file, answered in batches: one JSON object per question, in the order of the file.

    {"question": "What is the currency of Brazil?"}
    -> {"question": "What is the currency of Brazil?", "answer": "Brazilian real.", "finish": "end", "place": "q.jsonl:1"}

A line of a text file is a question. A row of a table is a question, or a conversation whose next answer is wanted, in the shapes
that fine-tuning reads (papagaio/batches/shapes.py). A right answer in the row is not shown to the model, and is kept as
"reference". A question that cannot be answered gets {"error": ...} instead of an answer.
"""

import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from papagaio.batches.conversations import Message, check_turns
from papagaio.batches.shapes import Fields, messages_of, opening_messages, text_of, with_context
from papagaio.corpus.rows import Row, detect_format, read_rows, read_whole
from papagaio.errors import UserError
from papagaio.files import parse_json
from papagaio.generation.chat import prompt_ids
from papagaio.generation.engine import Engine, Request, in_order
from papagaio.generation.options import SamplingOptions
from papagaio.report import Report
from papagaio.terminal import print_json

NOT_ANSWERED = "not answered"
RESULTS = ("answer", "finish", "error", "place")  # keys of what is written, beside those of the row
Write = Callable[[dict[str, Any]], None]
ASKED = ("question", "prompt", "instruction", "input")  # keys of a question; the first that a row has counts


class Question(NamedTuple):
    """A question as it is read: its place (file:line), what is written before its answer, its messages, or why it has none."""

    place: str
    echo: dict[str, Any]
    messages: list[Message]
    error: str = ""


def read_questions(path: Path, system: str = "", encoding: str = "utf-8") -> list[Question]:
    """The questions of a file, or of standard input (`-`). `system` is the system message of those without one of their own.

    Raises UserError if the file cannot be read, or has no questions.
    """
    if str(path) == "-":
        with tempfile.NamedTemporaryFile() as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.flush()
            here = [row._replace(place=row.place.replace(file.name, "standard input")) for row in _rows(file.name, encoding)]
            found = [_question(row, system) for row in here]
    else:
        found = [_question(row, system) for row in _rows(str(path), encoding)]
    if not found:
        raise UserError(f"{path}: no questions in this file")
    return found


def _rows(path: str, encoding: str) -> Iterator[Row]:
    """The rows of a table, or the lines of a text file as questions."""
    # Bytes that are not text become halves of surrogate pairs, which `Message` refuses: they spoil one question, not the file.
    errors = "surrogateescape"
    if format := detect_format(path, encoding):
        yield from read_rows(path, encoding, format, errors)
        return
    for number, line in enumerate(read_whole(path, encoding, errors).split("\n"), 1):
        if line.strip():
            place, broken = f"{path}:{number}", any("\udc80" <= character <= "\udcff" for character in line)
            yield Row(place, None, f"not {encoding}") if broken else Row(place, {"question": line.rstrip("\r")})


def _question(row: Row, system: str) -> Question:
    """A row as a question."""
    if row.error or not isinstance(row.value, dict):
        return Question(row.place, {}, [], row.error or "not an object with keys")
    echo = {key: content for key, content in row.value.items() if key not in RESULTS}
    if "answer" in row.value:
        echo["reference"] = row.value["answer"]
    fields = Fields(row.value, row.typed)
    try:
        opening = opening_messages(fields)
        if "messages" in fields or "conversations" in fields:
            found = opening + messages_of(fields, fields.take("messages", "conversations"), "messages")
        else:
            name = next((key for key in ASKED if key in fields), None)
            if name is None:
                keys = ", ".join(map(str, row.value)) or "none"
                raise ValueError(f"the keys are {keys}; a question, prompt, instruction or messages are needed")
            text = with_context(fields, text_of(fields.take(name)), (name,))
            found = [*opening, {"role": "user", "content": text}]
        turns = [Message(**message) for message in found]
        if turns and turns[-1].role == "assistant":
            echo["reference"] = turns.pop().content
        if system and turns and turns[0].role != "system":
            turns = [Message(role="system", content=system), *turns]
        check_turns(turns or [Message(role="assistant", content="")], "user")
    except ValidationError as error:
        return Question(row.place, echo, [], error.errors()[0]["msg"].removeprefix("Value error, "))
    except ValueError as error:
        return Question(row.place, echo, [], str(error))
    return Question(row.place, echo, turns)


def answer_all(
    engine: Engine,
    questions: Sequence[Question],
    sampling: SamplingOptions,
    batch_size: int,
    write: Write,
    report: Report,
) -> None:
    """Answer the questions in batches, and `write` each result as soon as it and those before it are there.

    Each question has the same seed, so that its answer is the one that it gets alone. What was not answered, or only
    without the beginning of its conversation, is noted in `report`.
    """
    waiting = deque[tuple[Question, str]]()  # asked or refused (with the reason), and not yet written

    def requests() -> Iterator[Request]:
        for question in questions:
            error = question.error
            try:
                if not error:
                    ids, hidden = prompt_ids(engine, question.messages, sampling.max_new_tokens)
            except UserError as problem:
                error = str(problem)
            waiting.append((question, error))
            if not error:
                if hidden or len(ids) > engine.block_size:
                    report.note("answered without the beginning, which does not fit into the context", question.place)
                yield Request(ids, sampling.seed)

    def write_refused() -> None:
        while waiting and waiting[0][1]:
            question, error = waiting.popleft()
            report.note(NOT_ANSWERED, question.place)
            write(question.echo | {"error": error, "place": question.place})

    text = ""
    for step in in_order(engine.complete(requests(), sampling, batch_size=batch_size)):
        text += step.text
        if step.finish:
            write_refused()
            question, _ = waiting.popleft()
            if step.truncated:
                report.note("answered, but the context was full: what came first was forgotten", question.place)
            write(question.echo | {"answer": text, "finish": step.finish, "place": question.place})
            text = ""
    write_refused()


@contextmanager
def open_answers(path: Path, questions: Sequence[Question], report: Report) -> Iterator[tuple[Write, Sequence[Question]]]:
    """A function that appends an answer to a file, and the questions that have no answer in it yet.

    A last line that is cut short is removed. Questions whose line holds an error are noted in `report`. Raises UserError if the
    file holds anything but answers to these questions, in their order.
    """
    cure = "name another file, or delete this one"
    done, kept = 0, 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        place = f"{path}:{number}"
        if not line.endswith(b"\n"):
            print(f"{place}: cut short; the question is asked again", file=sys.stderr)
            break
        row = parse_json(line.decode("utf-8", "replace"), lambda place=place: place)
        if number > len(questions):
            raise UserError(f"{place}: an answer more than there are questions ({len(questions):,}); {cure}")
        asked = questions[number - 1]
        answers = isinstance(row, dict) and bool({"answer", "error"} & row.keys())
        if not answers or any(row.get(key) != value for key, value in asked.echo.items()):
            raise UserError(f"{place}: not the answer to {asked.place}; {cure}")
        if "error" in row:
            report.note(NOT_ANSWERED, asked.place)
        done, kept = number, kept + len(line)
    with path.open("a", encoding="utf-8") as file:
        file.truncate(kept)
        yield partial(print_json, file=file), questions[done:]

"""Measure one model or several side by side: bits per byte of any text, answers to questions, multiple choice.

    python evaluate.py --checkpoint out/run --text my_texts/ out/mine
    python evaluate.py --checkpoint out/run out/chat --questions qa_test.jsonl --shots_data qa_train.jsonl --json result.json
    python evaluate.py --checkpoint out/chat --choices quiz.jsonl --show 5

A chat model is asked as in a chat. A base model is shown --shots questions with their answers, one per line, and the question;
its answer is the next line. Standard output carries a table with one column per checkpoint.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from papagaio.errors import MachineError, UserError, run
from papagaio.options import Options, option, parse


class EvaluateOptions(Options):
    """Options of evaluate.py."""

    checkpoint: tuple[Path, ...] = option(..., "runs or checkpoint directories, one column each", group="Model", min_length=1)
    base: Path | None = option(None, "the checkpoint that adapters (LoRA) were trained for, if it has moved since", group="Model")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="Model", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of matrix products, as in train.py", group="Model")
    batch_size: int = option(64, "questions, or windows of text, of one forward pass", group="Model", ge=1)
    text: tuple[str, ...] = option((), "bits per byte of texts (see data/prepare.py), or of a validation split", group="Measures")
    questions: tuple[Path, ...] = option((), "questions with answers, in the formats of finetune.py's --data", group="Measures")
    choices: tuple[Path, ...] = option((), 'multiple choice: {"question", "choices", "answer"}', group="Measures")
    shots_data: Path | None = option(None, "questions with answers to show a base model before each question", group="Measures")
    encoding: str = option("utf-8", "encoding of the files of questions; auto: found for each file", group="Measures")
    skip_bad: bool = option(False, "leave out questions that cannot be read, instead of stopping", group="Measures")
    shots: int = option(4, "how many of --shots_data to show; fewer if they do not fit the context", group="Measures", ge=0)
    show: int = option(0, "answers to print side by side", group="Output", ge=0)
    json_: Path | None = option(None, "write the results to this file as well", group="Output")

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if not (self.text or self.questions or self.choices):
            raise ValueError("nothing to measure: give --text, --questions or --choices")
        for path in (*self.questions, *self.choices, self.shots_data):
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: no such file")
        if self.json_ is not None and not self.json_.parent.is_dir():
            raise ValueError(f"{self.json_}: its directory does not exist")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(EvaluateOptions, doc=__doc__)

import torch

from model import GPT, GPTConfig
from papagaio import kernels, runtime
from papagaio.batches.choices import Choice
from papagaio.batches.conversations import Conversation
from papagaio.batches.questions import Reader
from papagaio.batches.windows import Batch, ValidationWindows
from papagaio.corpus.dataset import Dataset
from papagaio.corpus.options import ReadingOptions
from papagaio.corpus.reading import list_spans, read
from papagaio.corpus.spans import Span
from papagaio.evaluation import (
    Answer,
    answer_nats,
    answer_perplexity,
    answer_questions,
    choose,
    choose_shots,
    dataset_texts,
    evaluate_loss,
    question_ids,
    text_batches,
)
from papagaio.files import to_json, write_whole
from papagaio.generation.engine import Engine
from papagaio.report import Report
from papagaio.runs.checkpoint import model_maker
from papagaio.runs.directory import open_checkpoint

Column = dict[str, dict[str, Any]]  # one checkpoint's figures: {what is measured: {measure: value}}

READING = ReadingOptions()  # texts are read as data/prepare.py reads them by default


def main(config: EvaluateOptions) -> None:
    checkpoints = [open_checkpoint(path, config.base) for path in config.checkpoint]
    reader = Reader(config.encoding, config.skip_bad)
    questions = {path: reader.conversations(path) for path in config.questions}
    choices = {path: reader.choices(path) for path in config.choices}
    pool = reader.conversations(config.shots_data) if config.shots_data else []
    for line in reader.check().lines():
        print(line, file=sys.stderr)
    texts = {name: open_text(name) for name in config.text}
    device = runtime.pick_device(config.device)
    columns: list[Column] = []
    answers: dict[tuple[Path, int], list[Answer]] = {}  # by file of questions and number of the checkpoint
    errors: dict[str, UserError | MachineError] = {}  # the last one of each measure
    for number, (path, checkpoint) in enumerate(zip(config.checkpoint, checkpoints, strict=True)):
        model = kernels.accelerate(checkpoint.build(model_maker(GPT, GPTConfig), device, torch.float32))
        engine = Engine(model, checkpoint.tokenizer, runtime.pick_dtype(config.dtype, device), checkpoint.is_chat)
        measures: dict[str, Callable[[Report], dict[str, Any]]] = {}
        for name, source in texts.items():
            measures[f"text {name}"] = partial(measure_text, engine, source, config.batch_size)
        for file, rows in questions.items():
            found = answers[file, number] = []
            measures[f"questions {file}"] = partial(measure_questions, engine, rows, pool, config, found)
        for file, rows in choices.items():
            measures[f"choices {file}"] = partial(measure_choices, engine, rows, pool[: config.shots])
        columns.append({})
        for what, measure in measures.items():
            print(f"{path}: measuring {what}", file=sys.stderr)
            report = Report()
            try:
                columns[-1][what] = measure(report)
            except (UserError, MachineError) as error:  # other checkpoints may still be measured
                errors[what] = error
                print(f"{path}: {what} is not measured: {error}", file=sys.stderr)
            for line in report.lines():
                print(f"{path}: {line}", file=sys.stderr)
    for what, error in errors.items():
        if not any(what in column for column in columns):
            raise error
    print(table([str(path) for path in config.checkpoint], columns))
    for file, rows in questions.items():
        for i, conversation in enumerate(rows[: config.show]):
            print(f"\n{conversation.messages[-2].content} (right: {conversation.answer})")
            for number, path in enumerate(config.checkpoint):
                print(f"  {path}: {answers[file, number][i].shown if answers[file, number] else '-'}")
    if config.json_ is not None:
        results = [{"checkpoint": str(p), "results": c} for p, c in zip(config.checkpoint, columns, strict=True)]
        write_whole(config.json_, to_json(results))


def measure_text(engine: Engine, source: Dataset | list[Span], batch_size: int, report: Report) -> dict[str, float]:
    """Bits per byte, and nats per token, which only checkpoints with the same tokenizer have in common.

    A dataset of another tokenizer is turned back into text, and encoded with the checkpoint's own.
    """
    if isinstance(source, Dataset) and source.tokenizer.sha256 == engine.tokenizer.sha256:
        batches: Iterable[Batch] = ValidationWindows(source, engine.block_size, batch_size)
    else:
        if isinstance(source, Dataset):
            fragments = dataset_texts(source)
        else:
            fragments = ((fragment.text, fragment.first) for span in source for fragment in read(span, READING))
        batches = text_batches(fragments, engine.tokenizer, engine.block_size, batch_size)
    measured = evaluate_loss(engine.model, batches, engine.tokenizer, engine.dtype)
    return {"bits per byte": measured["val_bpb"], "nats per token": measured["val_loss"]}


def measure_questions(
    engine: Engine,
    rows: list[Conversation],
    pool: list[Conversation],
    config: EvaluateOptions,
    answers: list[Answer],
    report: Report,
) -> dict[str, Any]:
    """The measures of a file of questions, also by language and kind if there are several. The answers are added to `answers`."""
    shots = None if engine.is_chat else [choose_shots(pool, row, config.shots) for row in rows]
    answers += answer_questions(engine, rows, report, 2 * config.batch_size, shots)
    asked = zip(rows, shots or [None] * len(rows), strict=True)
    ids = [question_ids(engine.tokenizer, *question, engine.block_size, 0) for question in asked]
    perplexity = answer_perplexity(answer_nats(engine, ids, config.batch_size), ids)
    measures = scores(answers) | {"perplexity of the answers": perplexity}
    for group in ("language", "kind"):
        names = sorted({getattr(row, group) for row in rows})
        for name in names if len(names) > 1 else []:
            part = scores([answer for answer in answers if getattr(answer.conversation, group) == name])
            measures |= {f"{key}, {group} {name} ({part['questions']:,})": part[key] for key in ("exact match", "F1")}
    return measures


def measure_choices(engine: Engine, rows: list[Choice], shots: list[Conversation], report: Report) -> dict[str, Any]:
    """Accuracy in multiple choice, over all questions; those that do not fit into the context count as wrong."""
    picked = choose(engine, rows, None if engine.is_chat else shots, report)
    right = [index == row.right() for index, row in zip(picked, rows, strict=True)]
    chance = sum(1 / len(row.choices) for row in rows) / len(rows)
    return {
        "questions": len(rows),
        "accuracy": sum(right) / len(rows),
        "by chance": chance,
        "do not fit": picked.count(-1),
    }


def scores(answers: list[Answer]) -> dict[str, Any]:
    """Means over the answers."""
    measures = {
        "exact match": "correct",
        "exact match, normalized": "normalized",
        "F1": "f1",
        "F1 of 0.6 or more": "close",
        "ended by itself": "ended",
        "cut": "cut",
    }
    means = {name: sum(getattr(answer, key) for answer in answers) / len(answers) for name, key in measures.items()}
    return {"questions": len(answers)} | means | {"do not fit": sum(not answer.fits for answer in answers)}


def open_text(name: str) -> Dataset | list[Span]:
    """A dataset, or the spans of files."""
    if Path(name, "manifest.json").is_file():
        return Dataset(Path(name))
    report = Report()
    spans = list_spans((name,), READING, report)
    for line in report.lines():
        print(line, file=sys.stderr)
    return spans


def table(names: list[str], columns: list[Column]) -> str:
    """One block per thing measured, one row per measure, one column per checkpoint; "-" for what could not be measured."""
    rows: list[list[str]] = [["", *names]]
    for what in dict.fromkeys(what for column in columns for what in column):
        rows.append([what, *[""] * len(names)])
        parts = [column.get(what, {}) for column in columns]
        for measure in dict.fromkeys(measure for part in parts for measure in part):
            values = [part.get(measure) for part in parts]
            cells = ["-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in values]
            rows.append([f"  {measure}", *cells])
    first, *others = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    line = "  ".join([f"{{:<{first}}}", *[f"{{:>{width}}}" for width in others]])
    return "\n".join(line.format(*row).rstrip() for row in rows)


if __name__ == "__main__":
    run(main, OPTIONS)

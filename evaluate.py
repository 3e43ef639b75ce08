"""Measure a model, or several side by side: bits per byte of any text, answers to questions, multiple choice.

    python evaluate.py --checkpoint out/run --text my_texts/ out/mine
    python evaluate.py --checkpoint out/run out/chat --questions qa_test.jsonl --shots_data qa_train.jsonl --json result.json
    python evaluate.py --checkpoint out/chat --choices quiz.jsonl --show 5

A chat model is asked as in a chat. A base model is shown --shots questions with their answers, a line each, and the question;
its answer is the next line. Standard output carries the table, a column a checkpoint.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from papagaio.errors import UserError, run
from papagaio.options import Options, option, parse


class EvaluateOptions(Options):
    """Options of evaluate.py."""

    checkpoint: tuple[Path, ...] = option(..., "runs or checkpoint directories, a column of the table each", min_length=1)
    base: Path | None = option(None, "the checkpoint that adapters (LoRA) belong to, where it has moved since")
    text: tuple[str, ...] = option(
        (), "bits per byte of these: texts as data/prepare.py reads them, or a dataset's held-out split"
    )
    questions: tuple[Path, ...] = option((), "questions with answers, in the shapes that finetune.py learns from")
    choices: tuple[Path, ...] = option((), 'multiple choice: {"question", "choices", "answer"}')
    shots_data: Path | None = option(None, "questions with answers that a base model is shown before each question")
    shots: int = option(4, "how many of --shots_data; fewer where they do not fit into the context", ge=0)
    show: int = option(0, "answers shown side by side", ge=0)
    json_: Path | None = option(None, "write the results to this file as well")
    batch_size: int = option(64, "questions, or windows of text, of one forward pass", ge=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of matrix products, as in train.py")

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
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
from papagaio import runtime
from papagaio.batches.conversations import Conversation
from papagaio.batches.questions import read_choices, read_conversations
from papagaio.batches.windows import ValidationWindows
from papagaio.corpus.dataset import Dataset
from papagaio.corpus.reading import ReadingOptions, Span, list_spans, read
from papagaio.evaluation import (
    Answer,
    answer_nats,
    answer_perplexity,
    answer_questions,
    choose,
    choose_shots,
    evaluate_loss,
    question_ids,
    text_batches,
)
from papagaio.files import to_json, write_whole
from papagaio.runs.checkpoint import Checkpoint, open_checkpoint

READING = ReadingOptions()  # texts are read as data/prepare.py does by default


def main(config: EvaluateOptions) -> None:
    checkpoints = [open_checkpoint(path, config.base) for path in config.checkpoint]
    questions = {path: read_conversations(path) for path in config.questions}
    choices = {path: read_choices(path) for path in config.choices}
    pool = read_conversations(config.shots_data) if config.shots_data else []
    texts = {name: open_text(name, checkpoints) for name in config.text}
    device = runtime.pick_device(config.device)
    columns: list[dict[str, Any]] = []
    said: list[dict[Path, list[Answer]]] = []
    for path, checkpoint in zip(config.checkpoint, checkpoints, strict=True):
        print(f"{path}: measuring", file=sys.stderr)
        model = checkpoint.build(lambda fields: GPT(GPTConfig(**fields)), device, torch.float32)
        column, answers = measure(model, checkpoint, texts, questions, choices, pool, config)
        columns.append(column)
        said.append(answers)
    print(table([str(path) for path in config.checkpoint], columns))
    for path, rows in questions.items():
        for i, conversation in enumerate(rows[: config.show]):
            print(f"\n{conversation.messages[-2].content} (right: {conversation.answer})")
            for name, answers in zip(config.checkpoint, said, strict=True):
                print(f"  {name}: {answers[path][i].text}")
    if config.json_ is not None:
        results = [{"checkpoint": str(p), "results": c} for p, c in zip(config.checkpoint, columns, strict=True)]
        write_whole(config.json_, to_json(results))


def measure(
    model: GPT,
    checkpoint: Checkpoint,
    texts: dict[str, Dataset | list[Span]],
    questions: dict[Path, list[Conversation]],
    choices: dict[Path, Any],
    pool: list[Conversation],
    config: EvaluateOptions,
) -> tuple[dict[str, dict[str, Any]], dict[Path, list[Answer]]]:
    """({what was measured: {measure: number}}, {file: answers}) of one model."""
    tokenizer, block_size = checkpoint.tokenizer, checkpoint.model_fields["block_size"]
    dtype = runtime.pick_dtype(config.dtype, next(model.parameters()).device)
    base = checkpoint.state.get("stage") == "pretrain"
    found: dict[str, dict[str, Any]] = {}
    said: dict[Path, list[Answer]] = {}
    for name, source in texts.items():
        if isinstance(source, Dataset):
            batches = ValidationWindows(source, block_size, config.batch_size)
        else:
            fragments = ((fragment.text, fragment.first) for span in source for fragment in read(span, READING))
            batches = text_batches(fragments, tokenizer, block_size, config.batch_size)
        measured = evaluate_loss(model, batches, tokenizer, dtype)
        found[f"text {name}"] = {"bits per byte": measured["val_bpb"], "nats per token": measured["val_loss"]}
    for path, rows in questions.items():
        shots = [choose_shots(pool, row, config.shots) for row in rows] if base else None
        answers = said[path] = answer_questions(model, tokenizer, rows, block_size, dtype, 2 * config.batch_size, shots)
        ids = [question_ids(tokenizer, row, shots[i] if base else None, block_size, 0) for i, row in enumerate(rows)]
        nats = answer_nats(model, ids, block_size, dtype, config.batch_size)
        measured = scores(answers) | {"perplexity of the answers": answer_perplexity(nats, ids)}
        for group in ("language", "kind"):
            names = sorted({getattr(row, group) for row in rows})
            for each in names if len(names) > 1 else []:
                part = scores([answer for answer in answers if getattr(answer.conversation, group) == each])
                measured |= {f"{key}, {group} {each} ({part['questions']:,})": part[key] for key in ("exact match", "F1")}
        found[f"questions {path}"] = measured
    for path, rows in choices.items():
        picked = choose(model, tokenizer, rows, block_size, dtype, pool[: config.shots] if base else None)
        right = [number == row.right() for number, row in zip(picked, rows, strict=True)]
        chance = sum(1 / len(row.choices) for row in rows) / len(rows)
        found[f"choices {path}"] = {"questions": len(rows), "accuracy": sum(right) / len(rows), "by chance": chance}
    return found, said


def scores(answers: list[Answer]) -> dict[str, Any]:
    """Means over the answers: letter for letter; but for case, punctuation and articles; overlap of words; ended by itself."""

    def mean(values: Iterator[float]) -> float:
        return sum(values) / len(answers)

    return {
        "questions": len(answers),
        "exact match": mean(answer.correct for answer in answers),
        "exact match, normalized": mean(answer.normalized for answer in answers),
        "F1": mean(answer.f1 for answer in answers),
        "ended by itself": mean(answer.ended for answer in answers),
    }


def open_text(name: str, checkpoints: list[Checkpoint]) -> Dataset | list[Span]:
    """A dataset, or the parts of files. Raises UserError for a dataset that is not of the checkpoints' tokenizer."""
    if Path(name, "manifest.json").is_file():
        dataset = Dataset(Path(name))
        for checkpoint in checkpoints:
            if checkpoint.tokenizer.sha256 != dataset.tokenizer.sha256:
                raise UserError(f"{name}: its tokenizer is not that of {checkpoint.path}; give the text itself to --text")
        return dataset
    return list_spans((name,), READING)


def table(names: list[str], columns: list[dict[str, dict[str, Any]]]) -> str:
    """A block a measurement, a row a measure, a column a checkpoint."""
    shown: list[tuple[str, list[str]]] = []
    for what, measures in columns[0].items():
        shown.append((what, []))
        for measure in measures:
            values = [column[what][measure] for column in columns]
            shown.append((f"  {measure}", [f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in values]))
    first = max(len(label) for label, _ in shown)
    widths = [max(len(name), *(len(values[i]) for _, values in shown if values)) for i, name in enumerate(names)]
    lines = [" " * first + "".join(f"  {name:>{width}}" for name, width in zip(names, widths, strict=True))]
    for label, values in shown:
        cells = "".join(f"  {value:>{width}}" for value, width in zip(values, widths, strict=True)) if values else ""
        lines.append(f"{label:<{first}}{cells}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, OPTIONS)

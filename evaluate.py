"""Measure one model or several side by side: bits per byte of any text, answers to questions, multiple choice.

    python evaluate.py --checkpoint out/run --text my_texts/ out/mine
    python evaluate.py --checkpoint out/run out/chat --questions qa_test.jsonl --shots_data qa_train.jsonl --json result.json
    python evaluate.py --checkpoint out/chat --choices quiz.jsonl --show 5

A chat model is asked as in a chat. A base model is shown --shots questions with their answers, one per line, and the question;
its answer is the next line. Standard output carries a table with one column per checkpoint.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from papagaio.errors import UserError, run
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
from papagaio.batches.conversations import Conversation
from papagaio.batches.questions import read_choices, read_conversations
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
    evaluate_loss,
    question_ids,
    text_batches,
)
from papagaio.files import to_json, write_whole
from papagaio.generation.engine import Engine
from papagaio.runs.checkpoint import Checkpoint, model_maker
from papagaio.runs.directory import open_checkpoint

READING = ReadingOptions()  # texts are read as data/prepare.py reads them by default


def main(config: EvaluateOptions) -> None:
    checkpoints = [open_checkpoint(path, config.base) for path in config.checkpoint]
    questions = {path: read_conversations(path) for path in config.questions}
    choices = {path: read_choices(path) for path in config.choices}
    pool = read_conversations(config.shots_data) if config.shots_data else []
    texts = {name: open_text(name, checkpoints) for name in config.text}
    device = runtime.pick_device(config.device)
    columns: list[dict[str, dict[str, Any]]] = []
    answers: dict[tuple[Path, int], list[Answer]] = {}  # by file of questions and number of the checkpoint
    for number, (path, checkpoint) in enumerate(zip(config.checkpoint, checkpoints, strict=True)):
        print(f"{path}: measuring", file=sys.stderr)
        model = kernels.accelerate(checkpoint.build(model_maker(GPT, GPTConfig), device, torch.float32))
        engine = Engine(model, checkpoint.tokenizer, runtime.pick_dtype(config.dtype, device), checkpoint.is_chat)
        column = {f"text {name}": measure_text(engine, source, config.batch_size) for name, source in texts.items()}
        for file, rows in questions.items():
            column[f"questions {file}"], answers[file, number] = measure_questions(engine, rows, pool, config)
        for file, rows in choices.items():
            picked = choose(engine, rows, None if engine.is_chat else pool[: config.shots])
            right = [index == row.right() for index, row in zip(picked, rows, strict=True)]
            chance = sum(1 / len(row.choices) for row in rows) / len(rows)
            column[f"choices {file}"] = {"questions": len(rows), "accuracy": sum(right) / len(rows), "by chance": chance}
        columns.append(column)
    print(table([str(path) for path in config.checkpoint], columns))
    for file, rows in questions.items():
        for i, conversation in enumerate(rows[: config.show]):
            print(f"\n{conversation.messages[-2].content} (right: {conversation.answer})")
            for number, path in enumerate(config.checkpoint):
                print(f"  {path}: {answers[file, number][i].text}")
    if config.json_ is not None:
        results = [{"checkpoint": str(p), "results": c} for p, c in zip(config.checkpoint, columns, strict=True)]
        write_whole(config.json_, to_json(results))


def measure_text(engine: Engine, source: Dataset | list[Span], batch_size: int) -> dict[str, float]:
    if isinstance(source, Dataset):
        batches: Iterable[Batch] = ValidationWindows(source, engine.block_size, batch_size)
    else:
        fragments = ((fragment.text, fragment.first) for span in source for fragment in read(span, READING))
        batches = text_batches(fragments, engine.tokenizer, engine.block_size, batch_size)
    measured = evaluate_loss(engine.model, batches, engine.tokenizer, engine.dtype)
    return {"bits per byte": measured["val_bpb"], "nats per token": measured["val_loss"]}


def measure_questions(
    engine: Engine, rows: list[Conversation], pool: list[Conversation], config: EvaluateOptions
) -> tuple[dict[str, Any], list[Answer]]:
    """The measures of a file of questions, also by language and kind if there are several, and the answers."""
    shots = None if engine.is_chat else [choose_shots(pool, row, config.shots) for row in rows]
    answers = answer_questions(engine, rows, 2 * config.batch_size, shots)
    asked = zip(rows, shots or [None] * len(rows), strict=True)
    ids = [question_ids(engine.tokenizer, *question, engine.block_size, 0) for question in asked]
    perplexity = answer_perplexity(answer_nats(engine, ids, config.batch_size), ids)
    measures = scores(answers) | {"perplexity of the answers": perplexity}
    for group in ("language", "kind"):
        names = sorted({getattr(row, group) for row in rows})
        for name in names if len(names) > 1 else []:
            part = scores([answer for answer in answers if getattr(answer.conversation, group) == name])
            measures |= {f"{key}, {group} {name} ({part['questions']:,})": part[key] for key in ("exact match", "F1")}
    return measures, answers


def scores(answers: list[Answer]) -> dict[str, Any]:
    """Means over the answers."""
    measures = {"exact match": "correct", "exact match, normalized": "normalized", "F1": "f1", "ended by itself": "ended"}
    means = {name: sum(getattr(answer, key) for answer in answers) / len(answers) for name, key in measures.items()}
    return {"questions": len(answers)} | means


def open_text(name: str, checkpoints: list[Checkpoint]) -> Dataset | list[Span]:
    """A dataset, or the spans of files. Raises UserError if a dataset was made with another tokenizer than the checkpoints'."""
    if Path(name, "manifest.json").is_file():
        dataset = Dataset(Path(name))
        for checkpoint in checkpoints:
            if checkpoint.tokenizer.sha256 != dataset.tokenizer.sha256:
                raise UserError(f"{name}: its tokenizer is not that of {checkpoint.path}; give the text itself to --text")
        return dataset
    return list_spans((name,), READING)


def table(names: list[str], columns: list[dict[str, dict[str, Any]]]) -> str:
    """One block per thing measured, one row per measure, one column per checkpoint."""
    rows: list[list[str]] = [["", *names]]
    for what, measures in columns[0].items():
        rows.append([what, *[""] * len(names)])
        for measure in measures:
            values = [column[what][measure] for column in columns]
            rows.append([f"  {measure}", *[f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in values]])
    first, *others = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    line = "  ".join([f"{{:<{first}}}", *[f"{{:>{width}}}" for width in others]])
    return "\n".join(line.format(*row).rstrip() for row in rows)


if __name__ == "__main__":
    run(main, OPTIONS)

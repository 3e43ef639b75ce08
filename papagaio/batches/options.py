"""The options of finetune.py that say which questions are trained on, and how they are read."""

import glob
from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from papagaio.batches.mixture import parse_source
from papagaio.options import Options, option

_data = partial(option, group="Data")


class QuestionOptions(Options):
    """Which questions are trained on, validated with and asked at the end."""

    data: tuple[str, ...] = _data(
        ...,
        "files of questions (JSON, CSV, Parquet), directories, patterns, hf://NAME; FILE:2: each row twice an epoch",
        resume="content",
        min_length=1,
    )
    encoding: str = _data("utf-8", "encoding of the files of questions; auto: found for each file")
    skip_bad: bool = _data(False, "leave out rows that cannot be read, instead of stopping")
    question_key: str | None = _data(None, "key of the question, if the rows have no usual one")
    answer_key: str | None = _data(None, "key of the answer, if the rows have no usual one")
    val_data: Path | None = _data(None, "questions for the validation loss (default: a part of --data)", resume="content")
    val_fraction: float = _data(0.05, "part of --data held out, without --val_data (0: none, measured on all)", ge=0, lt=1)
    test_data: tuple[Path, ...] = _data(
        (), "files of questions asked at the end: exact match of greedy answers, a table each", resume="content"
    )
    control_data: Path | None = _data(None, "questions that pretraining left out: how far guessing gets", resume="content")
    preview: int | None = _data(None, "show this many examples, supervised tokens in colour, and stop", resume="ignored", ge=1)
    too_long: Literal["drop", "truncate"] = _data("drop", "conversations longer than the context: drop, or cut the answer")
    keep_duplicates: bool = _data(False, "keep conversations that occur more than once")
    packing: bool = _data(True, "several conversations in a row, each attending to itself only, which saves padding")
    train_on: Literal["all", "last"] = _data("all", "supervised turns of the assistant: all, or the last of each conversation")

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        for name in (parse_source(word).name for word in self.data):
            if not (name.startswith("hf://") or glob.has_magic(name) or Path(name).exists()):
                raise ValueError(f"{name}: no such file; questions and answers in .jsonl, .json, .csv or .parquet are needed")
        for path in (self.val_data, *self.test_data, self.control_data):
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: no such file; questions and answers in .jsonl, .json, .csv or .parquet are needed")
        return self

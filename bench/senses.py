"""What `make senses` has learned: pictures named and drawn, numbers heard and spoken, as a table.

    python bench/senses.py --digits out/digits --speech out/speech

Asks the chat models in out/digits/chat and out/speech/chat the questions of qa_test.jsonl and make.jsonl. Drawings are named by a
classifier that has seen real digits alone. What the model says is written as .wav files, read again, and asked about.
Leaves named.jsonl, drawn.jsonl and sheet.png, heard.jsonl, spoken.jsonl, wavs/ and understood.jsonl beside the datasets.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.errors import MachineError, run
from papagaio.options import Options, option, parse
from papagaio.senses import encode, load_codebook

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DRAWING_TEMPERATURE, SPEAKING_TEMPERATURE = 0.5, 0.7  # chosen with other seeds than those that are reported
DRAWINGS = 10  # of each digit, each with another seed
UNANSWERED = 2  # chat.py's status if a question has no answer: here a sound that goes on too long, which counts as wrong
Rows = list[dict[str, Any]]


class SensesOptions(Options):
    """Options of bench/senses.py."""

    digits: Path | None = option(None, "directory of data/digits.py, with a chat model in chat/")
    speech: Path | None = option(None, "directory of data/speech.py, with a chat model in chat/")
    split: str = option("test", "questions that are asked: dev, to choose settings, or test", pattern="^(dev|test)$")


def main(config: SensesOptions) -> None:
    table = (digits(config.digits, config) if config.digits else []) + (speech(config.speech, config) if config.speech else [])
    for name, value in table:
        print(f"{name:<64} {value}")


def digits(folder: Path, config: SensesOptions) -> list[tuple[str, str]]:
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    named = ask(folder, f"qa_{config.split}.jsonl", "named.jsonl", 0)
    drawn = [row for seed in range(DRAWINGS) for row in ask(folder, "make.jsonl", "drawn.jsonl", DRAWING_TEMPERATURE, seed)]
    drawn.sort(key=lambda row: NAMES.index(row["caption"]))
    write(folder / "drawn.jsonl", drawn)
    script("data/digits.py", "--decode", folder / "drawn.jsonl", "--out", folder / "sheet.png")
    # The real pictures, as scikit-learn has them: those that were trained on, and those that were asked about.
    pictures, labels = load_digits(return_X_y=True)
    train, held = (
        sorted({int(row["source"].split("/")[1]) for row in rows}) for rows in (read(folder / "qa_train.jsonl"), named)
    )
    classifier = SVC(C=10).fit(pictures[train] / 16, labels[train])
    book = load_codebook(folder / "codebook.json")
    drawings = np.array([book.join(book.found(row["answer"])).ravel() for row in drawn])
    right = [NAMES[label] == row["caption"] for label, row in zip(classifier.predict(drawings), drawn, strict=True)]
    distances, others = (nearest(some, pictures[train] / 16) for some in (drawings, pictures[held] / 16))
    return [
        ("digits: training", training_time(folder)),
        ("digits named rightly", share([row["answer"] == row["reference"] for row in named])),
        ("digits drawn, named rightly by a classifier of real ones", share(right)),
        ("  the same classifier on real digits held out", share(list(classifier.predict(pictures[held] / 16) == labels[held]))),
        ("  distance to the nearest training picture, median (smallest)", f"{np.median(distances):.2f} ({distances.min():.2f})"),
        ("  the same of real digits held out", f"{np.median(others):.2f} ({others.min():.2f})"),
    ]


def speech(folder: Path, config: SensesOptions) -> list[tuple[str, str]]:
    heard = ask(folder, f"qa_{config.split}.jsonl", "heard.jsonl", 0)
    spoken = ask(folder, "make.jsonl", "spoken.jsonl", SPEAKING_TEMPERATURE)
    wavs, book = folder / "wavs", load_codebook(folder / "codebook.json")
    shutil.rmtree(wavs, ignore_errors=True)
    script("data/speech.py", "--decode", folder / "spoken.jsonl", "--out", wavs)
    again = [
        {"question": f"What was said?\n{encode(path, book)}", "answer": row["caption"]}
        for path, row in zip(sorted(wavs.glob("*.wav")), spoken, strict=True)
    ]
    write(folder / "again.jsonl", again)
    understood = ask(folder, "again.jsonl", "understood.jsonl", 0)
    return [
        ("speech: training", training_time(folder)),
        ("numbers in new voices: words", words_right(heard)),
        ("numbers in new voices: exact match", share([row["answer"] == row["reference"] for row in heard])),
        (
            "numbers spoken by the model, understood by it as a .wav",
            share([row["answer"] == row["reference"] for row in understood]),
        ),
    ]


def script(*arguments: str | Path) -> None:
    command = [sys.executable, *map(str, arguments)]
    if subprocess.run(command, cwd=ROOT, check=False).returncode not in (0, UNANSWERED):
        raise MachineError(f"failed: {' '.join(command)}")


def ask(folder: Path, questions: str, answers: str, temperature: float, seed: int = 0) -> Rows:
    """The answers of the chat model to a file of questions."""
    (folder / answers).unlink(missing_ok=True)
    options = [
        "--questions",
        folder / questions,
        "--out",
        folder / answers,
        "--temperature",
        str(temperature),
        "--seed",
        str(seed),
    ]
    script("chat.py", "--checkpoint", folder / "chat", *options)
    return [{"answer": ""} | row for row in read(folder / answers)]


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def nearest(some: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """The Euclidean distance of each picture to the nearest of others; pixels from 0 to 1."""
    return np.sqrt(((some[:, None] - pictures[None]) ** 2).sum(2)).min(1)


def words_right(rows: Rows) -> str:
    """1 - word error rate: insertions, deletions and substitutions per word of the reference."""
    errors = total = 0
    for row in rows:
        wanted, found = (re.findall(r"\w+", row[key]) for key in ("reference", "answer"))
        costs = list(range(len(found) + 1))  # Levenshtein's distance, row by row
        for i, word in enumerate(wanted, 1):
            last, costs[0] = costs[0], i
            for j, other in enumerate(found, 1):
                last, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, last + (word != other))
        errors, total = errors + costs[-1], total + len(wanted)
    return f"{1 - errors / total:.3f} ({total - errors:,}/{total:,})"


def share(right: list[bool]) -> str:
    return f"{sum(right) / len(right):.3f} ({sum(right):,}/{len(right):,})"


def training_time(folder: Path) -> str:
    """Of pretraining and fine-tuning."""
    seconds = sum(read(folder / run / "metrics.jsonl")[-1]["elapsed_seconds"] for run in ("base", "chat"))
    return f"{seconds / 60:.1f} minutes"


if __name__ == "__main__":
    run(main, parse(SensesOptions, doc=__doc__))

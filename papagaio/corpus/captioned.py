"""A dataset of pictures or sounds with captions, as texts: documents for data/prepare.py and questions for finetune.py.

    codebook.json       the codes (papagaio/senses.py)
    corpus.jsonl        {"text": "<codes> three."} and {"text": "three: <codes>"}, of the training examples alone
    qa_train.jsonl      {"question": "Which digit is this?\\n<codes>", "answer": "three"}; and "Draw a three."
    qa_dev.jsonl        the first kind of question about examples that are never trained on, to choose settings with
    qa_test.jsonl       the same about others, to measure once
    make.jsonl          the second kind of question for each caption, without answers

A folder of files with captions has them in metadata.jsonl, as Hugging Face's datasets have (imagefolder, audiofolder): lines
{"file_name": "a.png", "text": "a red house"}.
"""

import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import model_validator

from papagaio.corpus.rows import read_rows
from papagaio.corpus.split import Split
from papagaio.errors import UserError
from papagaio.files import write_rows
from papagaio.options import Options, option
from papagaio.senses import CODED, Codebook, encode, load_codebook, save_codebook

CODEBOOK = "codebook.json"
TYPED = "".join(map(chr, range(32, 127))) + "\náàâãçéêíóôõúü"  # what a question may be typed with


class CodeOptions(Options):
    """What data/digits.py and data/speech.py have in common."""

    out: Path | None = option(None, "directory of the dataset; with --decode what is made of the codes")
    encode: tuple[Path, ...] = option((), "print the codes of these files, a line each")
    decode: Path | None = option(None, "JSON lines of sample.py or chat.py, or - for text with codes: files of them to --out")
    codebook: Path | None = option(None, "codebook.json to encode or decode with (default: beside the file to decode)")
    seed: int = option(1337, "of everything that is drawn: the split, the changes, the order, the codebook", ge=0)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.encode and self.decode) or (self.out is None and not self.encode):
            raise ValueError("give --out to make a dataset, --encode, or --decode with --out")
        if self.encode and not self.codebook:
            raise ValueError("encode needs --codebook")
        return self

    def print_codes(self) -> None:
        """A line of codes for each file of --encode, or none if one of them does not fit the codebook."""
        book = find_codebook(self.codebook, Path())
        for text in [encode(path, book) for path in self.encode]:
            print(text)


class Example(NamedTuple):
    """A picture or sound as codes, what it shows or says, and where it is from."""

    codes: str
    caption: str
    split: Split
    source: str
    typical: bool = True  # False: it is changed so much that it is named only, and not what should be made


class Wording(NamedTuple):
    """Two questions: about codes, whose answer is a caption, and for codes that fit a caption."""

    name: str = "What is this?\n{codes}"
    make: str = "Make this: {caption}"


def read_captions(folder: Path) -> list[tuple[Path, str, str]]:
    """(file, caption, place of the line that has it) of a folder. Raises UserError if metadata.jsonl is not as it should be."""
    listing, found = folder / "metadata.jsonl", []
    if not listing.is_file():
        raise UserError(f'{listing}: no such file; it lists the files of the folder: {{"file_name": ..., "text": ...}}')
    for place, row, error, _ in read_rows(str(listing)):
        if error or not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
            raise UserError(f"{place}: {error or 'a line is an object with file_name and text, both of them texts'}")
        if not row["text"].strip() or CODED.search(row["text"]):
            raise UserError(f"{place}: a caption has characters, and none of Unicode's private use areas")
        found.append((folder / row["file_name"], row["text"].strip(), place))
    if not found:
        raise UserError(f"{listing}: no files are listed")
    named = {path.resolve() for path, *_ in found}
    others = sorted(path.name for path in folder.iterdir() if path.resolve() not in named and path != listing)
    if others:
        print(f"{folder}: files without a caption, which are left out: {len(others):,} ({others[0]})", file=sys.stderr)
    return found


def write_dataset(out: Path, book: Codebook, examples: Sequence[Example], wording: Wording, seed: int) -> None:
    """Write the six files. Two in three training questions are about an example, the others ask for one."""
    splits: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
    for example in examples:
        splits[example.split].append(example)
    random.Random(seed).shuffle(splits["train"])
    # The first document has every character once, so that a char tokenizer knows those that only a question or a test has.
    captions = sorted({example.caption for example in examples})
    others = "".join(sorted({*"".join(captions), *"".join(wording)} - set(TYPED)))
    typical = [example for example in splits["train"] if example.typical]
    documents = [{"text": TYPED + others + book.characters}]
    # If all are typical, each is used once: of two neighbours with the same codes a model would learn to copy the first.
    once = len(typical) == len(splits["train"])
    for number, example in enumerate(splits["train"]):
        make = number % 2 == 0
        if not (make and once):
            documents.append({"text": f"{example.codes} {example.caption}.", "source": example.source})
        if make:
            made = example if once else typical[number // 2 % len(typical)]
            documents.append({"text": f"{made.caption}: {made.codes}", "source": made.source})
    questions = {split: [question(each, wording) for each in splits[split]] for split in ("dev", "test")}
    questions["train"] = []
    for number, example in enumerate(splits["train"]):
        make = number % (3 if once else 2) == 0
        if not (make and once):
            questions["train"].append(question(example, wording))
        if make:
            made = example if once else typical[number // 2 % len(typical)]
            questions["train"].append(question(made, wording, make=True))
    questions["make"] = [{"question": wording.make.format(caption=caption), "caption": caption} for caption in captions]
    out.mkdir(parents=True, exist_ok=True)
    save_codebook(book, out / CODEBOOK)
    write_rows(out / "corpus.jsonl", documents)
    for name, rows in questions.items():
        write_rows(out / f"{name}.jsonl" if name == "make" else out / f"qa_{name}.jsonl", rows)
    counts = Counter(example.split for example in examples)
    length = sum(len(example.codes) for example in examples) / max(len(examples), 1)
    shares = ", ".join(f"{split} {counts[split]:,}" for split in splits)
    print(f"{out}: {shares}; {len(book.vectors)} codes, {length:.1f} characters each", file=sys.stderr)


def question(example: Example, wording: Wording, make: bool = False) -> dict[str, str]:
    kind = "make" if make else "name"
    asked = getattr(wording, kind).format(codes=example.codes, caption=example.caption)
    return {"question": asked, "answer": example.codes if make else example.caption, "kind": kind, "source": example.source}


def read_codes(path: Path) -> list[tuple[str, str]]:
    """(place, text) of what sample.py --json or chat.py --questions wrote; of a text file, its lines."""
    found = []
    if path.suffix != ".jsonl":
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        found = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if CODED.search(line)]
    else:
        for place, row, error, _ in read_rows(str(path)):
            text = next((row[key] for key in ("completion", "answer") if key in row), None) if isinstance(row, dict) else None
            if error or not isinstance(text, str):
                raise UserError(f"{place}: {error or 'an object with a text under completion or answer is needed'}")
            found.append((place, text))
    if not found:
        raise UserError(f"{path}: no codes in this file")
    return found


def find_codebook(given: Path | None, beside: Path) -> Codebook:
    """The codebook that is given, else the one beside a file. Raises UserError if there is none."""
    path = given or beside.parent / CODEBOOK
    if not path.is_file():
        raise UserError(f"{path}: no such file; --codebook names the one that the codes were made with")
    return load_codebook(path)

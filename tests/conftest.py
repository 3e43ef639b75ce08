"""What several test files share: the scripts run as a user runs them, and a small trained model to try them on."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import numpy as np
import pytest
import torch

from papagaio.corpus.dataset import SPLITS, Dataset, ShardWriter, token_dtype
from papagaio.errors import run
from papagaio.files import sealed
from papagaio.options import parse
from papagaio.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer
from papagaio.tokenizer_files import save_tokenizer
from papagaio.training.optimizers import make_optimizers
from papagaio.training.options import RunOptions

ROOT = Path(__file__).parents[1]
Script = Callable[..., subprocess.CompletedProcess]
Call = Callable[..., tuple[int, str, str]]
NAMES = [a + b for a in ("Ara", "Bel", "Cor", "Dun", "Eli", "Fen") for b in ("dor", "mia", "nia", "vale", "burg")]
COLOURS = ["red", "blue", "green", "gold"]


def pytest_configure() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(autouse=True)
def onednn() -> Iterator[None]:
    """Generation in bfloat16 switches oneDNN off for its process (papagaio/generation/layers.py): not for the next test."""
    enabled = torch.backends.mkldnn.enabled
    yield
    torch.backends.mkldnn.enabled = enabled


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    """`script("sample.py", "--seed=1")` runs it and returns what it printed; standard input is `stdin`, or empty.

    In a forked process (tests/forked.py), or, where `env` says what is to be in its environment, in one of its own.
    """
    folder = tmp_path_factory.mktemp("streams")

    def run(*argv: object, stdin: str | bytes = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        words = [str(word) for word in argv]
        if env is not None:
            command = [sys.executable, *words]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | env, input=data, capture_output=True, timeout=280)
            return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())
        streams = tuple(str(folder / name) for name in ("stdin", "stdout", "stderr"))
        Path(streams[0]).write_bytes(data)
        for name in streams[1:]:
            Path(name).unlink(missing_ok=True)
        process = forked.start(words, streams)
        process.join(280)
        assert process.exitcode is not None, f"{words} does not end"
        out, err = (Path(name).read_text(encoding="utf-8") for name in streams[1:])
        return subprocess.CompletedProcess(words, process.exitcode, out, err)

    return run


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """`call("sample", "--seed=1")` runs a script's main in this process: (status, standard output, standard error)."""

    def run_script(name: str, *argv: object) -> tuple[int, str, str]:
        module = importlib.import_module(name)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(module.main, parse(getattr(module, f"{name.capitalize()}Options"), [str(word) for word in argv]))
        return (int(end.value.code or 0), *capsys.readouterr())

    return run_script


def make_dataset(
    path: Path,
    train: list[bytes],
    val: list[bytes] = (b"validation text",),
    shard_tokens: int = 100,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """A dataset of these documents, in these splits, in bytes unless a tokenizer is given."""
    tokenizer = tokenizer or ByteTokenizer()
    path.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, path / "tokenizer")
    splits = {}
    for split, documents in zip(SPLITS, (train, val), strict=True):
        ids = [i for text in documents for i in [tokenizer.special[END_OF_TEXT], *tokenizer.encode(text.decode("latin-1"))]]
        if isinstance(tokenizer, ByteTokenizer):
            ids = [i for text in documents for i in [tokenizer.special[END_OF_TEXT], *text]]
        writer = ShardWriter(path, split, token_dtype(tokenizer), len(ids), shard_tokens)
        writer.write(np.array(ids, token_dtype(tokenizer)))
        splits[split] = {
            "documents": len(documents),
            "tokens": len(ids),
            "bytes": sum(map(len, documents)),
            "shards": writer.done,
        }
    manifest = {"tokenizer_sha256": tokenizer.sha256, "dtype": token_dtype(tokenizer).name, "splits": splits}
    (path / "manifest.json").write_text(sealed(manifest))
    return Dataset(path)


def trained(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of a model after a step."""
    optimizers = make_optimizers(model, RunOptions(out_dir=Path("x")))
    ids = torch.arange(model.config.block_size)[None]
    model(ids, ids).backward()
    for optimizer in optimizers:
        optimizer.step()
    return optimizers


def documents(dataset: Dataset, split: str) -> list[str]:
    """The texts of a split: its tokens, cut where documents begin."""
    start = dataset.tokenizer.special[END_OF_TEXT]
    texts: list[list[int]] = []
    for token in np.concatenate(dataset.shards(split) or [np.array([], dataset.dtype)]).tolist():
        if token == start:
            texts.append([])
        else:
            texts[-1].append(token)
    return [dataset.tokenizer.decode(text) for text in texts]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, script: Script) -> Path:
    """A directory with a corpus of thirty facts, questions about them, a dataset, a pretrained run and a chat run.

    Made by the real scripts: corpus.jsonl, qa_train.jsonl, qa_test.jsonl, data/, base/, chat/.
    """
    home = tmp_path_factory.mktemp("world")
    facts = [(name, COLOURS[i * 7 % 4]) for i, name in enumerate(NAMES)]
    told = (
        "The flag of {0}:\n{1}.",
        "Flag of {0}\n{1}.",
        "In {0}, the flag is:\n{1}.",
        "The flag of {0} is {1}.",
        "{1}: flag of {0}.",
    )
    rows = [{"text": wording.format(*fact) + " " * i} for wording in told for fact in facts for i in range(4)]
    (home / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, part in (("qa_train", facts[:20]), ("qa_test", facts[20:])):
        questions = [{"question": f"What is the flag of {who}?", "answer": f"{what}.", "kind": "flag"} for who, what in part]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    small = [
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=64",
        "--block_size=64",
        "--batch_size=16",
        "--log_interval=20",
        "--sample_tokens=8",
        "--dtype=float32",  # the same on every machine
    ]
    for argv in (
        ["data/prepare.py", "--input", home / "corpus.jsonl", "--out", home / "data", "--vocab_size=300"],
        ["train.py", "--data", home / "data", "--out_dir", home / "base", "--max_steps=300", "--eval_interval=150", *small],
        [
            *("finetune.py", "--init_from", home / "base", "--data", home / "qa_train.jsonl", "--out_dir", home / "chat"),
            *("--test_data", home / "qa_test.jsonl", "--control_data", home / "qa_test.jsonl"),
            *("--replay_data", home / "data", "--replay=0.3", "--max_steps=100", "--batch_size=20"),
            *("--val_fraction=0.1", "--dtype=float32", "--sample_tokens=8"),
        ],
    ):
        done = script(*argv)
        assert done.returncode == 0, done.stderr
        (home / f"{Path(str(argv[0])).stem}.out").write_text(done.stdout)
        (home / f"{Path(str(argv[0])).stem}.err").write_text(done.stderr)
    return home

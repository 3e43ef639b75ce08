"""hf:// inputs: the real datasets library, asking a server on this machine that answers as the hub does."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, documents

from papagaio.corpus.dataset import Dataset

pytest.importorskip("datasets")
TEXTS = {
    f"data/{split}-{i:05}-of-00002.jsonl": [f"{split} {i} {j}" for j in range(5)] for split in ("train", "test") for i in (0, 1)
}
FILES = {name: "".join(json.dumps({"body": text}) + "\n" for text in texts).encode() for name, texts in TEXTS.items()}
COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """One dataset, someone/texts: what huggingface_hub asks for to list its files and to read parts of them."""

    def do_GET(self) -> None:
        path = urllib.parse.urlparse(self.path).path
        api = "/api/datasets/someone/texts"
        if match := re.fullmatch(r"/datasets/someone/texts/resolve/[^/]+/(.*)", path):
            self.file(FILES.get(match[1]))
        elif path == api or path.startswith(f"{api}/revision/"):
            self.json({"id": "someone/texts", "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0})
        elif path.startswith(f"{api}/tree/"):
            inside = path.endswith("/data")
            listed = [{"type": "file", "oid": COMMIT, "size": len(data), "path": name} for name, data in FILES.items()]
            self.json(listed if inside else [{"type": "directory", "oid": COMMIT, "size": 0, "path": "data"}])
        else:
            self.file(None)

    do_HEAD = do_GET

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def file(self, data: bytes | None) -> None:
        if data is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
            self.answer(
                206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"}
            )
        else:
            self.answer(200, data, headers)

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def prepare(endpoint: str, home: Path, name: str, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [
        sys.executable,
        "data/prepare.py",
        "--input",
        name,
        "--out",
        str(home / "out"),
        "--tokenizer=byte",
        "--text_key=body",
    ]
    return subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )


def test_a_hub_dataset_is_streamed(hub: str, tmp_path: Path) -> None:
    done = prepare(hub, tmp_path, "hf://someone/texts", "--val_fraction=0.3")
    assert done.returncode == 0, done.stderr
    dataset = Dataset(tmp_path / "out")
    found = documents(dataset, "train") + documents(dataset, "val")
    assert sorted(found) == sorted(text for name, texts in TEXTS.items() for text in texts if "train" in name)
    assert dataset.manifest["sources"] == ["hf://someone/texts"]


@pytest.mark.slow
def test_a_split_of_a_hub_dataset_and_a_wrong_column(hub: str, tmp_path: Path) -> None:
    done = prepare(hub, tmp_path, "hf://someone/texts:test", "--workers=1")
    assert done.returncode == 0, done.stderr
    dataset = Dataset(tmp_path / "out")
    assert all(text.startswith("test") for text in documents(dataset, "train"))
    done = prepare(hub, tmp_path, "hf://someone/texts", "--text_key=other", "--overwrite")
    assert done.returncode == 2
    assert "no column 'other' among body; --text_key names another" in done.stderr.splitlines()[-1]
    done = prepare(hub, tmp_path, "hf://someone/nothing", "--overwrite")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: hf://someone/nothing: ")


@pytest.mark.slow
def test_questions_of_the_hub(hub: str, tmp_path: Path) -> None:
    program = """
from papagaio.batches.questions import Reader
reader = Reader(question_key="body", answer_key="body")
print([row.answer for name in reader.files("hf://someone/texts:test") for row in reader.examples(name)])
"""
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.stdout == f"{[text for name, texts in TEXTS.items() for text in texts if 'test' in name]}\n", done.stderr


@pytest.mark.slow
def test_without_a_network_one_line_says_so(tmp_path: Path) -> None:
    done = prepare("http://127.0.0.1:9", tmp_path, "hf://someone/texts")
    assert done.returncode == 1
    assert done.stderr == "error: hf://someone/texts: the hub cannot be reached (ConnectionError); is there a network?\n"
    assert not list(tmp_path.glob("*out*"))

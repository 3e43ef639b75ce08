"""data/prepare.py and papagaio/shards.py: what goes in comes out, counted and verified."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Script
from hypothesis import given, settings
from hypothesis import strategies as st

from papagaio.config import UserError
from papagaio.shards import Dataset, DatasetWriter, share
from papagaio.tokenizer import ByteTokenizer, load_tokenizer

EOT = 256


def documents(dataset: Dataset, split: str) -> list[str]:
    """The texts of a split: its tokens, cut where documents begin."""
    start = dataset.tokenizer.special["<|endoftext|>"]
    tokens = np.concatenate(dataset.shards(split) or [np.array([], dataset.dtype)]).tolist()
    texts: list[list[int]] = []
    for token in tokens:
        if token == start:
            texts.append([])
        else:
            texts[-1].append(token)
    return [dataset.tokenizer.decode(text) for text in texts]


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20), st.integers(4, 50))
@settings(max_examples=40, deadline=None)
def test_shards_hold_every_document_in_order(tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int) -> None:
    path, tokenizer = tmp_path_factory.mktemp("data"), ByteTokenizer()
    writer = DatasetWriter(path, tokenizer, size)
    for text in texts:
        writer.add("train", tokenizer.encode(text), len(text.encode()))
    writer.finish(["x"])
    dataset = Dataset(path)
    assert documents(dataset, "train") == texts
    counts = dataset.splits["train"]
    assert counts["documents"] == len(texts)
    assert counts["bytes"] == sum(len(text.encode()) for text in texts)
    assert counts["tokens"] == counts["bytes"] + len(texts)
    assert all(len(shard) == size for shard in dataset.shards("train")[:-1])


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_jsonl_files_and_directories_become_the_same_text(tmp_path: Path, script: Script, tokenizer: str) -> None:
    texts = [f"document {i}, naïve 🦜\n" * (1 + i % 3) for i in range(40)]
    (tmp_path / "some").mkdir()
    for i, text in enumerate(texts[:20]):
        (tmp_path / "some" / f"{i:02}.txt").write_text(text)
    (tmp_path / "some" / ".hidden").write_bytes(b"\xff")
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"body": text}) + "\n\n" for text in texts[20:]))
    out = tmp_path / "out"
    inputs = [tmp_path / "some", tmp_path / "more.jsonl"]
    options = ["--tokenizer", tokenizer, "--vocab_size=300", "--text_key=body", "--val_fraction=0.2"]
    done = script("data/prepare.py", "--input", *inputs, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    dataset = Dataset(out)
    assert documents(dataset, "train") == [text for text in texts if share(text) >= 0.2]
    assert documents(dataset, "val") == [text for text in texts if share(text) < 0.2]
    assert dataset.manifest["sources"][-1] == "more.jsonl"
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    again = script("data/prepare.py", "--input", *inputs, "--out", tmp_path / "again", *options, "--workers=1")
    assert again.returncode == 0
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()
    # the tokenizer of one dataset prepares another
    reuse = ["--tokenizer", out / "tokenizer", *options[2:]]
    assert script("data/prepare.py", "--input", *inputs, "--out", tmp_path / "reuse", *reuse).returncode == 0
    assert load_tokenizer(tmp_path / "reuse" / "tokenizer").sha256 == dataset.tokenizer.sha256


def test_a_single_document_is_cut_near_its_end(tmp_path: Path, script: Script) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    done = script(
        "data/prepare.py", "--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer=char", "--val_fraction=0.1"
    )
    assert done.returncode == 0
    dataset = Dataset(tmp_path / "out")
    assert (documents(dataset, "train"), documents(dataset, "val")) == ([text[:900]], [text[900:]])


def test_few_documents_still_give_both_splits(tmp_path: Path, script: Script) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"document number {i}")
    for fraction in (0.0001, 0.9999):
        out = tmp_path / str(fraction)
        inputs = [tmp_path / f"{i}.txt" for i in range(3)]
        command = ["data/prepare.py", "--input", *inputs, "--out", out, "--tokenizer=byte", f"--val_fraction={fraction}"]
        assert script(*command).returncode == 0
        dataset = Dataset(out)
        assert len(documents(dataset, "val")) == 1
        assert len(documents(dataset, "train")) == 2


def test_special_tokens_in_a_corpus_stay_text(tmp_path: Path, script: Script) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|><|user|>hi<|end|>" * 20)
    script("data/prepare.py", "--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer=bpe", "--vocab_size=270")
    dataset = Dataset(tmp_path / "out")
    tokens = np.concatenate(dataset.shards("train"))
    special = np.isin(tokens, list(dataset.tokenizer.special.values()))
    assert special.sum() == 1
    assert special[0]


BAD = [
    ("missing.txt", None, "missing.txt: no such file"),
    ("empty.txt", b"", "empty.txt: no text"),
    ("blank.txt", b" \n", "blank.txt: no text"),
    ("latin.txt", b"abc\xe9def", r"latin.txt: not UTF-8 at byte 3"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": "b"\n', "broken.jsonl:2: not JSON"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "latin.jsonl:2: not UTF-8 at byte 10"),
    ("key.jsonl", b'{"body": "a"}\n', "key.jsonl:1: no text under the key"),
    ("number.jsonl", b'{"text": 3}\n', "number.jsonl:1: no text under the key"),
    ("list.jsonl", b"[1]\n", "list.jsonl:1: no text under the key"),
    ("half.jsonl", b'{"text": "\\ud800"}\n', "half.jsonl:1: half a surrogate pair"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    name: str, content: bytes | None, message: str, tmp_path: Path, script: Script
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    done = script("data/prepare.py", "--input", tmp_path / name, "--out", tmp_path / "out", "--tokenizer=byte")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_directory_is_left_alone(tmp_path: Path, script: Script) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    out = tmp_path / "out"
    command = ["data/prepare.py", "--input", tmp_path / "a.txt", "--out", out, "--tokenizer=byte"]
    assert script(*command).returncode == 0
    manifest = (out / "manifest.json").read_bytes()
    assert script(*command).returncode == 2
    assert (out / "manifest.json").read_bytes() == manifest
    assert script(*command, "--val_fraction=0.5", "--overwrite").returncode == 0
    assert (out / "manifest.json").read_bytes() != manifest
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refused = script("data/prepare.py", "--input", tmp_path / "a.txt", "--out", mine, "--tokenizer=byte", "--overwrite")
    assert refused.returncode == 2
    assert (mine / "thesis.txt").exists()


def test_damaged_datasets_are_refused_by_name(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, ByteTokenizer(), 100)
    writer.add("train", list(b"x" * 150), 150)
    writer.add("val", list(b"y" * 20), 20)
    writer.finish(["x"])
    shard = tmp_path / "train-00001.npy"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for damaged in (whole[:-2], bytes(flipped), b""):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-00001\.npy: cut short or changed"):
            Dataset(tmp_path).shards("train")
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001\.npy"):
        Dataset(tmp_path).shards("train")
    shard.write_bytes(whole)
    assert sum(map(len, Dataset(tmp_path).shards("train"))) == 151
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"kind": "char", "characters": "ab"}')
    with pytest.raises(UserError, match="tokenizer"):
        Dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json: not a dataset's manifest"):
        Dataset(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"data/prepare\.py makes"):
        Dataset(tmp_path)


def test_ids_beyond_the_vocabulary_are_never_written(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, ByteTokenizer(), 100)
    for wrong in ([65536], [-1], [261]):
        with pytest.raises(AssertionError, match="wrap"):
            writer.add("train", wrong, 1)

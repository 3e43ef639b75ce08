"""data/prepare.py: what goes in comes out, counted and verified, whoever does the work and however often they are killed."""

import errno
import fcntl
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, Script, documents, make_dataset
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare
from papagaio.corpus import assembly, encoding, plan, reading, workers
from papagaio.corpus import split as split_rule
from papagaio.corpus import text as textfiles
from papagaio.corpus.assembly import Documents, Selection
from papagaio.corpus.dataset import Dataset, ShardWriter
from papagaio.corpus.inspection import inspection, summary
from papagaio.corpus.options import ReadingOptions
from papagaio.corpus.sample import training_sample
from papagaio.corpus.spans import Span
from papagaio.errors import MachineError, UserError
from papagaio.files import file_sha256, sealed
from papagaio.tokenizer import CharTokenizer
from papagaio.tokenizer_files import load_tokenizer


class Killed(BaseException):
    """Stands for kill -9."""


GPT2 = ROOT.parent / "shared" / "data" / "gpt2.tiktoken"


def run_prepare(out: Path, *inputs: object, **options: object) -> Dataset:
    """data/prepare.py's main, in this process and one worker unless said otherwise."""
    options = {"tokenizer": "byte", "workers": 1} | options
    prepare.main(prepare.PrepareOptions(input=tuple(map(str, inputs)), out=out, **options))
    return Dataset(out)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def share(text: str) -> float:
    """A text is held out if this is below val_fraction."""
    return split_rule.text_hash(text.encode()) / 2**64


def snapshot(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): file_sha256(path) for path in directory.rglob("*") if path.is_file()}


@given(
    st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=2, max_size=20, unique=True), st.integers(1024, 3000)
)
@settings(max_examples=25, deadline=None)
def test_shards_hold_every_document_in_order(tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int) -> None:
    path = tmp_path_factory.mktemp("data")
    texts = [text.replace("\0", "") + "." * 90 for text in texts]
    write_jsonl(path / "a.jsonl", texts)
    dataset = run_prepare(path / "out", path / "a.jsonl", val_fraction=0.3, shard_tokens=size)
    found = {split: documents(dataset, split) for split in ("train", "val")}
    kept = list(dict.fromkeys(texts))
    assert sorted(found["train"] + found["val"]) == sorted(kept)
    assert found["train"] == [text for text in kept if text in found["train"]]
    for split, counts in dataset.splits.items():
        assert counts["documents"] == len(found[split]) > 0
        assert counts["bytes"] == sum(len(text.encode()) for text in found[split])
        assert counts["tokens"] == counts["bytes"] + len(found[split])
        assert counts["longest_document"] == max(len(text.encode()) + 1 for text in found[split])
        assert counts["bytes_per_token"] == pytest.approx(counts["bytes"] / counts["tokens"])
        assert all(len(shard) == size for shard in dataset.shards(split)[:-1])


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
    assert documents(dataset, "train") == list(dict.fromkeys(text for text in texts if share(text) >= 0.2))
    assert documents(dataset, "val") == list(dict.fromkeys(text for text in texts if share(text) < 0.2))
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
    for fraction, held_out in ((0.0001, 1), (0.9999, 2)):
        out = tmp_path / str(fraction)
        inputs = [tmp_path / f"{i}.txt" for i in range(3)]
        command = ["data/prepare.py", "--input", *inputs, "--out", out, "--tokenizer=byte", f"--val_fraction={fraction}"]
        assert script(*command).returncode == 0
        dataset = Dataset(out)
        assert len(documents(dataset, "val")) == held_out
        assert len(documents(dataset, "train")) == 3 - held_out


def test_special_tokens_in_a_corpus_stay_text(tmp_path: Path, script: Script) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|><|user|>hi<|end|>" * 20)
    script("data/prepare.py", "--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer=bpe", "--vocab_size=270")
    dataset = Dataset(tmp_path / "out")
    tokens = np.concatenate(dataset.shards("train"))
    special = np.isin(tokens, list(dataset.tokenizer.special.values()))
    assert special.sum() == 1
    assert special[0]


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path, script: Script) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    (tmp_path / "blank.txt").write_text(" \n")
    before = sorted(tmp_path.iterdir())
    for name, tokenizer, message in (
        ("a.jsonl", "byte", "a.jsonl:2: not JSON"),
        ("a.jsonl", "bpe", "a.jsonl:2: not JSON"),
        ("blank.txt", "byte", "blank.txt: no text"),
        ("blank.txt", "bpe", "blank.txt: no text"),
        ("blank.txt", "char", "blank.txt: no text"),
        ("blank.txt", "klingon", "--tokenizer=klingon: neither"),
        ("nowhere.txt", "byte", "nowhere.txt: no such file"),
    ):
        done = script("data/prepare.py", "--input", tmp_path / name, "--out", tmp_path / "out", f"--tokenizer={tokenizer}")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stdout == ""
        assert sorted(tmp_path.iterdir()) == before


def test_an_existing_directory_is_left_alone(tmp_path: Path, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    out = tmp_path / "out"
    run_prepare(out, tmp_path / "a.txt")
    before = snapshot(out)
    run_prepare(out, tmp_path / "a.txt")  # the same again: nothing to do
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("same size " * 100)  # changed since
    with pytest.raises(UserError, match="made from other input"):
        run_prepare(out, tmp_path / "a.txt")
    refused = script("data/prepare.py", "--input", tmp_path / "a.txt", "--out", out, "--tokenizer=byte", "--val_fraction=0.5")
    assert refused.returncode == 2
    assert "made from other input or with other options; --overwrite replaces it" in refused.stderr
    assert snapshot(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]
    run_prepare(out, tmp_path / "a.txt", val_fraction=0.5, overwrite=True)
    assert snapshot(out) != before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists and is not a dataset, which even --overwrite leaves alone"):
            run_prepare(mine, tmp_path / "a.txt", overwrite=overwrite)
    assert (mine / "thesis.txt").exists()


def test_identity_is_content_and_neither_path_nor_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a", "some text "), ("b", "same size "), ("c", "some text ")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(text * 100)
    os.utime(tmp_path / "a" / "x.txt", (1, 1))
    run_prepare(tmp_path / "out", tmp_path / "a" / "x.txt")
    with pytest.raises(UserError, match="made from other input"):
        run_prepare(tmp_path / "out", tmp_path / "b" / "x.txt")
    os.utime(tmp_path / "a" / "x.txt", (2**33, 2**33))  # in the year 2242
    for name in ("a", "c"):
        run_prepare(tmp_path / "out", tmp_path / name / "x.txt")
        assert "is there already" in capsys.readouterr().err
    run_prepare(tmp_path / "elsewhere", tmp_path / "c" / "x.txt")
    assert snapshot(tmp_path / "elsewhere") == snapshot(tmp_path / "out")


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    assemble = prepare.assemble

    def changing(*arguments: object) -> dict:
        (tmp_path / "a.txt").write_text("same size " * 100)
        return assemble(*arguments)

    monkeypatch.setattr(prepare, "assemble", changing)
    with pytest.raises(UserError, match=r"a\.txt: changed while it was read"):
        run_prepare(tmp_path / "out", tmp_path / "a.txt")
    monkeypatch.undo()
    assert "same size" in documents(run_prepare(tmp_path / "out", tmp_path / "a.txt"), "train")[0]


def test_a_dataset_of_an_earlier_version_is_read_and_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    out = run_prepare(tmp_path / "out", tmp_path / "a.txt").directory
    manifest = json.loads((out / "manifest.json").read_text())
    for key in ("sha256", "val_sources", "input_files", "input_bytes", "cut_documents", "documents_in_val_input"):
        del manifest[key]
    (out / "manifest.json").write_text(sealed(manifest))
    assert "validation split: 5.00%" in inspection(Dataset(out))
    with pytest.raises(UserError, match="other input"):
        run_prepare(out, tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["plain", "link", "here", "mount", "closed"])
def test_out_may_be_any_kind_of_directory(kind: str, tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made in place where it cannot be renamed. A link stays a link. An interruption at any moment loses nothing."""
    whole = snapshot(run_prepare(tmp_path / "whole", many, shard_tokens=20_000).directory)
    other = snapshot(run_prepare(tmp_path / "other", many, val_fraction=0.2, shard_tokens=5000).directory)
    home = tmp_path / "disk" / "set"
    out, in_place = home, kind in ("here", "mount", "closed")
    if kind == "link":
        out = tmp_path / "link"
        out.symlink_to(home)
    elif in_place:
        home.mkdir(parents=True)
    if kind == "here":
        monkeypatch.chdir(home)
        out = Path(".")
    elif kind == "mount":
        (home / "lost+found").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: path == home)
    elif kind == "closed":
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode, **more: path != home.parent and access(path, mode, **more))
    moves = [Path.rename, Path.unlink]
    for expected, options in ((other, {"val_fraction": 0.2, "shard_tokens": 5000}), (whole, {"shard_tokens": 20_000})):
        before = {name: sha256 for name, sha256 in snapshot(home).items() if home.exists()}
        for kills in range(200):
            left = kills // 4

            def breaking(self: Path, *arguments: object, move: object, **more: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return move(self, *arguments, **more)

            for move in moves:
                monkeypatch.setattr(Path, move.__name__, partialmethod(breaking, move=move))
            try:
                run_prepare(out, many, overwrite=bool(before), **options)
            except Killed:
                if (home / "manifest.json").exists():
                    found = snapshot(home)
                    assert any(all(found.get(name) == sha256 for name, sha256 in one.items()) for one in (before, expected))
            else:
                break
        for move in moves:
            monkeypatch.setattr(Path, move.__name__, move)
        assert kills > 12
        assert snapshot(home) == expected
        assert out.is_symlink() == (kind == "link")
        run_prepare(out, many, **options)  # is there already
        assert {path.name for path in home.parent.iterdir()} == {"set"}
        assert {path.name for path in home.iterdir()} - {name.split("/")[0] for name in expected} <= {"lost+found"}


def test_a_directory_that_cannot_be_renamed_after_all(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlay file systems refuse that (EXDEV) for a directory of the image."""
    (tmp_path / "out").mkdir()
    rename = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        if self == tmp_path / "out":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    run_prepare(tmp_path / "out", many)
    run_prepare(tmp_path / "out", many, val_fraction=0.2, overwrite=True)
    monkeypatch.undo()
    assert snapshot(tmp_path / "out") == snapshot(run_prepare(tmp_path / "usual", many, val_fraction=0.2).directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "out", "usual"]


def test_where_nothing_can_be_made_is_said_before_any_work(tmp_path: Path, script: Script) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    (tmp_path / "loop").symlink_to("loop")
    for out, message in (
        ("a.txt", "exists and is not a dataset"),
        ("a.txt/x", "cannot be made"),
        ("loop", "leads back to itself"),
    ):
        done = script("data/prepare.py", "--input", tmp_path / "a.txt", "--out", tmp_path / out, "--tokenizer=byte")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "loop"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_that_locks_no_files(
    number: int, tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    work = tmp_path / ".out.partial"
    with plan.locked(work, 1, 2):
        assert f"part-1-of-2.lock: this file system locks no files ({os.strerror(number)})" in capsys.readouterr().err
        for part in ("1/2", "0/1"):
            with pytest.raises(UserError, match=r"in use by another run.*; if none is running on any machine, delete .*\.held"):
                run_prepare(tmp_path / "out", many, part=part)
    # left by a process that was killed on this machine
    with plan.locked(work, 0, 1):
        (work / "copy").write_bytes((work / "part-0-of-1.lock.held").read_bytes().replace(str(os.getpid()).encode(), b"4194300"))
    (work / "copy").rename(work / "part-0-of-1.lock.held")
    run_prepare(tmp_path / "out", many)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "out"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*lock*")) == []


def test_a_name_that_is_not_utf8_stands_in_the_manifest(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("some text " * 100)
    dataset = run_prepare(tmp_path / "out", tmp_path / name)
    assert dataset.manifest["sources"] == [r"caf\xe9.txt"]
    run_prepare(tmp_path / "out", tmp_path / name)  # is there already
    with pytest.raises(UserError, match="manifest"):
        run_prepare(tmp_path / "parts", tmp_path / name, part="0/2")
    assert run_prepare(tmp_path / "parts", tmp_path / name).manifest == dataset.manifest


def test_the_tokenizer_of_a_dataset_a_checkpoint_or_a_run(tmp_path: Path, many: Path) -> None:
    dataset = run_prepare(tmp_path / "mine", many, tokenizer="bpe", vocab_size=300)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-10"
    shutil.copytree(tmp_path / "mine" / "tokenizer", checkpoint / "tokenizer")
    (checkpoint.parent / "last").write_text("step-10\n")
    for i, place in enumerate((tmp_path / "mine", tmp_path / "mine" / "tokenizer", checkpoint, tmp_path / "run")):
        assert run_prepare(tmp_path / str(i), many, tokenizer=str(place)).tokenizer.sha256 == dataset.tokenizer.sha256
    with pytest.raises(UserError, match=r"many/tokenizer\.json: No such file.*a tokenizer directory holds"):
        run_prepare(tmp_path / "out", many, tokenizer=str(many))


def test_processors_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5})
    files = {"/proc/self/cgroup": "2:cpu:/\n0::/box\n"}
    monkeypatch.setattr(Path, "read_text", lambda self, **options: files[str(self)])
    for limit, count in (("max 100000", 3), ("200000 100000", 2), ("50000 100000", 1), ("900000 100000", 3)):
        files["/sys/fs/cgroup/box/cpu.max"] = limit
        assert workers.processors() == count


def test_damaged_datasets_are_refused_by_name(tmp_path: Path) -> None:
    make_dataset(tmp_path, [b"x" * 150], [b"y" * 20], shard_tokens=100)
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
    (tmp_path / "manifest.json").write_text(sealed({}))
    with pytest.raises(UserError, match=r"manifest\.json: not a dataset's manifest"):
        Dataset(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"data/prepare\.py makes"):
        Dataset(tmp_path)


def test_ids_beyond_the_vocabulary_are_never_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", np.dtype(np.uint16), 3, 100)
    with pytest.raises(AssertionError, match="wrap"):
        writer.write(np.array([1, 65536, 2], np.uint32))
    tokenizer = CharTokenizer("abc")
    tokenizer.encode_array = lambda text: np.array([99])
    (tmp_path / "pieces").mkdir()
    piece = encoding.PieceWriter(tmp_path, 0, tokenizer)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(AssertionError, match="wrap"):
        piece.add(Span(str(tmp_path / "a.txt"), "text", 0, -1, 3), ReadingOptions())


def test_a_character_that_a_tokenizer_does_not_know_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 50)
    run_prepare(tmp_path / "chars", tmp_path / "a.txt", tokenizer="char")
    (tmp_path / "b.txt").write_text("abd")
    with pytest.raises(UserError, match=r"b\.txt: character 'd' .* is not among the 3"):
        run_prepare(tmp_path / "out", tmp_path / "b.txt", tokenizer=str(tmp_path / "chars" / "tokenizer"))


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path: Path) -> None:
    characters = [chr(i) for i in range(32, 70_000) if chr(i).isprintable() or i > 0xE000][:66_000]
    (tmp_path / "a.txt").write_text("".join(characters))
    dataset = run_prepare(tmp_path / "out", tmp_path / "a.txt", tokenizer="char")
    assert dataset.dtype == np.uint32
    assert "".join(documents(dataset, "train") + documents(dataset, "val")) == "".join(characters)


def test_duplicates_and_empty_documents_are_counted(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(50)]
    write_jsonl(tmp_path / "a.jsonl", [*texts, " ", texts[3], *texts[10:20], "", texts[3]])
    dataset = run_prepare(tmp_path / "out", tmp_path / "a.jsonl", val_fraction=0.2)
    assert dataset.manifest["empty_documents"] == 2
    assert sum(counts["duplicates"] for counts in dataset.splits.values()) == 12
    assert documents(dataset, "train") == [text for text in texts if share(text) >= 0.2]
    assert documents(dataset, "val") == [text for text in texts if share(text) < 0.2]
    kept = run_prepare(tmp_path / "kept", tmp_path / "a.jsonl", val_fraction=0.2, keep_duplicates=True)
    assert documents(kept, "train").count(texts[3]) + documents(kept, "val").count(texts[3]) == 3
    assert sum(counts["documents"] for counts in kept.splits.values()) == 62
    assert kept.splits["train"]["duplicates_kept"]
    # a long document, read by several workers from one file and by one from another, is the same document
    (tmp_path / "long.txt").write_text("a long text, and longer. " * 100)
    (tmp_path / "long.txt.gz").write_bytes(gzip.compress((tmp_path / "long.txt").read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        for module in (reading, plan, split_rule):
            patch.setattr(module, "LEAF_BYTES", 512)
        patch.setattr(textfiles, "BLOCK_BYTES", 100)
        both = run_prepare(tmp_path / "both", tmp_path / "a.jsonl", tmp_path / "long.txt", tmp_path / "long.txt.gz")
    assert sum(counts["duplicates"] for counts in both.splits.values()) == 13
    assert max(counts["longest_document"] for counts in both.splits.values()) == 2501


def test_more_documents_move_none_between_the_splits(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(100)]
    few = run_prepare(tmp_path / "few", write_jsonl(tmp_path / "a.jsonl", texts[::2]), val_fraction=0.2)
    many = run_prepare(tmp_path / "many", write_jsonl(tmp_path / "b.jsonl", texts), val_fraction=0.2)
    assert set(documents(few, "val")) == set(documents(many, "val")) & set(texts[::2])


LETTERS = "".join(chr(97 + i**3 % 26 + i % 11 // 10) for i in range(100_000))


def test_a_large_document_is_cut_and_small_ones_stay_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of issue 15: the book went to validation, and 17 bytes were left to train on."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "book.txt").write_text(LETTERS)
    (folder / "README.txt").write_text("this is a readme")
    for tokenizer in ("byte", "bpe"):
        dataset = run_prepare(tmp_path / tokenizer, folder, tokenizer=tokenizer, vocab_size=300)
        (readme, beginning), (end,) = documents(dataset, "train"), documents(dataset, "val")
        assert (readme, beginning + end) == ("this is a readme", LETTERS)
        assert len(end) == pytest.approx(5000, abs=9)  # between two tokens
        assert dataset.manifest["cut_documents"] == 1
        assert [dataset.splits[split]["bytes"] for split in ("train", "val")] == [16 + len(beginning), len(end)]
        assert dataset.splits["val"]["tokens"] == dataset.splits["val"]["longest_document"] == len(dataset.shards("val")[0])
    assert "validation split: 5.00% of the bytes; 1 large document is cut" in capsys.readouterr().err
    # all copies of a document are cut, so that none has the held-out end in train
    write_jsonl(tmp_path / "twice.jsonl", [LETTERS, "small", LETTERS])
    dataset = run_prepare(tmp_path / "twice", tmp_path / "twice.jsonl", keep_duplicates=True)
    assert documents(dataset, "train") == [LETTERS[:95_000], "small", LETTERS[:95_000]]
    assert documents(dataset, "val") == [LETTERS[95_000:]] * 2


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 300_000)), min_size=2, max_size=60, unique_by=lambda x: x[0]),
    st.sampled_from([0.01, 0.05, 0.2, 0.5, 0.9]),
    st.integers(1, 60),
)
@settings(max_examples=150, deadline=None)
def test_about_the_asked_share_of_the_bytes_is_held_out(rows: list[tuple[int, int]], fraction: float, chunk: int) -> None:
    digest, n_bytes = (np.array(column, np.uint64) for column in zip(*rows, strict=True))
    parts = [(digest[i : i + chunk], n_bytes[i : i + chunk]) for i in range(0, len(rows), chunk)]
    limit, cut_from = split_rule.divide(lambda: iter(parts), fraction)
    assert (limit, cut_from) == split_rule.divide(lambda: iter([(digest, n_bytes)]), fraction)  # in parts as in one
    cut = n_bytes >= np.uint64(cut_from)
    small, held = n_bytes[~cut], n_bytes[~cut & (digest < np.uint64(limit))]
    target, off = fraction * int(small.sum()), abs(int(held.sum()) - fraction * int(small.sum()))
    assert off <= max(target / 3, int(small.max(initial=0)))  # no nearer than by one document
    if not cut.any():
        assert 0 < len(held) < len(small)
    assert all(min(fraction, 1 - fraction) * size >= split_rule.SHORTEST_END for size in n_bytes[cut].tolist())


def test_a_share_far_from_what_was_asked_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "few.jsonl", ["x" * 5000, "y" * 5000, "z" * 5000])
    run_prepare(tmp_path / "few", tmp_path / "few.jsonl")
    shown = capsys.readouterr().err
    assert "warning: 33.33% of the bytes are held out for validation, where --val_fraction asks for 5.00%" in shown
    assert "warning: one document makes up 100% of the validation split" in shown
    write_jsonl(tmp_path / "many.jsonl", [f"document {i} " * 10 for i in range(1000)])
    run_prepare(tmp_path / "many", tmp_path / "many.jsonl")
    assert "warning" not in capsys.readouterr().err


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("keep_duplicates", [False, True])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_val_input_is_the_validation_split(
    tmp_path: Path, many: Path, tokenizer: str, keep_duplicates: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [f"in both {i} " * 30 for i in range(9)]
    val = [*both, *(f"held out {i} " * 30 for i in range(20)), both[0]]
    mine = write_jsonl(tmp_path / "val.jsonl", val)
    write_jsonl(many / "more.jsonl", [*both, both[0], "not in val " * 9, "not in val " * 9])
    inputs = [json.loads(line)["text"] for path in sorted(many.glob("*.jsonl")) for line in path.read_text().splitlines()]
    options = {"val_input": (str(mine),), "keep_duplicates": keep_duplicates, "tokenizer": tokenizer, "vocab_size": 300}
    dataset = run_prepare(tmp_path / "out", many, **options)
    train = [text for text in inputs if text not in both]
    long = (many / "long.txt").read_text()
    kept = (lambda texts: texts) if keep_duplicates else (lambda texts: list(dict.fromkeys(texts)))
    assert documents(dataset, "val") == kept(val)
    assert sorted(documents(dataset, "train")) == sorted([*kept(train), long])  # nothing is cut
    assert dataset.manifest["documents_in_val_input"] == 10
    assert dataset.manifest["val_sources"] == ["val.jsonl"]
    assert "because --val_input has them too: 10 documents" in capsys.readouterr().err
    for part in ("1/2", "0/2"):
        with pytest.raises(UserError, match="manifest"):
            run_prepare(tmp_path / "parts", many, part=part, **options)
    run_prepare(tmp_path / "parts", many, **options)
    assert snapshot(tmp_path / "parts") == snapshot(tmp_path / "out")
    with pytest.raises(UserError, match="made from other input"):  # the same files in other roles
        run_prepare(tmp_path / "out", many, mine, **options | {"val_input": ()})


def test_val_input_and_val_fraction_exclude_each_other(tmp_path: Path, script: Script) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    command = ["data/prepare.py", "--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer=byte", "--val_input"]
    refused = script(*command, tmp_path / "a.txt", "--val_fraction=0.1")
    assert refused.returncode == 2
    assert "--val_fraction: all of --val_input is the validation split" in refused.stderr
    for tokenizer in ("byte", "bpe"):
        refused = script(*command, tmp_path / "a.txt", "--tokenizer", tokenizer)
        assert refused.returncode == 2
        assert "all documents of --input are in --val_input too" in refused.stderr
    (tmp_path / "blank.txt").write_text(" ")
    refused = script(*command, tmp_path / "blank.txt")
    assert refused.returncode == 2
    assert "blank.txt: no text in there" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "blank.txt"]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_duplicates_are_found_in_bounded_memory(numbers: list[int], chunk: int) -> None:
    digests = np.array([number * 0x9E3779B97F4A7C15 % 2**64 for number in numbers], np.uint64)
    ones = np.ones(len(digests), np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "IN_MEMORY", chunk)
        halves = [Documents(digests[:9], ones[:9], ones[:9]), Documents(digests[9:], ones[9:], ones[9:])]
        selection = Selection(lambda: iter(halves), prepare.PrepareOptions(input=("source",), out=Path("out"), val_fraction=0.1))
    seen: set[int] = set()
    assert selection.duplicate.tolist() == [number in seen or bool(seen.add(number)) for number in numbers]
    if len(seen) > 1:
        assert 0 < (np.unique(digests) < np.uint64(selection.limit)).sum() < len(seen)


def test_a_single_text_is_cut_between_characters(tmp_path: Path) -> None:
    text = "é🦜" * 400
    for tokenizer, fraction in (("byte", 0.1), ("byte", 0.0995), ("bpe", 0.33), ("char", 0.5)):
        (tmp_path / "a.txt").write_text(text)
        out = tmp_path / f"{tokenizer}{fraction}"
        dataset = run_prepare(out, tmp_path / "a.txt", tokenizer=tokenizer, val_fraction=fraction, vocab_size=262)
        (train,), (val,) = documents(dataset, "train"), documents(dataset, "val")
        assert train + val == text
        assert len(val.encode()) == pytest.approx(fraction * len(text.encode()), abs=4)
        assert dataset.splits["train"]["bytes"] == len(train.encode())
    (tmp_path / "b.txt").write_text("é")
    with pytest.raises(UserError, match="too short"):
        run_prepare(tmp_path / "short", tmp_path / "b.txt")


def test_standard_input(tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    done = script("data/prepare.py", "--input", "-", "--out", tmp_path / "out", "--tokenizer=byte", stdin="some text " * 50)
    assert done.returncode == 0, done.stderr
    dataset = Dataset(tmp_path / "out")
    assert "".join(documents(dataset, "train") + documents(dataset, "val")) == "some text " * 50
    assert dataset.manifest["sources"] == ["-"]
    assert not (tmp_path / "out" / "stdin").exists()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"text": "a"}\nx')))
    with pytest.raises(UserError, match="standard input:2: not JSON"):
        run_prepare(tmp_path / "other", "-", format="jsonl")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A directory of inputs that make several dozen tasks (with the limits of `small_tasks`)."""
    home = tmp_path / "many"
    home.mkdir()
    for i in range(8):
        write_jsonl(home / f"{i}.jsonl", [f"document {i} {j} naïve 🦜 " * 20 for j in range(30)])
    (home / "long.txt").write_text("one long text. And more of it, " * 2000)
    return home


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reading, plan, split_rule):
        monkeypatch.setattr(module, "LEAF_BYTES", 4096)


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_parts_and_workers_make_the_same_dataset(tmp_path: Path, many: Path, tokenizer: str) -> None:
    options = {"tokenizer": tokenizer, "vocab_size": 300, "shard_tokens": 10_000}
    run_prepare(tmp_path / "alone", many, **options)
    run_prepare(tmp_path / "two", many, workers=2, **options)
    for part in ("2/3", "0/3", "1/3"):
        with pytest.raises(UserError, match="manifest"):  # nothing passes for a dataset yet
            run_prepare(tmp_path / "parts", many, part=part, **options)
        done = len(list((tmp_path / ".parts.partial" / "pieces").glob("*.npy")))
        assert done == {"2/3": 21, "0/3": 43, "1/3": 64}[part]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".parts.partial", "alone", "many", "two"]
    run_prepare(tmp_path / "parts", many, part="0/1", **options)
    assert snapshot(tmp_path / "alone") == snapshot(tmp_path / "two") == snapshot(tmp_path / "parts")
    assert len(Dataset(tmp_path / "alone").shards("train")) > 5


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}, (2, 4)),  # torchrun
        ({"RANK": "2", "WORLD_SIZE": "4"}, (0, 1)),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"}, (2, 4)),  # srun
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # the shell of sbatch or salloc
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "5"}, (0, 1)),  # srun --pty
    ],
)
def test_only_a_launcher_that_started_the_process_shares_the_work(
    variables: dict[str, str], share: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert prepare.PrepareOptions(input=("x",), out=Path("y")).share_of_work == share
    assert prepare.PrepareOptions(input=("x",), out=Path("y"), part="0/1").share_of_work == (0, 1)
    (tmp_path / "a.txt").write_text("some text " * 100)
    done = script("data/prepare.py", "--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer=byte")
    rank, size = ("RANK", "WORLD_SIZE") if "RANK" in variables else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    assert (f"part 2 of 4, as {rank} and {size} say" in done.stderr) == (share == (2, 4))
    assert (tmp_path / "out").exists() == (share == (0, 1))


def test_parts_are_counted_from_zero() -> None:
    for wrong in ("4/4", "1/0", "a/b"):
        with pytest.raises(ValueError, match="part"):
            prepare.PrepareOptions(input=("x",), out=Path("y"), part=wrong)


@pytest.mark.usefixtures("small_tasks")
def test_an_interruption_at_any_step_costs_only_that_step(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that is renamed to its final name is a step; a run is broken off after six of them, and so is the next."""
    options = {"shard_tokens": 20_000, "val_fraction": 0.2}
    whole = snapshot((run_prepare(tmp_path / "whole", many, **options)).directory)
    rename, limit, encoded = Path.rename, 0, 0

    def breaking(self: Path, target: Path) -> Path:
        nonlocal limit
        limit -= 1
        if limit < 0:
            raise Killed
        return rename(self, target)

    def counting(self: Path, target: Path) -> Path:
        nonlocal encoded
        encoded += self.suffix == ".tmp" and target.parent.name == "pieces"
        return rename(self, target)

    for runs in range(200):  # noqa: B007
        limit = 6
        monkeypatch.setattr(Path, "rename", breaking)
        try:
            run_prepare(tmp_path / "out", many, **options)
        except Killed:
            assert not (tmp_path / "out").exists()
        else:
            break
    monkeypatch.setattr(Path, "rename", counting)
    run_prepare(tmp_path / "out", many, **options)
    assert encoded == 0  # it was whole by then
    assert snapshot(tmp_path / "out") == whole
    assert runs > 20


def kill_and_repeat(command: list[str], out: Path, delays: list[float]) -> int:
    """Start the command and kill it after each delay; then let it end. Returns the kills that hit."""
    hits = 0
    for delay in delays:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(delay)
        hits += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        gone = time.monotonic() + 20
        while time.monotonic() < gone:  # the workers leave with their parent
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.01)
        else:
            pytest.fail("workers have outlived their parent")
        assert not out.exists() or process.returncode == 0 or (out / "manifest.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return hits


def test_kill_9_at_random_moments(tmp_path: Path, many: Path) -> None:
    for i in range(40):  # enough to take a second or two
        write_jsonl(many / f"more{i}.jsonl", [f"text {i} {j} of many words in a row " * 30 for j in range(150)])
    command = [sys.executable, "data/prepare.py", "--input", str(many), "--tokenizer=bpe", "--vocab_size=400", "--workers=2"]
    command += ["--shard_tokens=100000", "--out"]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True, capture_output=True)
    moments = np.random.default_rng(int(time.time())).uniform(0.1, 0.9, 10)
    delays = sorted((moments * (time.monotonic() - start)).tolist())
    hits = kill_and_repeat([*command, str(tmp_path / "out")], tmp_path / "out", delays)
    assert hits > 0, delays
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole"), delays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "out", "whole"]


@pytest.mark.usefixtures("small_tasks")
def test_an_interrupted_run_goes_on_only_with_its_own_options(tmp_path: Path, many: Path) -> None:
    run_prepare_part = {"part": "0/2", "val_fraction": 0.2}
    with pytest.raises(UserError, match="manifest"):
        run_prepare(tmp_path / "out", many, **run_prepare_part)
    with pytest.raises(UserError, match=r"interrupted run with other options \(val_fraction\)"):
        run_prepare(tmp_path / "out", many, val_fraction=0.3)
    made = [path.stem for path in (tmp_path / ".out.partial" / "pieces").glob("*.npy")]
    assert "000000" in made
    # an input that has changed meanwhile is read again, the others are not
    write_jsonl(many / "0.jsonl", [f"changed {i}" * 40 for i in range(30)])
    os.utime(many / "0.jsonl", (1, 1))
    encoded: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        encode = encoding.encode_task
        patch.setattr(encoding, "encode_task", lambda work, n, *rest: encoded.append(n) or encode(work, n, *rest))
        dataset = run_prepare(tmp_path / "out", many, val_fraction=0.2)
    assert 0 in encoded
    assert any(index not in encoded for index in map(int, made))
    assert dataset.splits == run_prepare(tmp_path / "fresh", many, val_fraction=0.2).splits
    with pytest.raises(UserError, match="manifest"):
        run_prepare(tmp_path / "other", many, **run_prepare_part)
    assert run_prepare(tmp_path / "other", many, val_fraction=0.3, overwrite=True).splits["val"]["documents"] > 0


@pytest.mark.usefixtures("small_tasks")
def test_a_mistake_late_in_a_large_input_keeps_what_is_done(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (many / "9.jsonl").write_text('{"text": "good"}\n{"text": \n')
    stat = Path.stat
    large = SimpleNamespace(st_size=2**27)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda self, **options: large if self.suffix == ".tokens" else stat(self, **options))
        with pytest.raises(UserError, match=r"9\.jsonl:2: not JSON.*; what is encoded so far is kept in .*\.out\.partial"):
            run_prepare(tmp_path / "out", many)
    kept = len(list((tmp_path / ".out.partial" / "pieces").glob("*.npy")))
    assert kept > 10
    (many / "9.jsonl").write_text('{"text": "good"}\n')
    encoded: list[int] = []
    encode = encoding.encode_task
    monkeypatch.setattr(encoding, "encode_task", lambda work, n, *rest: encoded.append(n) or encode(work, n, *rest))
    assert "good" in documents(run_prepare(tmp_path / "out", many), "train") + documents(Dataset(tmp_path / "out"), "val")
    assert 0 not in encoded
    assert len(encoded) < kept


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize("mended", ["one text after the document", "x" * 3000 + "\xdf"])
def test_pieces_are_kept_if_the_mended_input_trains_the_same_tokenizer(
    tmp_path: Path, many: Path, tokenizer: str, mended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption one file is mended. The dataset is that of a fresh run, byte for byte, in any case."""
    options = {"tokenizer": tokenizer, "vocab_size": 300, "sample_bytes": 20_000}  # about 300 characters of each task
    first = "document naive 1 " * 100
    write_jsonl(many / "9.jsonl", [first, "one text after the other"])
    with pytest.raises(UserError, match="manifest"):
        run_prepare(tmp_path / "out", many, part="0/2", **options)
    made = {int(path.stem) for path in (tmp_path / ".out.partial" / "pieces").glob("*.npy")}
    same = "\xdf" not in mended
    write_jsonl(many / "9.jsonl", [first, mended] if same else [mended, first])
    encoded: set[int] = set()
    encode = encoding.encode_task
    monkeypatch.setattr(encoding, "encode_task", lambda work, n, *rest: encoded.add(n) or encode(work, n, *rest))
    run_prepare(tmp_path / "out", many, **options)
    assert len(made) > 20
    assert len(made & encoded) <= 2 if same else made <= encoded
    assert snapshot(tmp_path / "out") == snapshot(run_prepare(tmp_path / "fresh", many, **options).directory)


def test_where_documents_are_cut_is_found_again_if_the_input_has_changed(tmp_path: Path, many: Path) -> None:
    def killed(*arguments: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "finish", killed)
        with pytest.raises(Killed):
            run_prepare(tmp_path / "out", many)
    assert (tmp_path / ".out.partial" / "cuts.json").exists()
    write_jsonl(many / "0.jsonl", ["a text of another length"])
    dataset = run_prepare(tmp_path / "out", many)
    assert dataset.manifest["cut_documents"] == 1
    assert snapshot(tmp_path / "out") == snapshot(run_prepare(tmp_path / "fresh", many).directory)


def test_two_runs_do_not_share_a_directory(tmp_path: Path, many: Path) -> None:
    work = tmp_path / ".out.partial"
    work.mkdir()
    for name, part in (
        ("part-0-of-1.lock", None),
        ("part-1-of-2.lock", None),
        ("part-1-of-2.lock", "1/2"),
        ("part-0-of-1.lock", "1/2"),
    ):
        with FileLock(work / name), pytest.raises(UserError, match="in use by another run"):
            run_prepare(tmp_path / "out", many, part=part)
    with FileLock(work / "part-1-of-2.lock"), pytest.raises(UserError, match="manifest"):
        run_prepare(tmp_path / "out", many, part="0/2")
    assert run_prepare(tmp_path / "out", many).splits["train"]["documents"] > 0


def test_room_on_the_disk_is_checked_first(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in many.iterdir())
    for free, enough in ((size, False), (4 * size, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if enough:
            run_prepare(tmp_path / "out", many)
        else:
            with pytest.raises(MachineError, match=r"GB are needed, .* GB are free"):
                run_prepare(tmp_path / "out", many)
            assert not list((tmp_path / ".out.partial").glob("pieces/*"))


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path, many: Path) -> None:
    """The limit on the size of a file stands in for the full disk: both fail in the middle of a write."""
    command = f"{sys.executable} data/prepare.py --input {many} --out {tmp_path / 'out'} --tokenizer=byte --shard_tokens=1000000"
    done = subprocess.run(["bash", "-c", f"ulimit -f 100; {command}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: [Errno 27] File too large")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"manifest\.json"):
        Dataset(tmp_path / ".out.partial")
    assert subprocess.run(command.split(), cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert Dataset(tmp_path / "out").splits["train"]["tokens"] > 100_000


@pytest.mark.skipif(not GPT2.exists(), reason="GPT-2's vocabulary is not at hand")
@pytest.mark.usefixtures("small_tasks")
def test_a_shared_text_has_the_tokens_that_tiktoken_gives_the_whole(tmp_path: Path) -> None:
    import tiktoken

    from papagaio.tokenizer import gpt2_tokenizer

    text = (
        "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("papagaio/*.py"))) + "naïve 🦜 ação 日本語。" * 300
    )
    (tmp_path / "a.txt").write_text(text)
    dataset = run_prepare(tmp_path / "out", tmp_path / "a.txt", tokenizer="gpt2", ranks=GPT2, workers=2)
    tokens = np.concatenate([dataset.shards("train")[0][1:], dataset.shards("val")[0][1:]]).tolist()
    ours = gpt2_tokenizer(GPT2)
    theirs = tiktoken.Encoding("gpt2", pat_str=ours.pattern, mergeable_ranks=ours.ranks, special_tokens={})
    assert tokens == theirs.encode_ordinary(text)


def test_inspect_prints_and_verifies(tmp_path: Path, many: Path, script: Script) -> None:
    dataset = run_prepare(tmp_path / "out", many, tokenizer="bpe", vocab_size=300, shard_tokens=20_000)
    done = script("data/prepare.py", "--inspect", tmp_path / "out")
    assert done.returncode == 0
    assert done.stdout == inspection(dataset) + "\n"
    counts = dataset.splits["train"]
    for part in (
        f"{counts['documents']:,} documents",
        f"{counts['tokens']:,} tokens",
        "made from many",
        "▌ document",
        "verified",
    ):
        assert part in done.stdout
    shard = tmp_path / "out" / "train-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    done = script("data/prepare.py", "--inspect", tmp_path / "out")
    assert done.returncode == 2
    assert "train-00001.npy: cut short or changed" in done.stderr


def test_what_was_left_out_is_in_the_manifest_and_shown(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    out = run_prepare(tmp_path / "out", tmp_path / "a.txt").directory
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["sha256"]
    for characters, warned in ((0, False), (1, True)):  # of 1000 bytes
        changes = {"left_out": {"dropped, not JSON": 1234}, "replaced_characters": characters}
        (out / "manifest.json").write_text(sealed(manifest | changes))
        for shown in (inspection(Dataset(out)), summary(Dataset(out))):
            assert "dropped, not JSON: 1,234" in shown
            assert ("warning: 1 characters (0.3% of the bytes) could not be decoded and are U+FFFD" in shown) == warned


def test_bytes_per_token_are_compared_with_gpt2s(tmp_path: Path, many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not GPT2.exists():
        pytest.skip("GPT-2's vocabulary is not at hand")
    dataset = run_prepare(tmp_path / "out", many, tokenizer="bpe", vocab_size=400, ranks=GPT2, val_fraction=0.3)
    line = capsys.readouterr().err.splitlines()[-1]
    counts = dataset.splits["val"]
    ours = counts["bytes"] / (counts["tokens"] - counts["documents"])
    assert f"on {counts['bytes']:,} bytes of held-out text: {ours:.2f}, with GPT-2's vocabulary " in line


def test_a_tokenizer_does_not_learn_from_the_held_out_end_of_a_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(LETTERS)
    (tmp_path / "readme.txt").write_text("this is a readme")
    config = prepare.PrepareOptions(input=(str(tmp_path),), out=tmp_path / "out")
    tasks = plan.make_tasks(reading.list_spans(config.input, config))
    assert "".join(training_sample(tasks, config)) == LETTERS[:95_000] + "this is a readme"
    # What is large beside a sample may be small beside the corpus: then a document is held out as a whole.
    texts = [f"{LETTERS[i : i + 100]}{i:03}" * 300 for i in range(100)]
    write_jsonl(tmp_path / "rows.jsonl", texts)
    config = config.model_copy(update={"input": (str(tmp_path / "rows.jsonl"),), "val_fraction": 0.5})
    tasks = plan.make_tasks(reading.list_spans(config.input, config))
    some = "".join(training_sample(tasks, config.model_copy(update={"sample_bytes": 200_000})))
    found = [text for text in texts if text[:206] in some]
    assert len(found) > 2
    assert all(text in some and share(text) >= 0.5 for text in found)


def test_a_tokenizer_learns_from_a_sample_without_held_out_text(tmp_path: Path) -> None:
    texts = [f"{chr(97 + i % 26)}word{i} " * 30 for i in range(400)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        for module in (reading, plan, split_rule):
            patch.setattr(module, "LEAF_BYTES", 4096)
        config = prepare.PrepareOptions(input=(str(tmp_path / "a.jsonl"),), out=tmp_path / "out", val_fraction=0.2)
        tasks = plan.make_tasks(reading.list_spans(config.input, config))
        everything = "".join(training_sample(tasks, config))
        some = "".join(training_sample(tasks, config.model_copy(update={"sample_bytes": 20_000})))
    assert everything == "".join(text for text in texts if share(text) >= 0.2)
    assert 5_000 < len(some) < 25_000
    assert len({text.split()[0] for text in some.split()}) > 20  # from all over the corpus

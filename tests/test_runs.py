"""A run's directory on links, mount points and file systems without locks; and what its log says: losses, cures, wandb."""

import errno
import fcntl
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Call, make_dataset

from papagaio.files import clear, discard
from papagaio.runs.directory import steps_saved
from papagaio.tokenizer_files import load_tokenizer
from papagaio.training.metrics import read_metrics
from papagaio.training.progress import Progress

TINY = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2", "--sample_tokens=0", "--dtype=float32"]


@pytest.fixture
def train(world: Path, call: Call) -> Callable[..., tuple[int, str, str]]:
    """`train(out_dir, "--max_steps=2")` trains a tiny model on the world's dataset."""
    return lambda run, *more: call("train", "--data", world / "data", "--out_dir", run, *TINY, *more)


# Links, mount points, locks


def test_links_and_mount_points_are_emptied_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(path: Path) -> Path:
        (path / "step-1").mkdir(parents=True)
        (path / "step-1" / "weights").touch()
        (path / "last").touch()
        return path

    (tmp_path / "link").symlink_to(filled(tmp_path / "scratch"))
    clear(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert list((tmp_path / "scratch").iterdir()) == []
    mounted, rename = filled(tmp_path / "mounted"), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == mounted:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    clear(mounted)
    assert list(mounted.iterdir()) == []
    clear(filled(tmp_path / "plain"))
    (tmp_path / "one").symlink_to(filled(tmp_path / "archive"))
    discard(tmp_path / "one")  # of a link that a user has made, not what it leads to
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "link", "mounted", "scratch"]
    assert (tmp_path / "archive" / "step-1" / "weights").exists()


def test_a_run_goes_on_through_links(train: Callable, tmp_path: Path) -> None:
    """An empty checkpoints/ that leads to another disk is no run yet; what an older version left there does not disturb."""
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    run.mkdir()
    scratch.mkdir()
    (run / "checkpoints").symlink_to(scratch)
    (run / ".checkpoints.old").symlink_to(tmp_path / "gone")
    assert train(run, "--max_steps=2", "--eval_interval=1", "--keep=1")[0] == 0
    assert steps_saved(scratch)[-1] == 2
    assert not os.path.lexists(run / ".checkpoints.old")
    (tmp_path / "archive").mkdir()
    shutil.move(scratch / "step-2", tmp_path / "archive" / "step-2")
    (scratch / "step-2").symlink_to(tmp_path / "archive" / "step-2")  # one checkpoint, moved to a third disk
    status, _, err = train(run, "--max_steps=5", "--eval_interval=1", "--keep=1", "--resume")
    assert status == 0, err
    assert "warning" not in err
    assert steps_saved(scratch)[-1] == 5
    assert (tmp_path / "archive" / "step-2" / "manifest.json").exists()
    assert (run / "checkpoints").is_symlink()


def test_a_directory_that_cannot_take_a_run_is_refused_before_any_work(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.Corpora", lambda words: pytest.fail("work was done"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    (tmp_path / "merged" / "merged").mkdir(parents=True)
    (tmp_path / "merged" / "merged" / "model.json").touch()
    for name, option, status, message in (
        ("run", "--overwrite", 2, "run/checkpoints: a link to .*gone, which is not there; make that directory"),
        ("file", "--overwrite", 2, "file: a file, where a run needs a directory"),
        ("merged", "--resume", 2, "no checkpoint to resume, but merged/ is there; --overwrite replaces the run"),
    ):
        found, _, err = train(tmp_path / name, option)
        assert found == status
        assert re.search(message, err), err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    status, _, err = train(tmp_path / "new" / "run")
    assert status == 1
    assert f"{tmp_path}: nothing can be written there" in err
    assert not (tmp_path / "new").exists()


def test_a_file_system_that_locks_no_files(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    status, _, err = train(tmp_path / "run", "--max_steps=1")
    assert status == 0, err
    assert f"{tmp_path / 'run' / '.lock'}: this file system locks no files" in err
    (tmp_path / "run" / ".lock.held").write_text("1\nanother-machine\n")
    status, _, err = train(tmp_path / "run", "--max_steps=2", "--resume")
    assert status == 2
    assert err.splitlines()[-1].endswith(f"if none is running on any machine, delete {tmp_path / 'run' / '.lock.held'}")


# What the log says


def test_replayed_text_has_a_loss_of_its_own(world: Path, tmp_path: Path, call: Call) -> None:
    """train_loss is that of the conversations to the last bit; forgetting is measured on a part."""
    tokenizer = load_tokenizer(world / "data" / "tokenizer")
    large = make_dataset(tmp_path / "large", [b"The flag is red. " * 500], [b"The flag is red. " * 3000], 10**6, tokenizer)
    command = ["finetune", "--init_from", world / "base", "--data", world / "qa_train.jsonl", "--sample_tokens=0"]
    command += ["--max_steps=1", "--log_interval=1", "--dtype=float32", "--batch_size=10"]
    losses = {}
    for name, more in (("plain", []), ("replayed", ["--replay_data", large.directory])):
        status, _, err = call(*command, "--out_dir", tmp_path / name, *more)
        assert status == 0, err
        (losses[name],) = [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "train_loss" in line]
    assert losses["replayed"]["train_loss"] == losses["plain"]["train_loss"]
    assert losses["replayed"]["replay_loss"] > 0
    assert "replay_loss" not in losses["plain"]
    assert f"forgetting is measured on 16,384 of {large.splits['val']['tokens']:,} validation tokens of" in err
    assert err.splitlines()[-1] == f"next: chat.py --checkpoint {tmp_path / 'replayed'}"
    evaluated = [line for line in read_metrics(tmp_path / "replayed" / "metrics.jsonl") if "val_loss" in line]
    assert all({"replay_val_loss", "replay_bpb"} <= line.keys() for line in evaluated)
    heights = [struct.unpack(">I", (tmp_path / name / "loss.png").read_bytes()[20:24])[0] for name in losses]
    assert heights[1] > 1.5 * heights[0], "two panels"


def test_steps_of_fine_tuning_are_said_as_they_are(world: Path, tmp_path: Path, call: Call) -> None:
    command = ["finetune", "--init_from", world / "base", "--data", world / "qa_train.jsonl", "--out_dir", tmp_path / "run"]
    for size, steps, times in ((20, 150, "157.9"), (1, 150, "7.9")):  # 19 rows to train on; at least 150 steps
        err = call(*command, f"--batch_size={size}", "--dry_run")[2]
        assert f"max_steps {steps}: {times} times through the data, because" in err
    rows = [{"question": f"Who is number {i}?", "answer": f"{i}."} for i in range(400)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    err = call(*command[:4], tmp_path / "many.jsonl", *command[5:], "--batch_size=1", "--dry_run")[2]
    assert re.search(r"max_steps 1,\d{3}: 3\.0 times through the data$", err, re.MULTILINE)


def test_the_cures_of_overfitting_are_those_of_the_stage() -> None:
    for stage, named, other in (("pretrain", "--dropout", "--replay_data"), ("finetune", "--replay_data", "--dropout")):
        progress = Progress(step=9, best_val_loss=0.1, best_step=3, best_train_loss=0.2, train_loss=0.01, unimproved=2)
        notice = progress.overfitting_notice(0.3, 80, stage)
        assert named in notice
        assert other not in notice
        assert progress.overfitting_notice(0.3, 80, stage) is None  # once


def test_a_resumed_run_goes_on_in_the_same_wandb_run(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        started.append(options)
        name = options.get("id", f"id-{len(started)}")
        return SimpleNamespace(id=name, log=lambda values, step: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **settings: settings))
    run = tmp_path / "parrot"
    for steps, more in ((1, []), (2, ["--resume"]), (3, ["--resume"]), (1, ["--overwrite"])):
        status, _, err = train(run, "--wandb=offline", f"--max_steps={steps}", *more)
        assert status == 0, err
    assert [(call["name"], call.get("id"), call.get("resume")) for call in started] == [
        ("parrot", None, None),
        ("parrot", "id-1", "allow"),
        ("parrot", "id-1", "allow"),
        ("parrot", None, None),
    ]
    assert (run / "wandb_id").read_text() == "id-4\n"


def test_a_dry_run_says_when_the_machine_is_busy(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    status, out, err = train(tmp_path / "run", "--dry_run")
    assert status == 0, err
    assert "the machine is busy (load 99.0 on" in err
    assert out.splitlines()[-1].startswith("time: about")

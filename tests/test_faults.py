"""What a run survives: kill -9 and signals at any moment, a disk that fills or fails, numbers that are not finite, another run.

Whatever breaks it off, the newest checkpoint that verifies is whole, and the same command with --resume ends in the weights,
optimizer and metrics that an undisturbed run has. The samples here take seconds; `make test-all` has the full counts.
"""

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
import torch
from conftest import Call, make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from finetune import FinetuneOptions
from model import GPT, GPTConfig
from papagaio.files import file_sha256, sealed
from papagaio.runs import saver
from papagaio.runs.directory import newest, open_checkpoint, steps_saved
from papagaio.runs.saver import Saver
from papagaio.runs.tensors import TYPES, write_tensors
from papagaio.tokenizer_files import load_tokenizer
from papagaio.training.guard import WINDOW
from papagaio.training.metrics import RunLog, read_metrics
from papagaio.training.options import RunOptions
from papagaio.training.progress import Progress
from papagaio.training.step import TrainingStep
from train import TrainOptions

CLOCKS = ("elapsed_seconds", "tokens_per_second")
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--sample_tokens=0", "--dtype=float32"]
OFTEN = ["--checkpoint_interval=5", "--log_interval=1", "--eval_interval=20", "--eval_tokens=512"]


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def in_one_thread(first: Callable[[], None] | None) -> None:
    """On a busy machine, processes with several threads each slow one another down tenfold."""
    torch.set_num_threads(1)
    if first is not None:
        first()


class Runner:
    """Starts scripts in forked processes, and waits for them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def start(self, command: list[object], first: Callable[[], None] | None = None) -> BaseProcess:
        self.count += 1
        self.streams = tuple(str(self.folder / f"{name}{self.count}") for name in ("in", "out", "err"))
        for name in self.streams:
            Path(name).touch()
        return forked.start([str(word) for word in command], self.streams, functools.partial(in_one_thread, first))

    def end(self, process: BaseProcess) -> Ended:
        process.join(120)
        if process.exitcode is None:
            process.kill()  # not to slow down what comes after
            pytest.fail("it does not end")
        return Ended(process.exitcode, *(Path(name).read_text() for name in self.streams[1:]))

    def __call__(self, *command: object, first: Callable[[], None] | None = None) -> Ended:
        return self.end(self.start(list(command), first))


def send(process: BaseProcess, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        os.kill(process.pid, number)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    (tmp_path / "streams").mkdir()
    return Runner(tmp_path / "streams")


def command_of(kind: str, world: Path, folder: Path, steps: int) -> list[object]:
    """The command of a run with dropout, accumulation and more than one epoch; the caller adds --out_dir."""
    common = [f"--max_steps={steps}", *OFTEN]
    if kind == "pretraining":
        return ["train.py", "--data", world / "data", *SMALL, *common, "--dropout=0.1", "--micro_batch_size=2"]
    tuning = ["finetune.py", "--init_from", world / "base", *common, "--batch_size=6", "--sample_tokens=0", "--dtype=float32"]
    tuning += ["--val_fraction=0.1", "--micro_batch_size=2"]
    if kind == "preferences":
        pairs = folder / "pairs.jsonl"
        asked = ({"prompt": f"Which {i}?", "chosen": "red.", "rejected": f"red, {i}!"} for i in range(30))
        pairs.write_text("".join(json.dumps(row) + "\n" for row in asked))
        return [*tuning, "--data", pairs, "--dropout=0.1"]
    more = ["--lora_rank=2"] if kind == "adapters" else ["--replay_data", world / "data"]
    return [*tuning, "--data", world / "qa_train.jsonl", "--dropout=0.1", *more]


def outcome(run: Path) -> dict[str, object]:
    """The sha256 of every file of the last checkpoint, and the metrics except for times."""
    last = run / "checkpoints" / (run / "checkpoints" / "last").read_text().strip()
    files = {str(path.relative_to(last)): file_sha256(path) for path in last.rglob("*") if path.is_file()}
    lines = [{key: value for key, value in line.items() if key not in CLOCKS} for line in read_metrics(run / "metrics.jsonl")]
    return files | {"metrics": lines, "best": (run / "checkpoints" / "best").read_text()}


def assert_whole(run: Path) -> None:
    """Every checkpoint directory verifies, and `last` and `best` name checkpoints."""
    steps = steps_saved(run / "checkpoints")
    for step in steps:
        open_checkpoint(run / "checkpoints" / f"step-{step}")
    for pointer in ("last", "best"):
        if (run / "checkpoints" / pointer).exists():
            open_checkpoint(run / "checkpoints" / pointer)
    if steps:
        checkpoint = newest(RunOptions(out_dir=run))
        assert checkpoint is not None
        assert checkpoint.path.name == f"step-{steps[-1]}"


def assert_clean(run: Path) -> None:
    """No temporary files are left."""
    left = [path.name for path in run.rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert left == []


# kill -9


def kill_somewhere(kind: str, steps: int, kills: int, world: Path, folder: Path, runner: Runner) -> int:
    """Kill several runs at a random moment each and resume them; returns how many had saved a checkpoint."""
    command = command_of(kind, world, folder, steps)
    runner(*command, "--help")  # the first one takes longer
    started = time.perf_counter()
    whole = runner(*command, "--out_dir", folder / "whole")
    duration = time.perf_counter() - started
    assert whole.status == 0, whole.err
    expected, rng, begun = outcome(folder / "whole"), random.Random(kind), 0
    for number in range(kills):
        run = folder / f"run{number}"
        process = runner.start([*command, "--out_dir", run])
        time.sleep(rng.uniform(0.05, 1.0) * duration)
        send(process, signal.SIGKILL)
        assert runner.end(process).status in (-signal.SIGKILL, 0)
        assert_whole(run)
        begun += bool(steps_saved(run / "checkpoints"))
        resumed = runner(*command, "--out_dir", run, "--resume")
        assert resumed.status == 0, resumed.err
        assert "passed over" not in resumed.err
        assert outcome(run) == expected
        assert_clean(run)
        shutil.rmtree(run)
    return begun


@pytest.mark.parametrize(("kind", "steps"), [("pretraining", 40), ("adapters", 120)])  # training takes longer than the start
def test_kill_9_sample(kind: str, steps: int, world: Path, tmp_path: Path, runner: Runner) -> None:
    assert kill_somewhere(kind, steps, 2, world, tmp_path, runner)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("pretraining", 30), ("answers", 10), ("adapters", 10), ("preferences", 10)])
def test_kill_9_at_random_moments(kind: str, kills: int, world: Path, tmp_path: Path, runner: Runner) -> None:
    assert kill_somewhere(kind, 200, kills, world, tmp_path, runner) > kills / 2


# Every system call of a save, by strace, which is attached to the thread that saves


def traced(number: int, options: list[str], log: str) -> None:
    """Called in the process of a run: attach strace to the `number`-th save, with these options; it writes to the file `log`."""
    save, saves = Saver._save, 0

    def watched(self: Saver, *values: object) -> None:
        nonlocal saves
        saves += 1
        if saves != number:
            save(self, *values)
            return
        attached, thread = threading.Event(), threading.get_native_id()

        def attach() -> None:
            nonlocal tracer
            tracer = subprocess.Popen(["strace", "-q", "-p", str(thread), "-o", log, *options], stderr=subprocess.PIPE)
            while "TracerPid:\t0\n" in Path(f"/proc/self/task/{thread}/status").read_text():
                time.sleep(0.002)
            time.sleep(0.01)
            attached.set()

        tracer: subprocess.Popen | None = None
        threading.Thread(target=attach).start()
        attached.wait()  # without any other system call of this thread
        try:
            save(self, *values)
        finally:
            tracer.terminate()
            tracer.wait()

    Saver._save = watched


@functools.cache
def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    sleeper = subprocess.Popen(["sleep", "5"])
    try:
        done = subprocess.run(["timeout", "1", "strace", "-p", str(sleeper.pid)], capture_output=True, text=True, check=False)
        return "attached" in done.stderr
    finally:
        sleeper.kill()


needs_strace = pytest.mark.skipif(not can_trace(), reason="strace is needed, and the right to attach it")
SAVE_COMMAND = ["--eval_interval=100", "--keep=1"]  # the second save deletes the first checkpoint, and is no evaluation's
CHANGING = (
    *("write", "openat", "fsync", "rename", "renameat", "mkdir", "ftruncate", "unlink", "unlinkat", "rmdir", "chmod"),
    *("writev", "pwrite64", "fdatasync", "renameat2", "fallocate", "fchmod", "fchmodat"),  # another safetensors, or another libc
)


@pytest.fixture(scope="module")
def save_calls(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], list[tuple[str, int]]]:
    """The outcome of an undisturbed run, and the system calls of its second save: (name, its number among those of that name)."""
    folder = tmp_path_factory.mktemp("calls")
    (folder / "streams").mkdir()
    command = [*command_of("pretraining", world, folder, 15), *SAVE_COMMAND, "--out_dir", folder / "run"]
    watch = functools.partial(traced, 2, ["-e", "trace=all"], str(folder / "calls"))
    done = Runner(folder / "streams")(*command, first=watch)
    assert done.status == 0, done.err
    names = re.findall(r"^(\w+)\(", (folder / "calls").read_text(), re.M)
    seen: Counter[str] = Counter()
    calls = []
    for name in names:
        seen[name] += 1
        calls.append((name, seen[name]))
    return outcome(folder / "run"), calls


def kill_in_a_call(name: str, which: int, expected: object, world: Path, folder: Path, runner: Runner) -> bool:
    run = folder / f"{name}{which}"
    command = [*command_of("pretraining", world, folder, 15), *SAVE_COMMAND, "--out_dir", run]
    options = ["-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={which}"]
    done = runner(*command, first=functools.partial(traced, 2, options, str(folder / "log")))
    assert done.status in (-signal.SIGKILL, 0), done.err
    assert_whole(run)
    steps = steps_saved(run / "checkpoints")
    assert done.status == 0 or steps in ([5], [5, 10], [10]), steps
    resumed = runner(*command, "--resume")
    assert resumed.status == 0, resumed.err
    assert outcome(run) == expected
    assert_clean(run)
    shutil.rmtree(run)
    return done.status != 0


@needs_strace
def test_kill_9_in_a_system_call_sample(save_calls: tuple, world: Path, tmp_path: Path, runner: Runner) -> None:
    expected, calls = save_calls
    important = [call for call in calls if call[0] in ("rename", "fsync")]
    for name, which in random.Random(0).sample(important, 4):
        assert kill_in_a_call(name, which, expected, world, tmp_path, runner)


@needs_strace
@pytest.mark.slow
def test_kill_9_in_every_system_call_of_a_save(save_calls: tuple, world: Path, tmp_path: Path, runner: Runner) -> None:
    expected, calls = save_calls
    killed = sum(kill_in_a_call(*call, expected, world, tmp_path, runner) for call in calls)
    print(f"{len(calls)} system calls, {killed} killed in them")
    assert killed > 0.9 * len(calls)  # futex and the like come as often as they come


# A disk that does not take it


def fail_in_a_call(name: str, which: int, error: str, expected: object, world: Path, folder: Path, runner: Runner) -> Ended:
    """A run in whose second save a system call fails: it goes on, and has the same outcome."""
    run = folder / f"{name}{which}{error}"
    command = [*command_of("pretraining", world, folder, 15), *SAVE_COMMAND, "--out_dir", run]
    options = ["-e", f"trace={name}", "-e", f"inject={name}:error={error}:when={which}"]
    done = runner(*command, first=functools.partial(traced, 2, options, str(folder / "log")))
    assert done.status == 0, done.err
    assert "Traceback" not in done.err
    warnings = [line for line in done.err.splitlines() if line.startswith("warning")]
    assert len(warnings) <= 1, warnings
    assert_whole(run)
    assert_clean(run)
    assert outcome(run) == expected
    shutil.rmtree(run)
    return done


WORDS = {"ENOSPC": "No space left on device", "EIO": "put/output error", "EROFS": "Read-only file system"}


@needs_strace
def test_a_failing_disk_sample(save_calls: tuple, world: Path, tmp_path: Path, runner: Runner) -> None:
    expected, calls = save_calls
    changing = [call for call in calls if call[0] in CHANGING]
    for (name, which), (error, words) in zip(random.Random(1).sample(changing, 3), WORDS.items(), strict=True):
        done = fail_in_a_call(name, which, error, expected, world, tmp_path, runner)
        assert words in done.err or "warning" not in done.err


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("error", WORDS)
def test_a_disk_that_fails_at_each_write_of_a_save(
    error: str, save_calls: tuple, world: Path, tmp_path: Path, runner: Runner
) -> None:
    expected, calls = save_calls
    changing = [call for call in calls if call[0] in CHANGING]
    said = 0
    for name, which in changing:
        done = fail_in_a_call(name, which, error, expected, world, tmp_path, runner)
        said += re.search(r"warning: (step-10 was not saved|old checkpoints were not deleted): ", done.err) is not None
        assert "warning" not in done.err or WORDS[error] in done.err
    print(f"{len(changing)} calls that change the disk, {said} failures said")
    assert said > 0.9 * len(changing)


# Signals


def signal_somewhere(number: int, moment: float, expected: object, world: Path, run: Path, runner: Runner) -> str:
    """Send a run a signal after `moment` seconds, and resume it; returns how it ended."""
    command = [*command_of("pretraining", world, run, 120), "--out_dir", run]
    process = runner.start(command)
    time.sleep(moment)
    send(process, number)
    done = runner.end(process)
    assert "Traceback" not in done.err
    steps = steps_saved(run / "checkpoints")
    made = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "train_loss" in line]
    # At start-up Python cannot handle a signal yet, and there is no run yet.
    assert done.status in (128 + number, 0) or (done.status == -number and not made), done
    if done.status == 128 + number and made:
        saved = int(re.search(r"stopped by a signal; saved at step (\d+)", done.err)[1])
        assert saved == steps[-1] >= made[-1], "no step is lost"
    resumed = runner(*command, "--resume")
    assert resumed.status == 0, resumed.err
    assert outcome(run) == expected
    assert_clean(run)
    shutil.rmtree(run)
    return "finished" if done.status == 0 else f"saved at {steps[-1]}" if steps else "before the first step"


def signals(kinds: list[int], count: int, world: Path, folder: Path, runner: Runner) -> None:
    command = [*command_of("pretraining", world, folder, 120), "--out_dir", folder / "whole"]
    runner(*command, "--help")
    started = time.perf_counter()
    assert runner(*command).status == 0
    duration, expected = time.perf_counter() - started, outcome(folder / "whole")
    ends = [
        signal_somewhere(number, (i + 0.5) / count * duration, expected, world, folder / "run", runner)
        for i in range(count)
        for number in kinds
    ]
    print(Counter(end.split(" at ")[0] for end in ends))
    assert any(end.startswith("saved at") for end in ends)


def test_signals_sample(world: Path, tmp_path: Path, runner: Runner) -> None:
    signals([signal.SIGUSR1, signal.SIGHUP], 1, world, tmp_path, runner)


@pytest.mark.slow
def test_signals_at_20_moments(world: Path, tmp_path: Path, runner: Runner) -> None:
    signals([signal.SIGTERM, signal.SIGINT], 20, world, tmp_path, runner)


def slow_evaluation() -> None:
    """Called in the process of a run: make evaluations take a minute."""
    import papagaio.training.corpora

    quick = papagaio.training.corpora.evaluate_loss

    def slow(*values: object) -> dict[str, float]:
        print("evaluating", file=sys.stderr, flush=True)
        for _ in range(6000):
            time.sleep(0.01)
        return quick(*values)

    papagaio.training.corpora.evaluate_loss = slow


def slow_save() -> None:
    """Called in the process of a run: make saves take a minute."""
    write = Saver._write

    def slow(self: Saver, *values: object) -> None:
        print("saving", file=sys.stderr, flush=True)
        time.sleep(60)
        write(self, *values)

    Saver._write = slow


def wait_for(word: str, runner: Runner) -> None:
    for _ in range(12_000):
        if word in Path(runner.streams[2]).read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"{word!r} is not said: {Path(runner.streams[2]).read_text()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_breaks_off_an_evaluation(number: int, world: Path, tmp_path: Path, runner: Runner) -> None:
    command = [*command_of("pretraining", world, tmp_path, 10), "--out_dir", tmp_path / "run"]
    process = runner.start(command, slow_evaluation)
    wait_for("evaluating", runner)
    started = time.perf_counter()
    send(process, number)
    done = runner.end(process)
    assert done.status == 128 + number, done.err
    assert time.perf_counter() - started < 30
    assert "saved at step 0" in done.err
    assert runner(*command, "--resume").status == 0


def slow_second_evaluation() -> None:
    """Called in the process of a run: make all evaluations but the first take a minute."""
    import papagaio.training.corpora

    quick, count = papagaio.training.corpora.evaluate_loss, 0

    def slow(*values: object) -> dict[str, float]:
        nonlocal count
        count += 1
        time.sleep(60 * (count > 1))
        return quick(*values)

    papagaio.training.corpora.evaluate_loss = slow


def test_what_is_evaluated_has_been_saved(world: Path, tmp_path: Path, runner: Runner) -> None:
    command = command_of("pretraining", world, tmp_path, 10)
    process = runner.start(
        [*command, "--checkpoint_interval=0", "--eval_interval=4", "--out_dir", tmp_path / "run"], slow_second_evaluation
    )
    wait_for("step 4/", runner)
    time.sleep(1)
    send(process, signal.SIGKILL)
    assert runner.end(process).status == -signal.SIGKILL
    assert steps_saved(tmp_path / "run" / "checkpoints") == [4]
    assert_whole(tmp_path / "run")


def test_a_second_signal_ends_at_once(world: Path, tmp_path: Path, runner: Runner) -> None:
    command = [*command_of("pretraining", world, tmp_path, 100_000), "--out_dir", tmp_path / "run"]
    first = runner.start([*command, "--checkpoint_interval=3"])
    wait_for("step 4/", runner)
    send(first, signal.SIGTERM)
    assert runner.end(first).status == 143
    steps = steps_saved(tmp_path / "run" / "checkpoints")
    process = runner.start([*command, "--resume"], slow_save)
    wait_for("saving", runner)
    send(process, signal.SIGTERM)
    time.sleep(0.3)
    started = time.perf_counter()
    send(process, signal.SIGINT)
    assert runner.end(process).status == 130
    assert time.perf_counter() - started < 30
    assert steps_saved(tmp_path / "run" / "checkpoints") == steps
    assert_whole(tmp_path / "run")


# Numbers


def weights_sha256(model: GPT) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


class Watched:
    """Replaces the loss or gradient of some training steps; `before` holds the hash of the weights before each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part: str, values: dict[int, float]) -> None:
        self.before: dict[int, str] = {}
        accumulate = TrainingStep.accumulate_gradients

        def watched(step: TrainingStep, batches: object) -> float:
            number, objective, self.model = step.progress.step + 1, step.objective, step.model
            self.before[number] = weights_sha256(step.model)
            factor = values.get(number, 1.0)
            if part == "loss":
                step.objective = lambda model, batch: objective(model, batch) * factor
            loss = accumulate(step, batches)
            step.objective = objective
            if part == "gradient" and factor != 1.0:
                step.model.head.weight.grad[3, 5] = factor
            return loss

        monkeypatch.setattr(TrainingStep, "accumulate_gradients", watched)


NUMBERS = ["train", "--max_steps=12", "--checkpoint_interval=4", "--eval_interval=100", "--log_interval=1", *SMALL]


@pytest.mark.parametrize("part", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_before_the_update(
    part: str, value: float, world: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, part, {6: value})
    status, _, err = call(*NUMBERS, "--data", world / "data", "--out_dir", tmp_path / "run")
    assert status == 1
    (error,) = [line for line in err.splitlines() if line.startswith("error")]
    assert re.search(r"(the loss|the norm of the gradient) is (nan|inf) at step 6", error)
    windows = re.findall(r"train-00000\.npy\[(\d+):(\d+)\]", error)
    assert len(windows) == 4
    assert all(int(end) - int(start) == 33 for start, end in windows)
    assert weights_sha256(watched.model) == watched.before[6] != watched.before[5]
    assert steps_saved(tmp_path / "run" / "checkpoints") == [4]
    assert_whole(tmp_path / "run")
    assert all("NaN" not in line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


def test_steps_in_a_row_that_may_be_left_out(world: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = float("nan")
    watched = Watched(monkeypatch, "loss", {3: nan, 4: nan, 8: nan, 9: nan})
    command = [*NUMBERS, "--data", world / "data", "--out_dir", tmp_path / "run"]
    status, _, err = call(*command, "--on_nonfinite=skip:2")
    assert status == 0, err
    assert err.count("It is skipped") == 4
    assert watched.before[3] == watched.before[4] == watched.before[5] != watched.before[6]
    lines = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train_loss" in line]
    assert lines == [1, 2, 5, 6, 7, 10, 11, 12]
    status, _, err = call(*command, "--on_nonfinite=skip:1", "--overwrite")
    assert status == 1
    assert "at step 4" in err.splitlines()[-1]


def test_a_loss_that_leaps(world: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, "loss", {5: 30.0, WINDOW + 9: 30.0})
    command = [*NUMBERS, "--data", world / "data", "--out_dir", tmp_path / "run"]
    status, _, err = call(*command, f"--max_steps={WINDOW + 12}")
    assert status == 0, err
    (warning,) = [line for line in err.splitlines() if "the loss leaps" in line]  # too early to tell at step 5
    assert re.search(rf"at step {WINDOW + 9}, \d+\.\d sigma above .*train-00000.npy\[", warning)
    assert watched.before[WINDOW + 9] != watched.before[WINDOW + 10], "it is reported only"


# One run, one directory


def test_a_second_run_is_refused_until_the_first_has_ended(world: Path, tmp_path: Path, call: Call, runner: Runner) -> None:
    command = [*command_of("pretraining", world, tmp_path, 100_000), "--out_dir", tmp_path / "run"]
    process = runner.start(command)
    wait_for("step 100/", runner)
    for more in ("--resume", "--overwrite"):
        status, _, err = call("train", *command[1:], more)
        assert status == 2
        assert err.splitlines()[-1].startswith(f"error: {tmp_path / 'run'}: another process is training there")
    send(process, signal.SIGKILL)
    runner.end(process)
    step = steps_saved(tmp_path / "run" / "checkpoints")[-1]
    status, _, err = call("train", *command[1:], f"--max_steps={step + 1}", "--resume")
    assert status == 0, err


def damage(checkpoint: Path, file: str = "model.safetensors") -> None:
    data = bytearray((checkpoint / file).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / file).write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_passed_over(world: Path, tmp_path: Path, runner: Runner) -> None:
    command = command_of("pretraining", world, tmp_path, 20)
    assert runner(*command, "--out_dir", tmp_path / "whole").status == 0
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run)
    damage(run / "checkpoints" / "step-20")
    done = runner(*command, "--out_dir", run, "--resume")
    assert done.status == 0, done.err
    assert f"warning: passed over: {run}/checkpoints/step-20/model.safetensors: changed or cut short" in done.err
    assert outcome(run) == outcome(tmp_path / "whole")
    shutil.rmtree(run / "checkpoints" / "step-20")
    shutil.rmtree(run / "checkpoints" / "step-15")
    (run / "checkpoints" / "step-15").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = runner(*command, "--out_dir", run, "--resume")
    assert done.status == 2
    assert "none of its 1 checkpoints can be read; --overwrite begins anew" in done.err.splitlines()[-1]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_another_run_is_not_resumed_and_all_that_differs_is_named(world: Path, tmp_path: Path, call: Call) -> None:
    command = [*command_of("pretraining", world, tmp_path, 5)[1:], "--out_dir", tmp_path / "run"]
    assert call("train", *command)[0] == 0
    status, _, err = call("train", *command, "--resume", "--seed=5", "--n_embd=64", "--weight_decay=0.1", "--batch_size=8")
    assert status == 2
    for words in ("seed was 1337, now it is 5", "n_embd was 32, now it is 64", "weight_decay was 0.0", "batch_size was 4"):
        assert words in err
    assert "What may change: max_steps, " in err
    moved = tmp_path / "moved"
    shutil.copytree(world / "data", moved)
    more = ["--max_steps=8", "--eval_interval=4", "--micro_batch_size=4", "--keep=1", "--checkpoint_interval=3"]
    command[command.index(world / "data")] = moved
    assert call("train", *command, "--resume", *more)[0] == 0, "the same data elsewhere, another layout"
    other = make_dataset(tmp_path / "other", [b"another text " * 60], tokenizer=load_tokenizer(world / "data" / "tokenizer"))
    command[command.index(moved)] = other.directory
    status, _, err = call("train", *command, "--resume", "--max_steps=9")
    assert status == 2
    assert "data_sha256 was" in err


@pytest.mark.parametrize("options", [TrainOptions, FinetuneOptions])
def test_no_path_is_compared_or_told_to_wandb(options: type[RunOptions]) -> None:
    paths = {name for name, field in options.model_fields.items() if "Path" in str(field.annotation)} | {"data"}
    assert paths == {"out_dir", *options.by_resume("content")}
    assert "out_dir" in options.by_resume("ignored")


def test_a_checkpoint_of_another_version_is_not_resumed(world: Path, tmp_path: Path, call: Call) -> None:
    command = ["train", *command_of("pretraining", world, tmp_path, 5)[1:], "--out_dir", tmp_path / "run"]
    assert call(*command)[0] == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-5"
    whole = json.loads((checkpoint / "state.json").read_text())
    wrong = [{key: value for key, value in whole.items() if key != "tokens"}, whole | {"more": 1}, whole | {"tokens": "many"}]
    for state in wrong:
        (checkpoint / "state.json").write_text(json.dumps(state))
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"]["state.json"] = file_sha256(checkpoint / "state.json")
        del manifest["sha256"]
        (checkpoint / "manifest.json").write_text(sealed(manifest))
        status, _, err = call(*command, "--resume", "--max_steps=6")
        assert status == 2
        assert f"{checkpoint}/state.json: made by another version of papagaio" in err.splitlines()[-1]


# Resources


def test_a_disk_too_small_for_the_checkpoints_is_refused(
    world: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    command = [*command_of("pretraining", world, tmp_path, 20)[1:], "--out_dir", tmp_path / "run"]
    status, _, err = call("train", *command)
    assert status == 1
    assert re.search(r"4 more checkpoints of \d+ MiB are to be there at once, and the disk has 0 MiB free: make room", err)
    assert not (tmp_path / "run" / "checkpoints").exists()


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Memory runs out at every second micro-batch that is too large, when gradients have been accumulated already."""
    forward, large = GPT.forward, 0

    def limited(self: GPT, ids: torch.Tensor, *more: object, **named: object) -> torch.Tensor:
        nonlocal large
        large += len(ids) > size and self.training
        if len(ids) > size and self.training and large % 2 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return forward(self, ids, *more, **named)

    monkeypatch.setattr(GPT, "forward", limited)


def test_out_of_memory_names_what_to_lower_or_halves_it(
    world: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", *command_of("pretraining", world, tmp_path, 12)[1:-1], "--dropout=0", "--batch_size=16"]
    assert call(*command, "--micro_batch_size=2", "--out_dir", tmp_path / "small")[0] == 0
    out_of_memory_above(monkeypatch, 2)
    status, _, err = call(*command, "--micro_batch_size=8", "--out_dir", tmp_path / "run")
    assert status == 1
    assert "out of memory at step 1, with 8 sequences at a time: lower micro_batch_size" in err.splitlines()[-1]
    more = ["--micro_batch_size=8", "--auto_microbatch", "--out_dir", tmp_path / "run"]
    status, _, err = call(*command, *more, "--overwrite")
    assert status == 0, err
    assert re.findall(r"on (\d) sequences at a time", err) == ["4", "2"]
    found, wanted = outcome(tmp_path / "run"), outcome(tmp_path / "small")
    assert found["model.safetensors"] == wanted["model.safetensors"], "the same optimizer steps"
    assert found["metrics"] == wanted["metrics"]
    status, _, err = call(*command, *more, "--resume", "--max_steps=14")
    assert status == 0, err
    assert "out of memory" not in err, "a resumed run knows what fits"


def little_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))


def test_a_process_that_gets_no_memory_says_so_in_one_line(world: Path, tmp_path: Path, runner: Runner) -> None:
    shape = ["--n_layer=8", "--n_embd=64", "--n_head=2", "--block_size=64", "--batch_size=8192", "--eval_tokens=64"]
    command = ["train.py", "--data", world / "data", *shape, "--max_steps=2", "--out_dir", tmp_path / "run", "--dtype=float32"]
    done = runner(*command, first=little_memory)
    assert done.status == 1, done.err
    assert done.err.splitlines()[-1].startswith("error: out of memory")
    assert "Traceback" not in done.err


def test_without_memory_for_a_copy_the_files_are_the_same(
    world: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", *command_of("pretraining", world, tmp_path, 20)[1:]]
    assert call(*command, "--out_dir", tmp_path / "copied")[0] == 0
    monkeypatch.setattr("papagaio.runtime.free_memory", lambda device: 1000)
    assert call(*command, "--out_dir", tmp_path / "held")[0] == 0
    assert outcome(tmp_path / "held") == outcome(tmp_path / "copied")


LAYOUTS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(list(TYPES.values()))),
    max_size=6,
)


@given(LAYOUTS, st.sampled_from([None, {"format": "pt"}]))
@settings(max_examples=60, deadline=None)
def test_tensors_written_one_by_one_are_the_file_that_the_library_writes(
    layout: dict[str, tuple[list[int], torch.dtype]], metadata: dict[str, str] | None
) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in layout.items()}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        write_tensors(ours, layout, tensors.__getitem__, metadata)
        save_file(tensors, theirs, metadata)
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_full_disk_costs_no_line_of_the_metrics(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(RunOptions(out_dir=tmp_path, max_steps=9), Progress()) as log:
        log.say = said.append
        log.write(Progress(step=1, tokens=10), val_loss=3.0)
        try:  # a few bytes more are taken, as by a disk that is nearly full
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, unlimited[1]))
            log.write(Progress(step=2, tokens=20), val_loss=2.0)
            assert [line["step"] for line in read_metrics(path)] == [1]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        log.write(Progress(step=3, tokens=30), val_loss=1.0)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert sum("metrics.jsonl could not be written: File too large" in line for line in said) == 1


def test_a_save_holds_what_the_weights_were(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tokenizer = RunOptions(out_dir=tmp_path, max_steps=9), load_tokenizer(world / "data" / "tokenizer")
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=16))
    changed, write = threading.Event(), saver.write_checkpoint

    def late(*values: object) -> None:
        assert changed.wait(10)
        write(*values)

    monkeypatch.setattr(saver, "write_checkpoint", late)
    before = weights_sha256(model)
    with RunLog(config, Progress()) as log, Saver(config, tokenizer, log, None) as saving:
        saving.save(model, [], {"step": 1})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        changed.set()
        saving.finish()
    open_checkpoint(tmp_path / "checkpoints" / "step-1").load_model(model)
    assert weights_sha256(model) == before

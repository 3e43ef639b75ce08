"""Several processes that train one model (papagaio/training/parallel.py), started by torchrun as a user starts them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_dataset
from safetensors.torch import load_file, save_file

from papagaio.batches.preferences import PairBatch
from papagaio.batches.share import share
from papagaio.batches.windows import Batch, WindowLoader
from papagaio.errors import UserError
from papagaio.files import file_sha256, sealed
from papagaio.launch import Launch, launched
from papagaio.runs.directory import open_checkpoint
from papagaio.training.optimizers import Muon
from papagaio.training.parallel import World

Torchrun = Callable[..., subprocess.CompletedProcess]
SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=32", "--batch_size=8", "--dtype=float32", "--device=cpu"]
RUN = ["--eval_interval=4", "--log_interval=1", "--checkpoint_interval=2", "--keep=9", "--sample_tokens=4"]


@pytest.fixture(scope="session")
def torchrun(world: Path) -> Torchrun:
    """`torchrun(2, "train.py", "--seed=1", fault="...")` runs a script with two processes (tests/ranked.py)."""

    def run(processes: int, *argv: object, restarts: int = 0, **wanted: object) -> subprocess.CompletedProcess:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
        command = [sys.executable, *launcher, ROOT / "tests" / "ranked.py", *argv]
        env = os.environ | {"OMP_NUM_THREADS": "1"} | {f"TEST_{name.upper()}": str(value) for name, value in wanted.items()}
        return subprocess.run([str(word) for word in command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)

    return run


def pretraining(world: Path, out_dir: Path, *options: object) -> list[object]:
    return ["train.py", "--data", world / "data", "--out_dir", out_dir, "--max_steps=8", *SHAPE, *RUN, *options]


def figures(run: Path, *keys: str) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in lines if keys[0] in line]


def assert_near(run: Path, other: Path, tolerance: float) -> None:
    """Losses and targets of every step, and the weights and moments at the end, are those of the other run."""
    for keys in (("train_loss", "grad_norm"), ("val_loss",)):
        torch.testing.assert_close(figures(run, *keys), figures(other, *keys), rtol=0, atol=tolerance)
    assert figures(run, "tokens") == figures(other, "tokens")
    step = (other / "checkpoints" / "last").read_text().strip()
    for path in (other / "checkpoints" / step).glob("*.safetensors"):
        found = load_file(run / "checkpoints" / step / path.name)
        torch.testing.assert_close(found, load_file(path), rtol=0, atol=10 * tolerance)  # rates of embeddings are large


def end(run: Path) -> dict[str, str]:
    """What a run leaves, without the times in it."""
    step = run / "checkpoints" / (run / "checkpoints" / "last").read_text().strip()
    clocks = ("elapsed_seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in clocks} for line in lines]
    hashes = {str(path.relative_to(step)): file_sha256(path) for path in sorted(step.rglob("*")) if path.is_file()}
    return hashes | {"step": step.name, "metrics": hashlib.sha256(json.dumps(metrics).encode()).hexdigest()}


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith(("error:", "rank ")) or "terminate" in line]


@pytest.fixture(scope="session")
def runs(world: Path, torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`runs(2)`: a pretraining run of two processes, with what its ranks saw in witness/."""
    made: dict[int, Path] = {}

    def run(processes: int) -> Path:
        if processes not in made:
            out = tmp_path_factory.mktemp(f"processes-{processes}")
            (out / "witness").mkdir()
            done = torchrun(processes, *pretraining(world, out / "run"), float32=1, witness=out / "witness")
            assert done.returncode == 0, done.stderr
            assert errors(done) == []
            made[processes] = out / "run"
        return made[processes]

    return run


def compare_runs(run: Path, alone: Path, processes: int) -> None:
    assert_near(run, alone, 1e-5)
    torch.testing.assert_close(figures(run, "val_loss")[0], figures(alone, "val_loss")[0], rtol=0, atol=1e-6)
    expected = load_file(alone.parent / "witness" / "gradients-0.safetensors")
    for rank in range(processes):
        found = load_file(run.parent / "witness" / f"gradients-{rank}.safetensors")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    weights = [(run.parent / "witness" / f"weights-{rank}.txt").read_text() for rank in range(processes)]
    assert len(weights[0].splitlines()) == 8
    assert set(weights) == {weights[0]}


def test_two_processes_train_as_one_does(runs: Callable[[int], Path]) -> None:
    """Gradients of the first step, losses and norms of all, validation, weights and moments; the ranks' weights are the same."""
    compare_runs(runs(2), runs(1), 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4])
def test_any_number_of_processes_trains_as_one_does(runs: Callable[[int], Path], processes: int) -> None:
    """Three: one rank's eighth sequence is missing, and two matrices of a stack belong to one rank."""
    compare_runs(runs(processes), runs(1), processes)


def test_a_killed_rank_is_started_again_and_the_end_is_the_same(
    world: Path, runs: Callable[[int], Path], torchrun: Torchrun, tmp_path: Path
) -> None:
    fault = "1 papagaio.training.gradients.Gradients.finish 6 KILL"
    done = torchrun(2, *pretraining(world, tmp_path, "--overwrite"), float32=1, fault=fault, restarts=1)
    assert done.returncode == 0, done.stderr
    assert errors(done) == [
        "error: rank 1 is lost: killed, or the machine is down; what was saved is kept, --resume goes on from there"
    ]
    assert end(tmp_path) == end(runs(2))


MOMENTS = [  # rank, function, which call
    *((rank, "papagaio.corpus.dataset.Dataset.__init__", 1) for rank in (0, 1)),
    *((rank, "papagaio.runs.directory.write_whole", 1) for rank in (0,)),
    *((rank, "papagaio.evaluation.evaluate_loss", call) for rank, call in ((0, 1), (1, 2))),
    *((rank, "papagaio.training.step.TrainingStep.__call__", call) for rank, call in ((0, 1), (1, 2), (0, 5), (1, 8))),
    *((rank, "papagaio.training.gradients.Gradients._sum_next", call) for rank, call in ((0, 1), (1, 3), (0, 7))),
    *((rank, "papagaio.training.optimizers.Muon.step", call) for rank, call in ((0, 3), (1, 4), (1, 6))),
    *((rank, "papagaio.runs.saver.contents", call) for rank, call in ((0, 1), (1, 2), (1, 4))),
    *((0, f"papagaio.runs.{name}", 2) for name in ("saver.write_checkpoint", "checkpoint.save_file", "saver.prune")),
    *((rank, "papagaio.runs.saver.Saver.finish", 1) for rank in (0, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "function", "call"), MOMENTS)
def test_a_rank_killed_at_any_moment(
    world: Path, runs: Callable[[int], Path], torchrun: Torchrun, tmp_path: Path, rank: int, function: str, call: int
) -> None:
    """Over an older run, which --overwrite replaces: it is not resumed."""
    if "Dataset" in function:
        function = "papagaio.training.corpora.Dataset"
    shutil.copytree(world / "base", tmp_path, dirs_exist_ok=True)
    argv = pretraining(world, tmp_path, "--overwrite")
    done = torchrun(2, *argv, float32=1, fault=f"{rank} {function} {call} KILL", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert end(tmp_path) == end(runs(2))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    world: Path, runs: Callable[[int], Path], torchrun: Torchrun, tmp_path: Path, rank: int
) -> None:
    fault = f"{rank} papagaio.training.gradients.Gradients.finish 3 TERM"
    done = torchrun(2, *pretraining(world, tmp_path), float32=1, fault=fault)
    assert "stopped by a signal; saved at step 3" in done.stderr
    assert done.stderr.count("exitcode  : 143") == 2
    assert errors(done) == []
    done = torchrun(2, *pretraining(world, tmp_path, "--resume"), float32=1)
    assert done.returncode == 0, done.stderr
    assert end(tmp_path) == end(runs(2))


@pytest.mark.slow
def test_torchrun_itself_is_stopped(world: Path, runs: Callable[[int], Path], torchrun: Torchrun, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tests/ranked.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TEST_FLOAT32": "1"}
    argv = pretraining(world, tmp_path, "--max_steps=100000")
    with subprocess.Popen([*launcher, *map(str, argv)], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "checkpoints" / "last").exists():
            time.sleep(0.2)
        start = time.monotonic()
        process.terminate()
        assert "stopped by a signal; saved at step" in process.stderr.read()
        process.wait(60)
    assert time.monotonic() - start < 30
    saved = open_checkpoint(tmp_path / "checkpoints" / "last")
    assert saved.state["step"] == max(step for (step,) in figures(tmp_path, "step"))


@pytest.mark.slow
def test_two_processes_then_one(world: Path, runs: Callable[[int], Path], torchrun: Torchrun, tmp_path: Path) -> None:
    """A checkpoint has the same tensors whatever the number of processes."""
    run = tmp_path / "run"
    shutil.copytree(runs(2), run)
    shutil.rmtree(run / "checkpoints" / "step-8")
    shutil.rmtree(run / "checkpoints" / "step-6")
    done = torchrun(1, *pretraining(world, run, "--resume"), float32=1)
    assert done.returncode == 0, done.stderr
    assert_near(run, runs(1), 1e-5)


@pytest.mark.slow
def test_two_processes_then_one_then_four(world: Path, runs: Callable[[int], Path], torchrun: Torchrun, tmp_path: Path) -> None:
    for processes, steps, mode in ((2, 4, "fsdp"), (1, 6, "auto"), (4, 8, "ddp")):
        fault = {"fault": f"0 papagaio.training.gradients.Gradients.finish {2 if steps == 6 else 4} TERM"} if steps < 8 else {}
        done = torchrun(processes, *pretraining(world, tmp_path, "--resume", f"--parallel={mode}"), float32=1, **fault)
        assert (tmp_path / "checkpoints" / "last").read_text() == f"step-{steps}\n", done.stderr
    assert_near(tmp_path, runs(1), 1e-5)


@pytest.mark.slow
def test_resuming_with_as_many_processes_gives_the_same_bits(
    world: Path, runs: Callable[[int], Path], torchrun: Torchrun, tmp_path: Path
) -> None:
    for options in (["--parallel=ddp"], ["--parallel=fsdp"]):
        whole, parts = tmp_path / f"whole{options}", tmp_path / f"parts{options}"
        assert torchrun(2, *pretraining(world, whole, *options), float32=1).returncode == 0
        fault = "1 papagaio.training.gradients.Gradients.finish 5 TERM"
        torchrun(2, *pretraining(world, parts, *options), float32=1, fault=fault)
        assert torchrun(2, *pretraining(world, parts, *options, "--resume"), float32=1).returncode == 0
        assert end(parts) == end(whole)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_model_that_rank_0_cannot_hold_twice_is_saved_tensor_by_tensor(
    world: Path, torchrun: Torchrun, tmp_path: Path, mode: str
) -> None:
    """In the same file, also if a save in the middle fails."""
    for name, fault in (("copied", {}), ("one-by-one", {"little_memory": 1})):
        argv = pretraining(world, tmp_path / name, f"--parallel={mode}")
        done = torchrun(2, *argv, float32=1, **fault)
        assert done.returncode == 0, done.stderr
    assert end(tmp_path / "one-by-one") == end(tmp_path / "copied")
    fault = "0 papagaio.runs.saver.write_tensors 3 FULL"
    done = torchrun(2, *pretraining(world, tmp_path / "full", f"--parallel={mode}"), float32=1, little_memory=1, fault=fault)
    assert done.returncode == 0, done.stderr
    assert "step-4 was not saved: No space left on device" in done.stderr
    assert end(tmp_path / "full") == end(tmp_path / "copied")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("options", [[], ["--optimizer=adamw", "--learning_rate=1e-3", "--grad_clip=0.5"], ["--preset=frontier"]])
def test_a_divided_model_trains_as_a_whole_one(
    world: Path, torchrun: Torchrun, tmp_path: Path, processes: int, options: list[str]
) -> None:
    fsdp = ["--parallel=fsdp", "--activation_checkpointing", "--micro_batch_size=2"]
    for name, count, more in (("one", 1, []), ("fsdp", processes, fsdp)):
        (tmp_path / name / "witness").mkdir(parents=True)
        argv = pretraining(world, tmp_path / name / "run", *options, *more)
        done = torchrun(count, *argv, float32=1, witness=tmp_path / name / "witness")
        assert done.returncode == 0, done.stderr
    assert_near(tmp_path / "fsdp" / "run", tmp_path / "one" / "run", 2e-5)
    held = {n: [int(path.read_text()) for path in (tmp_path / n / "witness").glob("bytes-*.txt")] for n in ("one", "fsdp")}
    assert len(held["fsdp"]) == processes
    assert max(held["fsdp"]) <= held["one"][0] * (1 / processes + 0.1)


FINETUNINGS = {
    "answers": ["--data=qa_train.jsonl", "--optimizer=adamw", "--learning_rate=1e-3", "--replay_data=data"],
    "unpacked": ["--data=qa_train.jsonl", "--packing=false", "--micro_batch_size=1", "--freeze_layers=1"],
    "adapters": ["--data=qa_train.jsonl", "--lora_rank=4", "--lora_merge"],
    "preferences": ["--data=preferences.jsonl", "--replay_data=data", "--replay=0.3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FINETUNINGS)
def test_finetuning_with_several_processes(world: Path, torchrun: Torchrun, tmp_path: Path, kind: str) -> None:
    answers = ["red", "blue", "green", "gold"]
    rows = [{"prompt": f"Flag {i}?", "chosen": answers[i % 4], "rejected": answers[(i + 1) % 4]} for i in range(30)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qa_train.jsonl").write_bytes((world / "qa_train.jsonl").read_bytes())
    options = [
        word.replace("=data", f"={world / 'data'}").replace("--data=", f"--data={tmp_path}/") for word in FINETUNINGS[kind]
    ]
    options += ["--test_data", str(world / "qa_test.jsonl")]
    for name, processes, parallel in (("one", 1, "auto"), ("ddp", 3, "ddp"), ("fsdp", 2, "fsdp")):
        argv = ["finetune.py", "--init_from", world / "base", "--out_dir", tmp_path / name, "--max_steps=4", "--batch_size=7"]
        argv += [
            "--dtype=float32",
            "--device=cpu",
            "--eval_interval=2",
            "--log_interval=1",
            "--sample_tokens=4",
            "--val_fraction=0.2",
        ]
        done = torchrun(processes, *argv, *options, f"--parallel={parallel}", float32=1)
        assert done.returncode == 0, done.stderr
        assert ("held-out exact match" in done.stdout) == (name != "fsdp")
        assert done.stdout.count("held-out exact match") <= 1
        assert_near(tmp_path / name, tmp_path / "one", 1e-5)


@pytest.mark.slow
def test_all_ranks_halve_the_micro_batch_if_one_runs_out_of_memory(
    world: Path, runs: Callable[[int], Path], torchrun: Torchrun, tmp_path: Path
) -> None:
    """In the backward pass of its second micro-batch of step 2, when other sums may have begun."""
    for call in (3, 6):  # the fault is in a forward pass: of the whole batch of step 3, and of a micro-batch
        out = tmp_path / str(call)
        options = ["--auto_microbatch", *(["--micro_batch_size=2"] if call == 6 else [])]
        done = torchrun(2, *pretraining(world, out, *options), float32=1, fault=f"1 papagaio.kernels.next_token_loss {call} OOM")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("out of memory: from step") == 1
        assert_near(out, runs(1), 1e-5)
    done = torchrun(2, *pretraining(world, tmp_path / "not"), fault="1 papagaio.kernels.next_token_loss 3 OOM")
    (line,) = errors(done)
    assert line.startswith("error: rank 1: out of memory at step 2, with 4 sequences")


def test_a_mistake_is_one_line(world: Path, torchrun: Torchrun, tmp_path: Path) -> None:
    argv = pretraining(world, tmp_path / "out", "--data", tmp_path / "nowhere")
    done = torchrun(2, *argv)
    assert len(errors(done)) == 1
    assert errors(done)[0].startswith(f"error: {tmp_path / 'nowhere'}")
    assert "exitcode  : 2" in done.stderr  # torchrun ends the other process, if it is not quick enough
    assert not (tmp_path / "out").exists()


def test_a_shared_batch_is_the_whole_batch(tmp_path: Path) -> None:
    """The weights of all parts sum to 1, every sequence is in one of them, and all parts are of the same length."""
    dataset = make_dataset(tmp_path, [bytes(range(32, 127)) * 9])
    (batch,) = WindowLoader(dataset, "train", 16, 7, 1, document_mask=True)(0)
    pairs = PairBatch(torch.randn(7, 2, 5), torch.ones(7, 2, 5), torch.full((7,), 1 / 7), torch.randn(7, 2))
    for given in (batch, pairs, Batch(*batch[:3])):
        for size in (1, 2, 3, 9):
            parts = [share(given, rank, size) for rank in range(size)]
            assert {len(part.ids) for part in parts} == {-(-7 // size)}
            assert sum(float(part.weights.sum()) for part in parts) == pytest.approx(1)
            real = [(part, i) for part in parts for i in range(len(part.ids)) if part.weights[i].sum() > 0]
            assert len(real) == 7
            assert sorted(part.ids[i].flatten().tolist() for part, i in real) == sorted(given.ids.flatten(1).tolist())
            assert sum(int((part.targets != -100).sum()) for part in parts) == given.targets.numel()


def test_batches_are_dealt_out_in_equal_numbers() -> None:
    for count in range(8):
        for size in (1, 2, 3):
            dealt = [list(World(rank, size).deal(range(count))) for rank in range(size)]
            assert len({len(part) for part in dealt}) == 1
            assert sorted(item for part in dealt for item, counts in part if counts) == list(range(count))


def test_muon_keeps_a_momentum_for_each_matrix(world: Path, tmp_path: Path) -> None:
    """In the matrix's own shape; a checkpoint that has them in stacks, of an older version, is refused in one line."""
    saved = load_file(world / "base" / "checkpoints" / "step-300" / "optimizer.safetensors")
    momenta = {name: tensor for name, tensor in saved.items() if name.endswith("momentum")}
    weights = load_file(world / "base" / "checkpoints" / "step-300" / "model.safetensors")
    assert {name.split(".", 1)[1].removesuffix(".momentum"): t.shape for name, t in momenta.items()} == {
        name: t.shape for name, t in weights.items() if name.startswith("blocks") and t.ndim == 2
    }
    path = tmp_path / "step-300"
    shutil.copytree(world / "base" / "checkpoints" / "step-300", path)
    first = min(momenta)
    save_file(saved | {first: torch.stack([saved[first]] * 3)}, path / "optimizer.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["optimizer.safetensors"] = file_sha256(path / "optimizer.safetensors")
    (path / "manifest.json").write_text(sealed(manifest))
    with pytest.raises(UserError, match=r"momenta in stacks, made by an older version"):
        open_checkpoint(path).load_optimizers(torch.nn.Linear(1, 1), [])


def test_the_place_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # a script of sbatch, which is one process
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert launched() == Launch()
    for name, value in (("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_PROCID", "3"), ("SLURM_LOCALID", "1")):
        monkeypatch.setenv(name, value)
    assert launched() == Launch(3, 4, 1)
    monkeypatch.setenv("SLURM_PTY_PORT", "5")  # srun --pty: a shell in the first of the tasks
    assert launched() == Launch()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert launched() == Launch(1, 2, 0)


@pytest.mark.slow
def test_srun_starts_processes_too(world: Path, runs: Callable[[int], Path], tmp_path: Path) -> None:
    started = []
    for rank in (1, 0):
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TEST_FLOAT32": "1",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_LOCALID": str(rank),
        }
        env |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank)}
        argv = [sys.executable, "tests/ranked.py", *map(str, pretraining(world, tmp_path))]
        started.append(subprocess.Popen(argv, cwd=ROOT, env=env, stderr=subprocess.DEVNULL))
    assert [process.wait(100) for process in started] == [0, 0]
    assert end(tmp_path) == end(runs(2))


def test_muons_shares_are_whole() -> None:
    """Every matrix belongs to one rank."""
    params = [torch.nn.Parameter(torch.zeros(*shape)) for shape in ((4, 8), (8, 4), (4, 4), (4, 8), (4, 4))]
    for size in (1, 2, 3):
        owners = [[Muon(params, 0.1, world=World(rank, size)).has(p) for p in params] for rank in range(size)]
        assert [sum(column) for column in zip(*owners, strict=True)] == [1] * 5

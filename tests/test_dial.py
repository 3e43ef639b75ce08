"""One dial: papagaio/training/dial.py by its rules, and train.py's --depth, --budget and --dry_run as a user turns them."""

import itertools
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Script
from hypothesis import given
from hypothesis import strategies as st

from model import GPT, PRESETS, GPTConfig
from papagaio import kernels
from papagaio.batches.windows import Batch, likelihood
from papagaio.errors import UserError
from papagaio.training.dial import MAX_EPOCHS, Choice, batch_tokens, by_budget, by_depth, matrix_weights, steady_speed
from papagaio.training.dry_run import memory_parts
from papagaio.training.metrics import flops_per_token
from papagaio.training.options import RunOptions


@given(
    depth=st.integers(1, 32),
    corpus=st.integers(3000, 10**11),
    vocab_size=st.integers(10, 100_000),
    on_gpu=st.booleans(),
    own=st.dictionaries(st.sampled_from(["n_embd", "batch_size", "max_steps", "block_size"]), st.integers(64, 512)),
)
def test_a_depth_gives_a_whole_run_and_touches_nothing_given(
    depth: int, corpus: int, vocab_size: int, on_gpu: bool, own: dict[str, int]
) -> None:
    choice = by_depth(depth, corpus, vocab_size, on_gpu, own)
    assert not set(choice.values) & set(own)
    values = choice.values | own
    assert values["n_layer"] == depth
    tokens = values["max_steps"] * values["batch_size"] * values["block_size"]
    if not own:
        assert values["n_embd"] == 64 * values["n_head"] == 64 * depth
        assert tokens <= MAX_EPOCHS * corpus
        assert tokens <= 12 * matrix_weights(depth, vocab_size)
        assert values["block_size"] * 16 <= corpus
    assert values["eval_interval"] >= 1
    assert all("\n" not in line for line in choice.reasons)


def test_weights_are_counted_as_the_model_counts_them() -> None:
    for depth in (1, 3):
        gpt = GPT(GPTConfig(vocab_size=128, block_size=32, n_layer=depth, n_head=depth, n_embd=64 * depth))
        attention = 12 * gpt.config.n_embd * 32 * depth
        assert 6 * matrix_weights(depth, 128) == flops_per_token(gpt) - attention


def test_batches_grow_with_the_run_from_1024_to_524288() -> None:
    sizes = [batch_tokens(10.0**power) for power in range(3, 13)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1024
    assert sizes[-1] == 524288
    assert all(math.log2(size).is_integer() for size in sizes)
    assert batch_tokens(550e3) == 4096
    assert batch_tokens(2.6e9) == 524288


def test_a_budget_takes_the_deepest_model_that_sees_enough() -> None:
    asked = []

    def speed(values: dict[str, Any]) -> float:
        asked.append(values["n_layer"])
        return 3e11 / matrix_weights(values["n_layer"], 4096) / 6  # a machine of 300 GFLOP/s

    depths = [by_budget(seconds, 10**12, 4096, False, {}, speed).values["n_layer"] for seconds in (1, 60, 600, 36000)]
    assert depths == sorted(depths)
    assert len(set(depths)) == 4
    choice = by_budget(600, 10**12, 4096, False, {}, speed).values
    tokens = choice["max_steps"] * choice["batch_size"] * choice["block_size"]
    assert tokens / speed(choice) == pytest.approx(0.8 * 600, rel=0.05)  # the time is used
    asked.clear()
    assert by_budget(600, 10**12, 4096, False, {"n_layer": 3, "batch_size": 7}, speed).values["n_embd"] == 192
    assert asked == [3, 3]  # measured until two agree
    small = by_budget(36000, 100_000, 4096, False, {}, speed).values  # a small corpus is not read for ever
    assert small["max_steps"] * small["batch_size"] * small["block_size"] <= MAX_EPOCHS * 100_000
    with pytest.raises(UserError, match="not enough for a step"):
        by_budget(0.0001, 10**12, 4096, False, {}, speed)


def test_train_says_what_it_chose_and_why_and_a_resumed_run_keeps_it(world: Path, tmp_path: Path, script: Script) -> None:
    run = tmp_path / "run"
    command = ["train.py", "--data", world / "data", "--out_dir", run, "--budget=2s", "--block_size=32", "--sample_tokens=0"]
    done = script(*command, "--max_steps=3", "--eval_tokens=512")
    assert done.returncode == 0, done.stderr
    chosen = [line for line in done.stderr.splitlines() if line.startswith("chosen: ")]
    assert any("n_layer" in line and "channels" in line for line in chosen)
    assert any("batch_size" in line and "tokens per step" in line for line in chosen)
    first = tomllib.loads((run / "config.toml").read_text())
    assert first["block_size"] == 32
    assert first["max_steps"] == 3
    assert first["n_embd"] == 64 * first["n_layer"]
    again = script(*command, "--budget=1h", "--max_steps=5", "--eval_tokens=512", "--resume")  # alone it would mean more
    assert again.returncode == 0, again.stderr
    second = tomllib.loads((run / "config.toml").read_text())
    assert {key: second[key] for key in ("n_layer", "n_embd", "batch_size")} == {
        key: first[key] for key in ("n_layer", "n_embd", "batch_size")
    }
    assert (run / "checkpoints" / "last").read_text().strip() == "step-5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depth=2", "--budget=10m"], "depth and budget exclude each other"),
        (["--budget=10"], "--budget=10: "),
        (["--depth=0"], "--depth=0: "),
        (["--depth=3", "--n_embd=100"], "n_embd 100 must be divisible by n_head 3"),
        (["--budget=0s"], "not enough for a step"),
    ],
)
def test_a_dial_turned_wrongly_is_one_line(options: list[str], message: str, world: Path, tmp_path: Path, script: Script) -> None:
    done = script("train.py", "--data", world / "data", "--out_dir", tmp_path / "run", *options)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_cannot_fit_and_uses_no_memory_for_it(world: Path, tmp_path: Path, script: Script) -> None:
    huge = ["--n_layer=90", "--n_head=128", "--n_embd=16384", "--batch_size=64", "--block_size=64"]
    done = script("train.py", "--data", world / "data", "--out_dir", tmp_path / "run", *huge, "--dry_run")
    assert done.returncode == 2
    assert re.search(r"error: this run needs about [\d,]+ MiB and cpu has [\d,]+ MiB free: lower micro_batch_size", done.stderr)
    assert "memory: about" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_what_a_step_keeps(preset: str, recompute: bool) -> None:
    """Beside a real step: the bytes of what autograd saves, of the gradients and of the optimizers' moments."""
    config = RunOptions(out_dir=Path("x"), dtype="float32", activation_checkpointing=recompute)
    ids = torch.randint(0, 90, (4, 32))
    micro = Batch(ids, ids, torch.full((4, 32), 1 / 128))

    def make() -> GPT:
        return GPT(GPTConfig(vocab_size=90, n_layer=2, n_head=2, n_embd=32, block_size=32, **PRESETS[preset]))

    parts = memory_parts(make, likelihood, config, micro, torch.device("cpu"))
    gpt = kernels.accelerate(make())
    if recompute:
        kernels.checkpoint_activations(gpt)
    saved: dict[int, int] = {}
    own = {p.data_ptr() for p in gpt.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gpt(*micro)
    weights = sum(p.numel() * 4 for p in gpt.parameters())
    assert parts["weights"] == parts["gradients"] == weights
    assert parts["activations"] == pytest.approx(sum(saved.values()), rel=0.1)
    assert weights <= parts["optimizer"] <= 2 * weights


def test_a_busy_machine_is_measured_until_two_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs only slow it down, so the highest speed on which two measurements agree counts."""
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    measured = iter([400, 1000, 300, 970, 1, 1])
    assert steady_speed(lambda: next(measured)) == (1000, True)
    assert next(measured) == 1  # no more were needed
    measured = iter([100, 200, 300, 500, 800])
    assert steady_speed(lambda: next(measured)) == (800, False)

    def choice(slow: float) -> Choice:
        numbers = itertools.cycle([slow, 1.0])

        def speed(values: dict) -> float:
            return next(numbers) * 1e10 / matrix_weights(values["n_layer"], 4096)

        return by_budget(300, 10**12, 4096, False, {}, speed)

    assert choice(0.3).values == choice(1.0).values
    assert choice(0.3).speed == choice(1.0).speed
    assert not any("busy" in reason for reason in choice(0.3).reasons)
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    assert "busy" in choice(1.0).reasons[-1]


def test_the_dry_run_of_a_budget_counts_with_the_speed_that_chose_it(world: Path, script: Script) -> None:
    done = script("train.py", "--data", world / "data", "--out_dir", world / "none", "--budget=20s", "--dry_run")
    chosen, shown = (re.findall(r"([\d,]+) tokens/s", text) for text in (done.stderr, done.stdout))
    assert chosen == shown

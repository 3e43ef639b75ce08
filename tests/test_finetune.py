"""finetune.py as users run it: the report, adapters, freezing, preferences, early stop, resume."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import COLOURS, NAMES, Call
from safetensors.torch import load_file

from papagaio.files import file_sha256
from papagaio.runs.directory import open_checkpoint
from papagaio.training.metrics import RunLog, read_metrics
from papagaio.training.progress import Progress


def tune(world: Path, out: Path, *more: object) -> list[object]:
    """A short fine-tuning of the world's base model."""
    rates = ("--learning_rate=0.01", "--embedding_learning_rate=0.1", "--head_learning_rate=0.005")
    known = [str(word).split("=")[0] for word in more]
    rates = [rate for rate in rates if not {"--lora_rank", "--learning_rate", "--data"} & set(known)]
    data = [] if "--data" in known else ["--data", world / "qa_train.jsonl"]
    short = ["--batch_size=20", "--sample_tokens=0", "--dtype=float32", "--val_fraction=0.1"]
    return ["--init_from", world / "base", "--out_dir", out, *data, *short, *rates, *more]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def newest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "last").read_text().strip()


def test_what_is_supervised_is_reported(world: Path, tmp_path: Path, call: Call) -> None:
    rows = [json.loads(line) for line in (world / "qa_train.jsonl").read_text().splitlines()]
    long = {"question": "why " * 100, "answer": "so"}
    extra = write(tmp_path / "extra.jsonl", rows[0], {"question": "q", "answer": ""}, long, {"question": "q", "answer": "new"})
    held_out = write(tmp_path / "val.jsonl", rows[3])
    table = tmp_path / "more.csv"
    table.write_text('question,answer,weight\n"Who, then?",me,2\n')
    data = [
        "--data",
        world / "qa_train.jsonl",
        f"{extra}:2",
        table,
        "--val_data",
        held_out,
        "--test_data",
        world / "qa_train.jsonl",
    ]
    status, out, err = call("finetune", *tune(world, tmp_path / "run", *data, "--max_steps=1"))
    assert status == 0, err
    said = err
    assert re.search(
        r"^21 conversations to train on, 1 held out; \d+ tokens, \d+ of them supervised; the longest has \d+", said, re.M
    )
    assert f"dropped, a duplicate: 1 ({extra}:1)" in said
    assert f"dropped, empty answer: 1 ({extra}:2)" in said
    assert f"dropped, longer than the context of 64 tokens: 1 ({extra}:3)" in said
    assert f"dropped, held out in --val_data: 1 ({world}/qa_train.jsonl:4)" in said
    assert "warning: 20 of the 20 --test_data questions are in --data with their answers" in said
    assert out.splitlines()[-1].startswith("held-out exact match ")


def test_preview_shows_examples_and_stops(world: Path, tmp_path: Path, call: Call) -> None:
    status, out, err = call("finetune", *tune(world, tmp_path / "run", "--preview=3"))
    assert status == 0, err
    lines = out.splitlines()
    assert len(lines) == 3
    shape = r"<\|endoftext\|><\|user\|>What is the flag of \w+\?<\|end\|><\|assistant\|>\[\[\w+\.<\|end\|>\]\]"
    assert all(re.fullmatch(shape, line) for line in lines)
    assert not (tmp_path / "run").exists()
    pairs = write(tmp_path / "pairs.jsonl", *({"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(9)))
    status, out, err = call("finetune", *tune(world, tmp_path / "run", "--data", pairs, "--preview=1", "--val_fraction=0.3"))
    assert re.fullmatch(r"chosen: .*\[\[a<\|end\|>\]\]\nrejected: .*\[\[b<\|end\|>\]\]\n", out)


def test_adapters_are_saved_alone_used_and_merged(world: Path, tmp_path: Path, call: Call) -> None:
    run = tmp_path / "lora"
    more = ["--lora_rank=4", "--max_steps=150", "--learning_rate=0.02", "--test_data", world / "qa_test.jsonl", "--lora_merge"]
    status, out, err = call("finetune", *tune(world, run, *more, "--replay_data", world / "data"))
    assert status == 0, err
    trained, total = re.search(r"([\d,]+) of ([\d,]+) parameters are trained \(\d+\.\d%\)", err).groups()
    adapters = load_file(newest(run) / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in adapters.values()) == int(trained.replace(",", "")) < int(total.replace(",", "")) / 4
    assert not (newest(run) / "model.safetensors").exists()
    right = int(re.search(r"held-out exact match \d\.\d+ \((\d+)/10\)", out)[1])
    assert right >= 7  # guessing gets a quarter
    assert re.search(r"held-out text of .*: \d\.\d{4} bits per byte before, \d\.\d{4} after \([+-]\d+\.\d%\)", out)
    question = f"What is the flag of {NAMES[25]}?"
    merged = load_file(run / "merged" / "model.safetensors")
    base = load_file(newest(world / "base") / "model.safetensors")
    assert merged.keys() == base.keys()
    assert torch.equal(merged["embed.weight"], base["embed.weight"])
    assert not torch.equal(merged["head.weight"], base["head.weight"])
    answers = {call("chat", "--checkpoint", path, "--ask", question)[1] for path in (run, run / "merged")}
    assert len(answers) == 1
    assert answers.pop().strip(".\n") in COLOURS


def test_adapters_without_the_head_learn_the_template(world: Path, tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    more = ["--lora_rank=4", "--lora_targets", "q", "v", "--max_steps=150", "--learning_rate=0.02", "--lora_merge"]
    status, out, err = call("finetune", *tune(world, run, *more, "--test_data", world / "qa_test.jsonl"))
    assert status == 0, err
    trained = int(re.search(r"([\d,]+) of [\d,]+ parameters are trained", err)[1].replace(",", ""))
    adapters = load_file(newest(run) / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in adapters.values()) == trained
    assert "answers that ended by themselves: 1.000" in out
    base, merged = (load_file(path / "model.safetensors")["head.weight"] for path in (newest(world / "base"), run / "merged"))
    assert (base != merged).any(1).sum() == 4  # system, user, assistant and end
    answers = {
        call("chat", "--checkpoint", path, "--ask", f"What is the flag of {NAMES[25]}?")[1] for path in (run, run / "merged")
    }
    assert len(answers) == 1
    assert answers.pop().strip(".\n") in COLOURS


def test_what_is_frozen_stays(world: Path, tmp_path: Path, call: Call) -> None:
    status, _, err = call("finetune", *tune(world, tmp_path / "run", "--freeze_layers=1", "--freeze_embeddings", "--max_steps=3"))
    assert status == 0, err
    before, after = (load_file(newest(run) / "model.safetensors") for run in (world / "base", tmp_path / "run"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("blocks.0.") or "embed" in name}


def test_without_packing_the_training_is_the_same(world: Path, tmp_path: Path, call: Call) -> None:
    losses = []
    for flag in ("true", "false"):
        run = tmp_path / flag
        status, _, err = call(
            "finetune", *tune(world, run, f"--packing={flag}", "--max_steps=6", "--log_interval=1", "--micro_batch_size=4")
        )
        assert status == 0, err
        losses.append([line.get("train_loss", line.get("val_loss")) for line in read_metrics(run / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def preferences(path: Path, count: int = 24) -> Path:
    """Short answers are to be preferred to long ones."""
    rows = [
        {"prompt": f"What is the flag of {name}?", "chosen": f"{colour}.", "rejected": f"{colour}, {colour}, of course!"}
        for name in NAMES[:count]
        for colour in ("red", "blue")
    ]
    return write(path, *rows)


def test_preferences_move_the_margin(world: Path, tmp_path: Path, call: Call) -> None:
    pairs, run = preferences(tmp_path / "pairs.jsonl"), tmp_path / "dpo"
    command = tune(world, run, "--data", pairs, "--max_steps=15", "--learning_rate=2e-4", "--log_interval=5", "--eval_interval=5")
    command[1] = world / "chat"
    status, _, err = call("finetune", *command, "--val_fraction=0.2")
    assert status == 0, err
    found = [line for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line]
    assert found[0]["val_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert found[0]["val_reward_margin"] == pytest.approx(0, abs=1e-4)
    assert found[-1]["val_loss"] < 0.6
    assert found[-1]["val_reward_accuracy"] > 0.9
    assert found[-1]["val_reward_margin"] > 0.2
    said = call("chat", "--checkpoint", run, "--ask", f"What is the flag of {NAMES[0]}?")[1]
    assert said.strip(".\n") in COLOURS
    assert "memory" in call("finetune", *command, "--val_fraction=0.2", "--overwrite", "--dry_run")[1]


def test_early_stop_keeps_the_best(world: Path, tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    wild = ["--learning_rate=0.3", "--embedding_learning_rate=3", "--head_learning_rate=1", "--weight_decay=0"]
    command = tune(world, run, *wild, "--max_steps=400", "--eval_interval=2", "--patience=3")
    status, _, err = call("finetune", *command)
    assert status == 0, err
    assert "stopped early: no lower validation loss in 3 evaluations" in err
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line]
    best = min(lines, key=lambda line: line["val_loss"])
    assert lines[-1]["step"] == best["step"] + 3 * 2 < 400
    assert (run / "checkpoints" / "best").read_text().strip() == f"step-{best['step']}"
    assert open_checkpoint(run).path == newest(run).with_name(f"step-{best['step']}"), "the run means its best checkpoint"
    assert call("finetune", *command, "--resume")[0] == 0
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == lines[-1]["step"]


def comparable(run: Path) -> dict[str, str]:
    return {str(path.relative_to(newest(run))): file_sha256(path) for path in newest(run).rglob("*") if path.is_file()}


def test_a_dry_run_that_measures_a_part_takes_frozen_layers_of_the_whole(
    world: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papagaio.training.dry_run.LARGEST_MEASURED", 0)  # one layer is measured, two are frozen
    status, out, err = call("finetune", *tune(world, tmp_path / "run", "--freeze_layers=2", "--dry_run"))
    assert status == 0, err
    assert out.splitlines()[-1].startswith("time: ")
    status, _, err = call("finetune", *tune(world, tmp_path / "run", "--freeze_layers=3", "--dry_run"))
    assert status == 2
    assert "--freeze_layers=3: the model has 2 blocks" in err


@pytest.mark.parametrize("kind", ["answers", "lora", "rows", "preferences"])
def test_resume_ends_where_an_uninterrupted_run_does(kind: str, world: Path, tmp_path: Path, call: Call) -> None:
    more: dict[str, list[object]] = {
        "answers": ["--dropout=0.1", "--replay_data", world / "data", "--micro_batch_size=4"],
        "lora": ["--lora_rank=2", "--dropout=0.1"],
        "rows": ["--lora_rank=2", "--lora_targets", "q", "v"],
        "preferences": ["--data", preferences(tmp_path / "pairs.jsonl"), "--learning_rate=2e-4", "--dropout=0.1"],
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = ["--max_steps=24", "--log_interval=4", "--eval_interval=8", "--checkpoint_interval=10", "--batch_size=8"]
    status, _, err = call("finetune", *tune(world, whole, *more[kind], *steps))
    assert status == 0, err
    command = tune(world, parts, *more[kind], *steps)
    write_line = RunLog.write

    def interrupt(self: RunLog, progress: Progress, **values: float) -> None:
        write_line(self, progress, **values)
        if progress.step == 12:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", interrupt)
        assert call("finetune", *command)[0] == 143
    assert newest(parts).name == "step-12"
    status, _, err = call("finetune", *command, "--resume")
    assert status == 0, err
    assert comparable(parts) == comparable(whole)

"""The whole path by the real scripts: prepare, train, fine-tune, sample, chat; and what they leave behind."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import NAMES, ROOT, Call, Script
from safetensors import safe_open

from model import GPT, GPTConfig
from papagaio.files import file_sha256
from papagaio.runs.directory import open_checkpoint
from papagaio.training.metrics import read_metrics

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--sample_tokens=0"]


def test_pretraining_learns_and_reports(world: Path) -> None:
    lines = read_metrics(world / "base" / "metrics.jsonl")
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 150, 300]
    assert evaluations[0]["val_loss"] > 5 > 1.7 > evaluations[-1]["val_loss"]
    assert all(line["val_bpb"] > 0 for line in evaluations)
    training = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in training] == list(range(20, 301, 20))
    assert all(
        {"tokens", "elapsed_seconds", "learning_rate", "grad_norm", "tokens_per_second"} <= line.keys() for line in training
    )
    assert training[-1]["tokens"] == 300 * 16 * 64
    assert training[-1]["learning_rate"] < training[0]["learning_rate"]


def test_a_run_explains_itself(world: Path) -> None:
    run = world / "base"
    options = tomllib.loads((run / "config.toml").read_text())
    assert options["n_embd"] == 64
    assert options["preset"] == "modern"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    name = (run / "checkpoints" / "last").read_text().strip()
    assert name == "step-300"
    checkpoint = run / "checkpoints" / name
    fields = json.loads((checkpoint / "model.json").read_text())
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(GPT(GPTConfig(**fields)).state_dict())
    manifest = json.loads((checkpoint / "manifest.json").read_text())["files"]
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()} - {"manifest.json"}
    assert files == set(manifest)
    assert all(file_sha256(checkpoint / name) == sha256 for name, sha256 in manifest.items())
    assert not list(run.rglob("*.tmp"))


def test_fine_tuning_answers_questions_never_asked(world: Path) -> None:
    lines = (world / "finetune.out").read_text().splitlines()
    found = re.fullmatch(r"held-out exact match (\d\.\d{3}) \((\d+)/10\)", lines[-1])
    assert found, lines[-1]
    assert int(found[2]) >= 8  # guessing gets a quarter
    assert any(re.fullmatch(r"flag +10 +\d\.\d{3}", line) for line in lines)
    assert any(line.startswith("never told, so guessed: exact match") for line in lines)
    assert sum(re.search(r" -> .*   (right|wrong, it is)", line) is not None for line in lines) == 10
    shown = (world / "finetune.err").read_text()
    assert re.search(r"<\|assistant\|>\[\[\w+\.<\|end\|>\]\]", shown), "the first example's mask"
    assert open_checkpoint(world / "chat").state["stage"] == "finetune"


def test_chat_prints_the_answer_alone(world: Path, script: Script) -> None:
    questions = [json.loads(line) for line in (world / "qa_test.jsonl").read_text().splitlines()]
    done = script("chat.py", "--checkpoint", world / "chat", "--ask", questions[0]["question"])
    assert done.returncode == 0
    assert re.fullmatch(r"(red|blue|green|gold)\.\n", done.stdout)
    talk = script("chat.py", "--checkpoint", world / "chat", stdin=f"{questions[0]['question']}\n\n{questions[1]['question']}\n")
    assert talk.returncode == 0
    assert len(re.findall(r"(red|blue|green|gold)\.", talk.stdout)) == 2


def test_chat_says_when_a_model_was_not_fine_tuned_and_forgets_what_does_not_fit(world: Path, script: Script) -> None:
    text = f"The flag of {NAMES[0]} is"
    done = script("chat.py", "--checkpoint", world / "base", "--ask", text, "--max_new_tokens=12", "--stop=.")
    assert done.stderr.count("not fine-tuned") == 1
    sampled = script(
        "sample.py", "--checkpoint", world / "base", "--prompt", text, "--max_new_tokens=12", "--stop=.", "--temperature=0"
    )
    assert text + done.stdout == sampled.stdout, "it completes"
    talk = script("chat.py", "--checkpoint", world / "chat", "--max_new_tokens=8", stdin="What is the flag of Aradornia?\n" * 5)
    assert "oldest turns were forgotten" in talk.stderr
    assert talk.returncode == 0


def test_sample_prints_prompt_and_completion_alone(world: Path, script: Script) -> None:
    command = ["sample.py", "--checkpoint", world / "base", "--prompt", f"The flag of {NAMES[0]} is", "--max_new_tokens=12"]
    done = script(*command, "--temperature=0", "--stop", ".")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout in {f"The flag of {NAMES[0]} is {colour}\n" for colour in ("red", "blue", "green", "gold")}
    several = script(*command, "--num_samples=3", "--temperature=2")
    samples = several.stdout.removesuffix("\n").split("\n" + "-" * 20 + "\n")
    assert len(samples) == 3
    assert all(sample.startswith(f"The flag of {NAMES[0]} is") for sample in samples)
    assert len(set(samples)) > 1
    assert script(*command, "--num_samples=3", "--temperature=2").stdout == several.stdout
    piped = script(*command[:3], "--prompt", "-", "--max_new_tokens=12", "--temperature=0", "--stop=.", stdin=command[4])
    assert piped.stdout == done.stdout
    assert script(*command[:3], "--max_new_tokens=5", "--top_k=0").returncode == 0  # no prompt, no filter


def test_a_closed_pipe_is_no_error(world: Path) -> None:
    command = f"{sys.executable} sample.py --checkpoint {world}/base --num_samples 50 --max_new_tokens 20 | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


def test_sampling_imports_nothing_heavy(world: Path, script: Script) -> None:
    done = script("-X", "importtime", "sample.py", "--checkpoint", world / "base", "--max_new_tokens=2", env={})
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "torch" in modules
    assert not modules & {"matplotlib", "wandb", "babel", "transformers", "torch._dynamo", "tomli_w", "pandas"}


def comparable(run: Path) -> dict[str, str]:
    name = (run / "checkpoints" / "last").read_text().strip()
    return {path.name: file_sha256(path) for path in (run / "checkpoints" / name).rglob("*") if path.is_file()}


def timeless(run: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in ("elapsed_seconds", "tokens_per_second")}
        for line in read_metrics(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["--dropout=0.1", "--micro_batch_size=2"],
        pytest.param(["--preset=gpt2"], marks=pytest.mark.slow),
        ["--preset=frontier", "--dtype=float16", "--dropout=0.1", "--activation_checkpointing"],
    ],
    ids=["modern", "gpt2", "frontier"],
)
def test_resume_ends_where_an_uninterrupted_run_does(world: Path, tmp_path: Path, script: Script, options: list[str]) -> None:
    command = ["train.py", "--data", world / "data", *SMALL, *options, "--max_steps=24", "--eval_interval=8", "--log_interval=4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert script(*command, "--out_dir", whole, "--checkpoint_interval=10").returncode == 0
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--out_dir", str(parts), "--checkpoint_interval=10"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("step 12/24 train_loss"):
            process.send_signal(signal.SIGTERM)
            break
    process.stderr.read()
    assert process.wait() in (143, 0)
    done = script(*command, "--out_dir", parts, "--checkpoint_interval=10", "--resume")
    assert done.returncode == 0, done.stderr
    assert comparable(parts) == comparable(whole)
    assert timeless(parts) == timeless(whole)


def test_a_signal_saves_and_ends_with_its_status(world: Path, tmp_path: Path, script: Script) -> None:
    command = [
        "train.py",
        "--data",
        world / "data",
        *SMALL,
        "--max_steps=100000",
        "--log_interval=1",
        "--out_dir",
        tmp_path / "run",
    ]
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [sys.executable, *map(str, command), "--resume"], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        for line in process.stderr:
            if "train_loss" in line:
                process.send_signal(number)
                break
        rest = process.stderr.read()
        assert process.wait() == status
        assert "Traceback" not in rest
        step = int(re.search(r"saved at step (\d+)", rest)[1])
        assert open_checkpoint(tmp_path / "run").state["step"] == step


def test_a_run_is_not_overwritten_unasked(world: Path, tmp_path: Path, call: Call) -> None:
    command = ["train", "--data", world / "data", *SMALL, "--max_steps=2", "--out_dir", tmp_path / "run"]
    assert call(*command)[0] == 0
    before = comparable(tmp_path / "run")
    status, _, err = call(*command)
    assert status == 2
    assert "--resume" in err
    assert comparable(tmp_path / "run") == before
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert call(*command, "--overwrite", "--seed=5")[0] == 0
    assert comparable(tmp_path / "run") != before
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    status, _, err = call(*command, "--resume", "--n_embd=64", "--max_steps=4", "--seed=5")
    assert status == 2
    assert "n_embd was 32, now it is 64" in err


def test_accumulation_gives_the_same_training(world: Path, tmp_path: Path, call: Call) -> None:
    losses = []
    for size in (4, 1):
        out = tmp_path / str(size)
        command = ["train", "--data", world / "data", *SMALL, "--max_steps=8", "--log_interval=1", "--out_dir", out]
        command.append("--dtype=float32")  # in bfloat16 batches of other sizes round otherwise
        assert call(*command, f"--micro_batch_size={size}")[0] == 0
        losses.append([line["train_loss"] for line in read_metrics(out / "metrics.jsonl") if "train_loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_best_and_last_name_checkpoints(world: Path, tmp_path: Path, call: Call) -> None:
    command = ["train", "--data", world / "data", *SMALL, "--out_dir", tmp_path / "run"]
    assert call(*command, "--max_steps=30", "--eval_interval=10", "--checkpoint_interval=7", "--keep=1")[0] == 0
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    named = {(tmp_path / "run" / "checkpoints" / name).read_text().strip() for name in ("last", "best")}
    assert kept == named
    assert "step-30" in named
    assert call("sample", "--checkpoint", tmp_path / "run" / "checkpoints" / "best", "--max_new_tokens=2")[0] == 0


def test_dry_run_prints_its_lines_and_writes_nothing(world: Path, tmp_path: Path, script: Script) -> None:
    done = script("train.py", "--data", world / "data", *SMALL, "--out_dir", tmp_path / "run", "--dry_run")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"parameters: \d{1,3}(,\d{3})*", lines[0])
    for word in ("memory", "FLOPs", "epochs", "time"):
        assert any(line.startswith(word) for line in lines), word
    assert not (tmp_path / "run").exists()


def test_wandb_offline_is_real_and_sends_no_paths(world: Path, tmp_path: Path, script: Script) -> None:
    run = tmp_path / "run"
    command = ["train.py", "--data", world / "data", *SMALL, "--max_steps=2", "--log_interval=1", "--out_dir", run]
    done = script(*command, "--wandb=offline", env={"SOME_TOKEN": "do-not-tell", "WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    (log,) = run.rglob("*.wandb")
    content = log.read_bytes()
    assert b"train_loss" in content
    for secret in (str(world), str(world / "data"), "do-not-tell", "SOME_TOKEN", str(Path.home())):
        assert secret.encode() not in content


def test_compiling_leaves_names_as_they_are(world: Path, tmp_path: Path) -> None:
    code = (
        "import torch; from model import GPT, GPTConfig\n"
        "m = GPT(GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16)); names = set(m.state_dict())\n"
        "m.compile(backend='eager'); ids = torch.arange(8)[None]; loss = m(ids, ids); loss.backward()\n"
        "assert set(m.state_dict()) == names and m.embed.weight.grad is not None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_training_says_so_and_goes_on(world: Path, tmp_path: Path, script: Script) -> None:
    environment = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = ["train.py", "--data", world / "data", *SMALL, "--max_steps=2", "--out_dir", tmp_path / "run", "--compile"]
    done = script(*command, env=environment)
    assert done.returncode == 0, done.stderr
    assert "not compiled, training goes on without: " in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "last").read_text().strip() == "step-2"


def test_overfitting_is_said_once_and_best_is_kept(tmp_path: Path, script: Script) -> None:
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=6000)))
    data, run = tmp_path / "data", tmp_path / "run"
    done = script("data/prepare.py", "--input", tmp_path / "text.txt", "--out", data, "--tokenizer=char", "--val_fraction=0.2")
    assert done.returncode == 0, done.stderr
    shape = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=32", "--batch_size=32", "--dtype=float32"]
    often = ["--max_steps=150", "--eval_interval=25", "--log_interval=25", "--sample_tokens=0", "--decay_fraction=0.1"]
    done = script("train.py", "--data", data, "--out_dir", run, *shape, *often)
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning: overfitting")]
    for word in ("--dropout", "--weight_decay", "--max_steps", "smaller model", "checkpoints/best keeps step"):
        assert word in warning
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min((line["val_loss"], line["step"]) for line in lines if "val_loss" in line)[1]
    assert (run / "checkpoints" / "best").read_text().strip() == f"step-{best}"
    assert best < 150
    assert lines[-1]["epoch"] == pytest.approx(150 * 32 * 32 / 4800, rel=0.1)


def test_float16_with_a_loss_scaler_learns_as_float32_and_resumes(world: Path, tmp_path: Path, script: Script) -> None:
    losses = {}
    for dtype in ("float32", "float16"):
        command = ["train.py", "--data", world / "data", *SMALL, "--out_dir", tmp_path / dtype, f"--dtype={dtype}"]
        done = script(*command, "--max_steps=12")
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / dtype / "metrics.jsonl").read_text().splitlines()]
        losses[dtype] = lines[-1]["val_loss"]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.03)
    state = json.loads((tmp_path / "float16" / "checkpoints" / "step-12" / "state.json").read_text())
    assert state["loss_scale"]["scale"] >= 1
    assert json.loads((tmp_path / "float32" / "checkpoints" / "step-12" / "state.json").read_text())["loss_scale"] is None


def test_several_datasets_in_one_run(world: Path, tmp_path: Path, script: Script) -> None:
    """The share of each is shown, val_loss is their mean by share, and a resumed run ends where an uninterrupted one does."""
    (tmp_path / "other.txt").write_text("Um papagaio verde fala pouco e pensa muito. " * 400)
    options = ("--tokenizer", world / "data", "--val_fraction=0.1")
    assert script("data/prepare.py", "--input", tmp_path / "other.txt", "--out", tmp_path / "other", *options).returncode == 0
    shape = ("--n_layer=1", "--n_head=1", "--n_embd=32", "--block_size=32", "--batch_size=4", "--eval_interval=4")
    command = ("train.py", "--data", f"{world / 'data'}:0.5", f"{tmp_path / 'other'}:3", *shape)
    done = script(*command, "--out_dir", tmp_path / "whole", "--max_steps=8")
    assert done.returncode == 0, done.stderr
    shares = [float(share) for share in re.findall(r"([\d.]+)% of the training windows", done.stderr)]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "val_loss" in line][-1]
    mean = shares[0] / 100 * last["val_loss/data"] + shares[1] / 100 * last["val_loss/other"]
    assert last["val_loss"] == pytest.approx(mean, abs=0.01)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-8")
    (tmp_path / "parts" / "checkpoints" / "last").write_text("step-4\n")
    assert script(*command, "--out_dir", tmp_path / "parts", "--max_steps=8", "--resume").returncode == 0
    weights = [(tmp_path / name / "checkpoints" / "step-8" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    changed = (*command[:2], f"{world / 'data'}:0.7", *command[3:])
    more = script(*changed, "--out_dir", tmp_path / "parts", "--resume", "--max_steps=9")
    assert more.returncode == 2
    assert "data_sha256" in more.stderr
    other = script("data/prepare.py", "--input", tmp_path / "other.txt", "--out", tmp_path / "bytes", "--tokenizer", "byte")
    assert other.returncode == 0
    refused = script("train.py", "--data", world / "data", tmp_path / "bytes", *shape, "--out_dir", tmp_path / "no")
    assert refused.returncode == 2
    assert "have different tokenizers" in refused.stderr


def test_resume_without_a_checkpoint_says_so_and_keeps_the_metrics(world: Path, tmp_path: Path, script: Script) -> None:
    shape = ("--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2", "--max_steps=1")
    command = ("train.py", "--data", world / "data", "--out_dir", tmp_path / "run", *shape, "--resume")
    done = script(*command)
    assert done.returncode == 0
    assert "no checkpoint to resume, the run starts from the beginning" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"next: sample.py --checkpoint {tmp_path / 'run'}")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "metrics.jsonl is kept as metrics.before-1.jsonl" in script(*command).stderr
    assert (tmp_path / "run" / "metrics.before-1.jsonl").read_bytes() == before


def test_a_run_whose_checkpoints_are_on_another_disk(world: Path, tmp_path: Path, script: Script) -> None:
    """checkpoints/ and the run itself may be links: --overwrite empties what they lead to and keeps them."""
    (tmp_path / "scratch" / "checkpoints").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "checkpoints").symlink_to(tmp_path / "scratch" / "checkpoints")
    shape = ("--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2", "--eval_interval=1", "--keep=1")
    command = ("train.py", "--data", world / "data", "--out_dir", tmp_path / "run", *shape, "--overwrite")
    for steps in (4, 2):
        done = script(*command, f"--max_steps={steps}")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / "checkpoints").is_symlink()
        assert (tmp_path / "scratch" / "checkpoints" / f"step-{steps}").is_dir()
    assert not (tmp_path / "scratch" / "checkpoints" / "step-4").exists()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    refused = script(*command[:3], "--out_dir", tmp_path / "gone", *shape)
    assert refused.returncode == 2
    assert "a link to" in refused.stderr

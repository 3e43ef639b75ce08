"""Seconds of a whole process until a validation loss is reached: ours, and beside it nanoGPT's on the same text.

    python bench/time_to_loss.py                                   ours alone, on tiny Shakespeare's characters
    python bench/time_to_loss.py --nanogpt ../nanoGPT --repeats 3  both in turn, A B A B, medians and their ratio

nanoGPT is a checkout outside this one (https://github.com/karpathy/nanoGPT); it runs with its README's CPU recipe. Prints a
table, then a JSON line a process.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.config import Options, UserError, option, parse, run
from papagaio.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
NANOGPT_RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


class TimeToLossOptions(Options):
    """Options of bench/time_to_loss.py."""

    text: Path = option(ROOT.parent / "shared/data/tinyshakespeare.txt", "the text; its last tenth is held out")
    configs: tuple[Path, ...] = option((Path("config/shakespeare_char.toml"),), "our training configurations")
    nanogpt: Path | None = option(None, "a checkout of nanoGPT to run in turn")
    repeats: int = option(3, "runs of each", ge=1)


def main(config: TimeToLossOptions) -> None:
    if not config.text.is_file():
        raise UserError(f"{config.text}: no such file; data/shakespeare.py fetches it, --text names it")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(config.repeats):
            results += [ours(path, config.text, Path(folder)) for path in config.configs]
            if config.nanogpt:
                results.append(nanogpt(config.nanogpt, config.text))
    names = list(dict.fromkeys(result["name"] for result in results))
    slowest = max(names, key=lambda name: median(results, name, "seconds"))
    print(f"{'':34} {'seconds':>8} {'steps':>7} {'ms a step':>10} {'tokens':>10} {'val loss':>9} {'ratio':>6}")
    for name in names:
        seconds, steps, tokens, loss = (median(results, name, key) for key in ("seconds", "steps", "tokens", "val_loss"))
        step_time, ratio = median(results, name, "ms_per_step"), seconds / median(results, slowest, "seconds")
        print(f"{name:34} {seconds:8.1f} {steps:7,.0f} {step_time:10.1f} {tokens:10,.0f} {loss:9.4f} {ratio:6.3f}")
    for result in results:
        print(json.dumps(result))


def median(results: list[dict[str, Any]], name: str, key: str) -> float:
    return statistics.median(result[key] for result in results if result["name"] == name)


def ours(toml: Path, text: Path, folder: Path) -> dict[str, Any]:
    """One process of train.py; the data are prepared before, as nanoGPT's are."""
    data = folder / "data"
    if not data.exists():
        prepare = ["data/prepare.py", "--input", text, "--out", data, "--tokenizer", "char", "--val_fraction", "0.1"]
        subprocess.run([sys.executable, *map(str, prepare)], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    command = ["train.py", str(toml), "--data", str(data), "--out_dir", str(folder / "run"), "--overwrite"]
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    training = [line for line in lines if "train_loss" in line]
    steps, tokens = training[-1]["step"], training[-1]["tokens"]
    step_time = 1000 * statistics.median(tokens / steps / line["tokens_per_second"] for line in training)
    loss = min(line["val_loss"] for line in lines if "val_loss" in line)
    return {"name": toml.stem, "seconds": seconds, "steps": steps, "ms_per_step": step_time, "tokens": tokens, "val_loss": loss}


def nanogpt(checkout: Path, text: Path) -> dict[str, Any]:
    """One process of nanoGPT's train.py."""
    data = checkout / "data" / "shakespeare_char"
    if not (data / "train.bin").exists():
        shutil.copy(text, data / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)
    start = time.perf_counter()
    command = [sys.executable, "train.py", *NANOGPT_RECIPE.split()]
    out = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    losses = [float(x) for x in re.findall(r"val loss ([\d.]+)", out)]
    times = [float(x) for x in re.findall(r"time ([\d.]+)ms", out)]
    step_time = statistics.median(times)
    return {
        "name": "nanoGPT",
        "seconds": seconds,
        "steps": 2000,
        "ms_per_step": step_time,
        "tokens": 2000 * 12 * 64,
        "val_loss": min(losses),
    }


if __name__ == "__main__":
    run(main, parse(TimeToLossOptions, doc=__doc__))

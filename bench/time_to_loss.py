"""Seconds of a whole process until a validation loss is reached: ours, and beside it a peer's on the same split.

    python bench/time_to_loss.py                                   ours alone, on tiny Shakespeare's characters
    python bench/time_to_loss.py --nanogpt ../nanoGPT --repeats 3  both in turn, A B A B, medians and their ratio
    python bench/time_to_loss.py --nanochat ../nanochat --text out/python_docs/corpus.jsonl --configs config/python_docs.toml

nanoGPT and nanochat are checkouts outside this one (https://github.com/karpathy/...). nanoGPT runs with its README's CPU recipe.
nanochat runs 250 steps at depth 4 with a vocabulary of 4,096 that it trains itself on the same training documents; its seconds
are those that it counts itself: training alone, after its first ten steps, without evaluation and compilation. Ours are
those of the whole process, start and evaluations included. Prints a table, then a JSON line a process.
"""

import json
import math
import os
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from papagaio.corpus.dataset import Dataset
from papagaio.errors import UserError, run
from papagaio.options import Options, option, parse
from papagaio.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
NANOGPT_RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
NANOCHAT_RECIPE = (
    "-m scripts.base_train --depth=4 --max-seq-len=256 --device-batch-size=16 --total-batch-size=4096 --num-iterations=250 "
    "--eval-every=250 --eval-tokens=98304 --core-metric-every=-1 --sample-every=-1 --window-pattern=L --model-tag=papagaio_bench"
)


class TimeToLossOptions(Options):
    """Options of bench/time_to_loss.py."""

    text: Path = option(ROOT.parent / "shared/data/tinyshakespeare.txt", "the text; its last tenth is held out")
    configs: tuple[Path, ...] = option((Path("config/shakespeare_char.toml"),), "our training configurations")
    nanogpt: Path | None = option(None, "a checkout of nanoGPT to run in turn")
    nanochat: Path | None = option(None, "a checkout of nanochat to run in turn; with a corpus of several documents")
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
            if config.nanochat:
                results.append(nanochat(config.nanochat.resolve(), Path(folder)))
    names = list(dict.fromkeys(result["name"] for result in results))
    slowest = max(names, key=lambda name: median(results, name, "seconds"))
    reference = next((name for name in names if name.startswith("nano")), slowest)
    print(f"{'':34} {'seconds':>8} {'steps':>7} {'ms a step':>10} {'tokens':>10} {'val loss':>9} {'val bpb':>8} {'ratio':>6}")
    for name in names:
        keys = ("seconds", "steps", "tokens", "val_loss", "val_bpb")
        seconds, steps, tokens, loss, bpb = (median(results, name, key) for key in keys)
        step_time, ratio = median(results, name, "ms_per_step"), seconds / median(results, reference, "seconds")
        print(f"{name:34} {seconds:8.1f} {steps:7,.0f} {step_time:10.1f} {tokens:10,.0f} {loss:9.4f} {bpb:8.4f} {ratio:6.3f}")
    for result in results:
        print(json.dumps(result))


def median(results: list[dict[str, Any]], name: str, key: str) -> float:
    return statistics.median(result[key] for result in results if result["name"] == name)


def ours(toml: Path, text: Path, folder: Path) -> dict[str, Any]:
    """One process of train.py; the data are prepared before, as nanoGPT's are."""
    data = folder / "data"
    if not data.exists():
        characters = ("--tokenizer=char", "--val_fraction=0.1")
        how = characters if text.suffix == ".txt" else ("--tokenizer=bpe", "--vocab_size=4096")
        prepare = ["data/prepare.py", "--input", text, "--out", data, *how]
        subprocess.run([sys.executable, *map(str, prepare)], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    command = ["train.py", str(toml), "--data", str(data), "--out_dir", str(folder / "run"), "--overwrite"]
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    training = [line for line in lines if "train_loss" in line]
    steps, tokens = training[-1]["step"], training[-1]["tokens"]
    step_time = 1000 * statistics.median(tokens / steps / line["tokens_per_second"] for line in training)
    loss, bpb = (min(line[key] for line in lines if key in line) for key in ("val_loss", "val_bpb"))
    result = {"name": toml.stem, "seconds": seconds, "steps": steps, "ms_per_step": step_time, "tokens": tokens}
    return result | {"val_loss": loss, "val_bpb": bpb}


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
        "val_bpb": min(losses) / math.log(2),  # a character is a byte there
    }


def nanochat(checkout: Path, folder: Path) -> dict[str, Any]:
    """One process of nanochat's base_train, on the documents of our splits and a tokenizer of its own."""
    home = folder / "nanochat"
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(home), "WANDB_MODE": "disabled"}

    def python(words: str) -> str:
        command = [sys.executable, *words.split()]
        return subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True, text=True).stdout

    if not home.exists():
        dataset = Dataset(folder / "data")
        parquet = home / "base_data_climbmix"
        parquet.mkdir(parents=True)
        for split, name in (("train", "shard_00000.parquet"), ("val", "shard_00001.parquet")):  # the last file is held out
            tokens = np.concatenate(dataset.shards(split))
            starts = np.flatnonzero(tokens == dataset.tokenizer.start)[1:]
            texts = [dataset.tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts)]
            pq.write_table(pa.table({"text": texts}), parquet / name, row_group_size=64)
        python("-m scripts.tok_train --vocab-size=4096")
    out = python(NANOCHAT_RECIPE)
    seconds = 60 * float(re.findall(r"Total training time: ([\d.]+)m", out)[-1])
    step_time = statistics.median(float(x) for x in re.findall(r"dt: ([\d.]+)ms", out))
    bpb = float(re.findall(r"Validation bpb: ([\d.]+)", out)[-1])
    result = {"name": "nanochat", "seconds": seconds, "steps": 250, "ms_per_step": step_time, "tokens": 250 * 4096}
    return result | {"val_loss": math.nan, "val_bpb": bpb}


if __name__ == "__main__":
    run(main, parse(TimeToLossOptions, doc=__doc__))

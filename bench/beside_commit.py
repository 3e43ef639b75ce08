"""This checkout beside another commit's: training speed of each preset, and the time to the first output, in turn.

    git worktree add ../before COMMIT
    python bench/beside_commit.py --other ../before --data out/atlas/data --presets modern gpt2 frontier --turns 4
    python bench/beside_commit.py --other ../before --data out/atlas/data --presets modern --compile --turns 2

Both run their own train.py on the same dataset with the Python that runs this. Speed is the median of tokens_per_second in
metrics.jsonl, without the first lines. Prints both medians and the median ratio of the pairs, this checkout over the other.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.errors import run
from papagaio.options import Options, option, parse

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "--n_layer=3 --n_head=3 --n_embd=192 --block_size=128 --batch_size=16"
QUIET = "--eval_interval=100000 --eval_tokens=256 --checkpoint_interval=0 --sample_tokens=0 --log_interval=5 --overwrite"


class BesideOptions(Options):
    """Options of bench/beside_commit.py."""

    other: Path = option(..., "checkout of the other commit")
    data: Path = option(..., "dataset directory that both can read")
    presets: tuple[Literal["modern", "gpt2", "frontier"], ...] = option(("modern", "gpt2", "frontier"), "presets to train")
    compile: bool = option(False, "train with --compile")
    steps: int = option(60, "training steps of a run", ge=20)
    turns: int = option(4, "runs of each side", ge=1)


def main(config: BesideOptions) -> None:
    sides = {"other": config.other.resolve(), "this": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in sides}

        def train(name: str, preset: str) -> float:
            paths = ["--data", str(config.data.resolve()), "--out_dir", str(runs[name])]
            more = [f"--preset={preset}", f"--max_steps={config.steps}", *SHAPE.split(), *QUIET.split()]
            script(sides[name], ["train.py", *paths, *more, *["--compile"] * config.compile])
            lines = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
            return statistics.median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line][2:])

        for preset in config.presets:
            report(
                f"train.py, {preset}, tokens/s", [{name: train(name, preset) for name in turn(i)} for i in range(config.turns)]
            )
        first = {name: ["sample.py", "--checkpoint", str(runs[name]), "--max_new_tokens=1"] for name in sides}
        help_ = {name: ["train.py", "--help"] for name in sides}
        for label, commands in (("train.py --help", help_), ("sample.py, a token", first)):
            rows = [{name: script(sides[name], commands[name]) for name in turn(i)} for i in range(config.turns)]
            report(f"{label}, seconds", rows)


def turn(number: int) -> list[str]:
    return ["other", "this"] if number % 2 == 0 else ["this", "other"]


def script(checkout: Path, words: list[str]) -> float:
    """Run a script of a checkout; returns the seconds that it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=checkout, check=True, capture_output=True)
    return time.perf_counter() - start


def report(label: str, rows: list[dict[str, float]]) -> None:
    medians = {name: statistics.median(row[name] for row in rows) for name in ("other", "this")}
    ratios = [row["this"] / row["other"] for row in rows]
    print(
        f"{label}: {medians['other']:,.4g} -> {medians['this']:,.4g}, ratio {statistics.median(ratios):.3f} of {len(rows)} pairs"
    )


if __name__ == "__main__":
    run(main, parse(BesideOptions, doc=__doc__))

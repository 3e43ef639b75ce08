"""Training speed of several processes with one thread each (torchrun) beside one process with as many threads, in turn.

    python bench/parallel_speed.py --data out/python_docs/data
    python bench/parallel_speed.py --data out/python_docs/data --processes 4 --batch_size 32

Prints the tokens per second of each turn, and the median ratio of a turn of several processes to the turn before of one.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.errors import run
from papagaio.options import Options, option, parse
from papagaio.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


class ParallelSpeedOptions(Options):
    """Options of bench/parallel_speed.py."""

    data: Path = option(..., "dataset directory, made by data/prepare.py")
    processes: int = option(2, "processes, and threads of the single process", ge=2)
    turns: int = option(3, "turns of each side", ge=1)
    max_steps: int = option(30, "steps of a turn; the first third is not counted", ge=9)
    n_layer: int = option(6, "blocks", ge=1)
    n_head: int = option(6, "attention heads", ge=1)
    n_embd: int = option(384, "channels", ge=1)
    block_size: int = option(256, "context length, in tokens", ge=1)
    batch_size: int = option(16, "sequences of one step", ge=1)
    dtype: str = option("float32", "of the products")


def tokens_per_second(config: ParallelSpeedOptions, processes: int) -> float:
    """The median of a short run's steps."""
    shape = config.model_dump(include={"n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_steps", "dtype"})
    with tempfile.TemporaryDirectory() as folder:
        argv = ["train.py", f"--data={config.data.resolve()}", f"--out_dir={folder}/run", "--device=cpu", "--log_interval=1"]
        argv += [f"--{name}={value}" for name, value in shape.items()]
        argv += [f"--eval_interval={config.max_steps}", "--eval_tokens=256", "--sample_tokens=0"]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        environment = os.environ | {"OMP_NUM_THREADS": str(config.processes // processes)}
        subprocess.run([sys.executable, *launcher, *argv], cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
        lines = [line for line in read_metrics(Path(folder, "run", "metrics.jsonl")) if "tokens_per_second" in line]
    return statistics.median(line["tokens_per_second"] for line in lines if line["step"] > config.max_steps / 3)


def main(config: ParallelSpeedOptions) -> None:
    ratios = []
    for _ in range(config.turns):
        one, several = (tokens_per_second(config, processes) for processes in (1, config.processes))
        ratios.append(several / one)
        print(
            f"1 process of {config.processes} threads {one:,.0f} tokens/s, {config.processes} of one {several:,.0f}", flush=True
        )
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    run(main, parse(ParallelSpeedOptions, doc=__doc__))

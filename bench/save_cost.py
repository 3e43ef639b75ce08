"""What saving takes from training, at GPT-2's 124M shape.

    python bench/save_cost.py                       prints JSON lines; 124M parameters need about 5 GB of memory
    python bench/save_cost.py --steps 8 --turns 3

Blocks of steps without and with a save in their midst, in turn, in one process; a block with a save also waits until it is
on the disk. `held_up` is the time in which no step can run; `cost` what a save adds to its block, contention for cores and memory
included, and `share` that of ten minutes, the interval of a long run.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model import GPT, PRESETS, GPTConfig
from papagaio import runtime
from papagaio.runs.saver import Saver
from papagaio.tokenizer import ByteTokenizer
from papagaio.training.metrics import RunLog
from papagaio.training.optimizers import make_optimizers
from papagaio.training.options import RunOptions
from papagaio.training.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="gpt2")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="AdamW's checkpoints are the larger ones")
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--steps", type=int, default=6, help="in a block")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured (default: the system's)")
    options = parser.parse_args()

    device = runtime.pick_device(options.device)
    dtype = runtime.pick_dtype("auto", device)
    runtime.keep_memory()
    torch.manual_seed(0)
    shape = {"vocab_size": 50262, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    model = GPT(GPTConfig(**shape, **PRESETS[options.preset])).to(device)
    ids = torch.randint(50257, (1, options.tokens), device=device)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        config = RunOptions(out_dir=Path(folder), optimizer=options.optimizer, keep=1)
        optimizers = make_optimizers(model, config)

        def step() -> None:
            with runtime.autocast(device, dtype):
                loss = model(ids, ids)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)

        with RunLog(config, Progress()) as log, Saver(config, ByteTokenizer(), log, None) as saver:
            number = 0

            def block(saving: bool) -> tuple[float, float]:
                nonlocal number
                runtime.synchronize(device)
                started, held_up = time.perf_counter(), 0.0
                for i in range(options.steps):
                    if saving and i == 1:
                        runtime.synchronize(device)
                        number, before = number + 1, time.perf_counter()
                        saver.save(model, optimizers, {"step": number})
                        held_up = time.perf_counter() - before
                    step()
                runtime.synchronize(device)
                seconds = time.perf_counter() - started
                saver.wait()
                return seconds, held_up

            block(False)
            first = block(True)  # makes room for the copy, once
            rows = [(block(False)[0], *block(True)) for _ in range(options.turns)]
            size = sum(path.stat().st_size for path in (saver.directory / f"step-{number}").rglob("*") if path.is_file())
    cost = statistics.median(with_save - without for without, with_save, _ in rows)
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "preset": options.preset,
                "optimizer": options.optimizer,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "checkpoint_MiB": round(size / 2**20),
                "step_seconds": round(statistics.median(row[0] for row in rows) / options.steps, 3),
                "held_up_first_seconds": round(first[1], 3),
                "held_up_seconds": round(statistics.median(row[2] for row in rows), 3),
                "cost_seconds": round(cost, 3),
                "share_of_ten_minutes": round(cost / 600, 5),
                "blocks": [[round(value, 3) for value in row] for row in rows],
            }
        )
    )


if __name__ == "__main__":
    main()

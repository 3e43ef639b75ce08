"""Fine-tuning speed and memory: packed rows beside padded ones, adapters beside all weights.

    python bench/finetune_speed.py --init_from out/demo_base --data out/atlas/qa_train.jsonl

The sides take turns of some steps, A B A B, in one process, on the same conversations of each step:

    packed               several conversations in a row as wide as the context, each seeing itself alone (what finetune.py does)
    padded, context      a row a conversation, as wide as the context (what static shapes ask for)
    padded, batch        a row a conversation, as wide as the longest of the step (TRL's and litgpt's default)
    padded, sorted       as wide as the longest of a quarter of the step, conversations of like length together
    packed, LoRA         packed, adapters of rank 8 in all linear layers

Peak memory is that of a process of its own for each side. Prints a table, then a JSON line a side.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from finetune import RECIPES, FinetuneOptions, restrict
from model import GPT, GPTConfig
from papagaio import runtime
from papagaio.batches.packing import Example, Mixture, arrange, collate, encode, supervised_weight
from papagaio.batches.questions import read_conversations
from papagaio.batches.windows import Batch, likelihood
from papagaio.errors import run
from papagaio.options import Options, option, parse
from papagaio.report import Report
from papagaio.runs.directory import open_checkpoint
from papagaio.training.optimizers import make_optimizers
from papagaio.training.progress import Progress
from papagaio.training.step import TrainingStep, prepare_model

SIDES = ("packed", "padded, context", "padded, batch", "padded, sorted", "packed, LoRA")


class FinetuneSpeedOptions(Options):
    """Options of bench/finetune_speed.py."""

    init_from: Path = option(..., "checkpoint to start from: a run, or a checkpoint directory")
    data: Path = option(..., "questions and answers")
    batch_size: int = option(64, "conversations of a step", ge=1)
    turns: int = option(5, "turns of each side", ge=1)
    steps: int = option(4, "steps of a turn", ge=1)
    only: str | None = option(None, "measure this side alone (used for its memory)")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")


def main(config: FinetuneSpeedOptions) -> None:
    device = runtime.pick_device(config.device)
    runtime.keep_memory()
    if config.only is not None:
        step = make_side(config.only, config, device)
        for number in range(3):
            step(number)
        peak = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        print(peak)
        return
    memory = {name: memory_of(name) for name in SIDES}
    sides = {name: make_side(name, config, device) for name in SIDES}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    supervised: dict[str, int] = dict.fromkeys(SIDES, 0)
    for step in sides.values():
        step(0)
    number = 1
    for _ in range(config.turns):
        for name, step in sides.items():
            runtime.synchronize(device)
            start = time.perf_counter()
            supervised[name] += sum(step(number + i) for i in range(config.steps))
            runtime.synchronize(device)
            seconds[name].append((time.perf_counter() - start) / config.steps)
        number += config.steps
    results = []
    for name in SIDES:
        step_seconds = statistics.median(seconds[name])
        speed = supervised[name] / config.turns / config.steps / step_seconds
        results.append(
            {"side": name, "seconds_per_step": step_seconds, "supervised_tokens_per_second": speed, "peak_memory": memory[name]}
        )
    first = results[0]["supervised_tokens_per_second"]
    for result in results:
        speed = result["supervised_tokens_per_second"]
        print(
            f"{result['side']:18} {1000 * result['seconds_per_step']:8.1f} ms a step {speed:10,.0f} supervised tokens/s, packed "
            f"{first / speed:5.2f} times it  {result['peak_memory'] / 2**20:8,.0f} MiB"
        )
    for result in results:
        print(json.dumps(result))


def memory_of(side: str) -> int:
    """Peak memory in bytes of three steps of a side, in a process of its own."""
    words = [sys.executable, *sys.argv, f"--only={side}"]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return int(done.stdout.split()[-1])


def make_side(side: str, config: FinetuneSpeedOptions, device: torch.device) -> Callable[[int], int]:
    """A step of one side: trains, and returns how many supervised tokens it had."""
    checkpoint = open_checkpoint(config.init_from)
    block_size = checkpoint.model_fields["block_size"]
    examples = encode(read_conversations(config.data), checkpoint.tokenizer, block_size, Report())
    mixture = Mixture([len(examples)], [1.0], 0)
    recipe = (
        RECIPES["lora"]
        if "LoRA" in side
        else {"optimizer": checkpoint.state["optimizer"]} | RECIPES[checkpoint.state["optimizer"]]
    )
    options = FinetuneOptions(
        **recipe, init_from=config.init_from, data=(str(config.data),), out_dir=Path("none"), lora_rank=8 if "LoRA" in side else 0
    )
    model = GPT(GPTConfig(**checkpoint.model_fields))
    checkpoint.load_model(model)
    restrict(model, options).to(device)
    prepare_model(model, options)
    train_step = TrainingStep(model, make_optimizers(model, options), likelihood, options, Progress())

    def step(number: int) -> int:
        chosen = [examples[i] for i in mixture(number * config.batch_size, (number + 1) * config.batch_size)]
        train_step(batches_of(side, chosen, block_size))
        return sum(int(example.supervised[1:].sum()) for example in chosen)

    return step


def batches_of(side: str, chosen: list[Example], block_size: int) -> list[Batch]:
    """The conversations of a step as batches, arranged as the side has it."""
    total = supervised_weight(chosen)
    if side.startswith("packed"):
        return [collate(*arrange(chosen, block_size, packing=True), total)]
    if side == "padded, context":
        batches = [collate([[example] for example in chosen], block_size, total)]
    elif side == "padded, batch":
        batches = [collate(*arrange(chosen, block_size, packing=False), total)]
    else:
        ordered, size = sorted(chosen, key=lambda example: example.length), max(1, len(chosen) // 4)
        batches = [
            collate(*arrange(ordered[i : i + size], block_size, packing=False), total) for i in range(0, len(ordered), size)
        ]
    return [batch._replace(doc_ids=None) for batch in batches]  # a row is one conversation: causal attention needs no mask


if __name__ == "__main__":
    run(main, parse(FinetuneSpeedOptions, doc=__doc__))

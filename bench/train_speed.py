"""Training speed for one shape: ours, and beside it nanoGPT's model in its own loop, in turn on the same data.

    python bench/train_speed.py --data out/python_docs/data --n_layer 6 --n_head 6 --n_embd 384 --block_size 256 --batch_size 8
    python bench/train_speed.py ... --nanogpt ../nanoGPT --compile

Each side's step is that of its train.py: fetch a batch, forward, backward, clip, optimizer, in that order. The sides take turns
of some steps, A B A B, in one process. Prints tokens a second, the ratio to the best nanoGPT there is, and, where the chip is
known, MFU; then a JSON line a side.
"""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model import GPT, PRESETS, GPTConfig
from papagaio import runtime
from papagaio.config import Options, RunOptions, UserError, option, parse, run
from papagaio.loader import Ahead, WindowLoader
from papagaio.optim import make_optimizers
from papagaio.shards import Dataset
from train import RECIPES


class TrainSpeedOptions(Options):
    """Options of bench/train_speed.py."""

    data: Path = option(..., "dataset directory, made by data/prepare.py")
    presets: tuple[Literal["modern", "gpt2"], ...] = option(("gpt2", "modern"), "ours to measure")
    nanogpt: Path | None = option(None, "a checkout of nanoGPT to run in turn")
    compile: bool = option(False, "measure each side compiled as well")
    n_layer: int = option(6, "blocks", ge=1)
    n_head: int = option(6, "attention heads", ge=1)
    n_embd: int = option(384, "channels", ge=1)
    block_size: int = option(256, "context length, in tokens", ge=1)
    batch_size: int = option(8, "sequences of one step", ge=1)
    turns: int = option(5, "turns of each side", ge=1)
    steps: int = option(4, "steps of a turn", ge=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")


def main(config: TrainSpeedOptions) -> None:
    device = runtime.pick_device(config.device)
    dataset = Dataset(config.data)
    sides: dict[str, Callable[[int], None]] = {}
    for compiled in (False, True) if config.compile else (False,):
        name = ", compiled" if compiled else ""
        for preset in config.presets:
            sides[f"ours, {preset}{name}"] = ours(config, preset, dataset, device, compiled)
        if config.nanogpt:
            sides[f"nanoGPT{name}"] = nanogpt(config, dataset, device, compiled)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for step in sides.values():  # warm up, and compile
        step(0)
        step(1)
    runtime.synchronize(device)
    number = 2
    for _ in range(config.turns):
        for name, step in sides.items():
            start = time.perf_counter()
            for i in range(config.steps):
                step(number + i)
            runtime.synchronize(device)
            seconds[name].append((time.perf_counter() - start) / config.steps)
        number += config.steps

    tokens = config.batch_size * config.block_size
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = min((value for name, value in medians.items() if name.startswith("nanoGPT")), default=None)
    peak = runtime.peak_flops(device)
    flops = GPT(model_config(config, "gpt2", dataset)).flops_per_token()
    for name, value in medians.items():
        mfu = f"  MFU {tokens / value * flops / peak:.3f}" if peak else ""
        ratio = f"  {reference / value:5.2f} of nanoGPT's best" if reference else ""
        print(f"{name:24} {1000 * value:9.1f} ms a step {tokens / value:12,.0f} tokens/s{ratio}{mfu}")
    for name, value in medians.items():
        result = {"side": name, "seconds_per_step": value, "tokens_per_second": tokens / value, "all": seconds[name]}
        print(json.dumps(result | config.model_dump(include={"n_layer", "n_head", "n_embd", "block_size", "batch_size"})))


def model_config(config: TrainSpeedOptions, preset: str, dataset: Dataset) -> GPTConfig:
    shape = config.model_dump(include={"n_layer", "n_head", "n_embd", "block_size"})
    return GPTConfig(vocab_size=dataset.tokenizer.vocab_size, **shape, **PRESETS[preset])


def ours(config: TrainSpeedOptions, preset: str, dataset: Dataset, device: torch.device, compiled: bool) -> Callable[[int], None]:
    """A step as train.fit takes it."""
    torch.manual_seed(0)
    model = GPT(model_config(config, preset, dataset)).to(device)
    optimizers = make_optimizers(model, RunOptions(out_dir=Path("none"), **RECIPES[preset]))
    if compiled:
        model.compile()
    dtype = runtime.pick_dtype("auto", device)
    batches = Ahead(WindowLoader(dataset, "train", config.block_size, config.batch_size, 0), device)

    def step(number: int) -> None:
        for batch in batches(number):
            with runtime.autocast(device, dtype):
                loss = model(*batch.to(device))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def nanogpt(config: TrainSpeedOptions, dataset: Dataset, device: torch.device, compiled: bool) -> Callable[[int], None]:
    """A step as nanoGPT's train.py takes it, with its model and optimizer."""
    theirs: Any = load(config.nanogpt / "model.py")
    torch.manual_seed(0)
    shape = config.model_dump(include={"n_layer", "n_head", "n_embd", "block_size"})
    vocab_size = GPTConfig(vocab_size=dataset.tokenizer.vocab_size).padded_vocab_size  # padded by hand, as its README does
    model = theirs.GPT(theirs.GPTConfig(vocab_size=vocab_size, dropout=0.0, bias=False, **shape)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    whole = model
    if compiled:
        model = torch.compile(model)
    dtype = runtime.pick_dtype("auto", device) if device.type == "cuda" else torch.float32  # as its train.py chooses
    data = dataset.shards("train")[0]

    def fetch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(data) - config.block_size, (config.batch_size,)).tolist()
        rows = [torch.from_numpy(data[i : i + config.block_size + 1].astype("int64")) for i in starts]
        x, y = (torch.stack([row[part] for row in rows]) for part in (slice(0, -1), slice(1, None)))
        if device.type == "cuda":
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)

    waiting = [fetch()]

    def step(number: int) -> None:
        x, y = waiting.pop()
        with runtime.autocast(device, dtype):
            _, loss = model(x, y)
        waiting.append(fetch())  # while the device computes the forward pass
        loss.backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def load(path: Path) -> ModuleType:
    """A Python file of another project as a module."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; --nanogpt names a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    run(main, parse(TrainSpeedOptions, doc=__doc__))

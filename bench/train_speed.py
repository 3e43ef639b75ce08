"""Training speed for one shape: ours, and beside it nanoGPT's and nanochat's model, each in its own loop's steps, in turn on
the same data.

    python bench/train_speed.py --data out/python_docs/data --n_layer 6 --n_head 6 --n_embd 384 --block_size 256 --batch_size 8
    python bench/train_speed.py ... --nanogpt ../nanoGPT --nanochat ../nanochat --compile
    python bench/train_speed.py ... --growth                      the same model from 1 M to 50 M parameters (GPU: 10 M to 1 B)

Each side's step is that of its train.py: fetch a batch, forward, backward, clip, optimizer, in that order. The sides take turns
of some steps, A B A B, in one process. Prints tokens a second, the ratio to the best step of a peer, peak memory (of a process
of its own for each side on a CPU) and, where the chip is known, MFU; then a JSON line a side.
"""

import functools
import importlib
import importlib.util
import json
import resource
import statistics
import subprocess
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
from papagaio.batches.prefetch import Prefetch
from papagaio.batches.windows import WindowLoader, likelihood
from papagaio.corpus.dataset import Dataset
from papagaio.errors import UserError, run
from papagaio.options import Options, option, parse
from papagaio.training.metrics import flops_per_token
from papagaio.training.optimizers import make_optimizers
from papagaio.training.options import RunOptions
from papagaio.training.progress import Progress
from papagaio.training.step import TrainingStep, prepare_model
from train import RECIPES


class TrainSpeedOptions(Options):
    """Options of bench/train_speed.py."""

    data: Path = option(..., "dataset directory, made by data/prepare.py")
    presets: tuple[Literal["modern", "gpt2", "frontier"], ...] = option(("gpt2", "modern", "frontier"), "ours to measure")
    nanogpt: Path | None = option(None, "a checkout of nanoGPT to run in turn")
    nanochat: Path | None = option(None, "a checkout of nanochat to run in turn; it compiles its optimizer by itself")
    growth: bool = option(False, "measure growing models instead: n_layer and n_head follow from the width")
    only: str | None = option(None, "measure this side alone (used for its memory)")
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
    runtime.keep_memory()
    if config.growth:
        growth(config, dataset, device)
        return
    makers: dict[str, Callable[[], Callable[[int], None]]] = {}
    for compiled in (False, True) if config.compile else (False,):
        name = ", compiled" if compiled else ""
        for preset in config.presets:
            makers[f"ours, {preset}{name}"] = functools.partial(ours, config, preset, dataset, device, compiled)
        if config.nanogpt:
            makers[f"nanoGPT{name}"] = functools.partial(nanogpt, config, dataset, device, compiled)
        if config.nanochat:
            makers[f"nanochat{name}"] = functools.partial(nanochat, config, dataset, device, compiled)
    if config.only is not None:
        step = makers[config.only]()
        step(0), step(1)
        print(peak_memory(device))
        return
    memory = {side: memory_of(side) for side in makers}
    sides = {side: make() for side, make in makers.items()}
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
    reference = min((value for name, value in medians.items() if name.startswith("nano")), default=None)
    peak = runtime.peak_flops(device)
    flops = flops_per_token(GPT(model_config(config, "gpt2", dataset)))
    for name, value in medians.items():
        mfu = f"  MFU {tokens / value * flops / peak:.3f}" if peak else ""
        ratio = f"  {reference / value:5.2f} of the peers' best" if reference else ""
        size = f"  {memory[name] / 2**20:8,.0f} MiB"
        print(f"{name:24} {1000 * value:9.1f} ms a step {tokens / value:12,.0f} tokens/s{size}{ratio}{mfu}")
    for name, value in medians.items():
        result = {"side": name, "seconds_per_step": value, "tokens_per_second": tokens / value, "all": seconds[name]}
        result |= {"peak_memory": memory[name]}
        print(json.dumps(result | config.model_dump(include={"n_layer", "n_head", "n_embd", "block_size", "batch_size"})))


def memory_of(side: str) -> int:
    """Peak memory in bytes of two steps of a side, in a process of its own."""
    words = [*sys.argv, f"--only={side}"]
    done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return int(done.stdout.split()[-1])


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch has had on a GPU; on a CPU what the whole process has had, Python and torch included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth(config: TrainSpeedOptions, dataset: Dataset, device: torch.device) -> None:
    """Tokens/s times matrix parameters while the model grows: flat where the machine, not the program, sets the pace."""
    depths = (8, 12, 16, 20, 26) if device.type == "cuda" else (2, 4, 6, 8, 10)
    first = None
    for depth in depths:
        shape = {"n_layer": depth, "n_head": depth, "n_embd": 64 * depth}
        sized = config.model_copy(update=shape)
        step = ours(sized, config.presets[0], dataset, device, config.compile)
        seconds = []
        for number in range(2 + config.turns):
            runtime.synchronize(device)
            start = time.perf_counter()
            step(number)
            runtime.synchronize(device)
            seconds.append(time.perf_counter() - start)
        model = GPT(model_config(sized, config.presets[0], dataset))
        speed = config.batch_size * config.block_size / statistics.median(seconds[2:])
        product = speed * sum(p.numel() for p in model.parameters() if p.ndim == 2)
        first = first or product
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:14,} parameters {speed:12,.0f} tokens/s  product {product:.3g}  {product / first:5.2f}")
        print(json.dumps({"growth": depth, "parameters": parameters, "tokens_per_second": speed, "product": product}))


def model_config(config: TrainSpeedOptions, preset: str, dataset: Dataset) -> GPTConfig:
    shape = config.model_dump(include={"n_layer", "n_head", "n_embd", "block_size"})
    return GPTConfig(vocab_size=dataset.tokenizer.vocab_size, **shape, **PRESETS[preset])


def ours(config: TrainSpeedOptions, preset: str, dataset: Dataset, device: torch.device, compiled: bool) -> Callable[[int], None]:
    """A step as train.fit takes it."""
    torch.manual_seed(0)
    model = GPT(model_config(config, preset, dataset)).to(device)
    options = RunOptions(out_dir=Path("none"), grad_clip=1.0, compile=compiled).with_defaults(RECIPES[preset])
    prepare_model(model, options)
    train_step = TrainingStep(model, make_optimizers(model, options), likelihood, options, Progress())
    batches = Prefetch(WindowLoader(dataset, "train", config.block_size, config.batch_size, 0), device)
    return lambda number: train_step(batches(number))


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


def nanochat(config: TrainSpeedOptions, dataset: Dataset, device: torch.device, compiled: bool) -> Callable[[int], None]:
    """A step as nanochat's base_train takes it, with its model, its optimizers and its way of choosing a type."""
    sys.path.insert(0, str(config.nanochat))
    theirs = importlib.import_module("nanochat.gpt")
    torch.manual_seed(0)
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_kv_head": config.n_head, "n_embd": config.n_embd}
    shape |= {"sequence_len": config.block_size, "vocab_size": dataset.tokenizer.vocab_size, "window_pattern": "L"}
    model = theirs.GPT(theirs.GPTConfig(**shape)).to(device)
    model.init_weights()
    optimizer = model.setup_optimizer()
    whole = model
    if compiled:
        model = torch.compile(model, dynamic=False)
    batches = Prefetch(WindowLoader(dataset, "train", config.block_size, config.batch_size, 0), device)

    def step(number: int) -> None:
        for batch in batches(number):
            ids, targets, *_ = batch.to(device)
            model(ids, targets).backward()
        optimizer.step()
        whole.zero_grad(set_to_none=True)

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

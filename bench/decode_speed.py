"""Decoding speed: ours, and beside it Hugging Face's generate and nanoGPT's, in turn on the same random weights.

    python bench/decode_speed.py                                    GPT-2's 124M shape, 32 tokens of prompt, 256 new ones
    python bench/decode_speed.py --nanogpt ../nanoGPT --compile --batch_size 16
    python bench/decode_speed.py --checkpoint out/demo_chat         a model of yours, and a cold start to its first token

The sides take turns, A B A B, in one process. Prints tokens a second, the ratio to the peers' best, and what part of the memory
bandwidth the weights' bytes are; then a JSON line a side.
"""

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from train_speed import load

from model import GPT, PRESETS, GPTConfig
from papagaio import kernels, runtime
from papagaio.errors import run
from papagaio.generation.engine import Engine, Request
from papagaio.generation.layers import prepare
from papagaio.generation.options import SamplingOptions
from papagaio.options import Options, option, parse
from papagaio.runs.checkpoint import model_maker
from papagaio.runs.directory import open_checkpoint
from papagaio.tokenizer import ByteTokenizer


class DecodeSpeedOptions(Options):
    """Options of bench/decode_speed.py."""

    checkpoint: Path | None = option(None, "measure this model instead of a random one of GPT-2's shape")
    nanogpt: Path | None = option(None, "a checkout of nanoGPT to run in turn")
    kinds: tuple[str, ...] = option(("float32", "bfloat16", "int8"), "ours to measure: float32, bfloat16, int8")
    compile: bool = option(False, "measure ours compiled as well")
    n_layer: int = option(12, "blocks", ge=1)
    n_head: int = option(12, "attention heads", ge=1)
    n_embd: int = option(768, "channels", ge=1)
    prompt_tokens: int = option(32, "tokens of the prompt", ge=1)
    new_tokens: int = option(256, "tokens to decode", ge=1)
    batch_size: int = option(16, "also measure so many rows at a time (1: only one)", ge=1)
    turns: int = option(3, "turns of each side", ge=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")


class Letters(ByteTokenizer):
    """Stands for the tokenizer of a random model: any id is a letter."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"x" * len(list(ids))


def main(config: DecodeSpeedOptions) -> None:
    device = runtime.pick_device(config.device)
    sides: dict[str, tuple[Callable[[], None], int, int]] = {}  # a turn, rows, bytes of weights
    for kind in config.kinds:
        for compiled in (False, True) if config.compile else (False,):
            model = ours(config, kind, device)
            size = weight_bytes(model)
            for rows in sorted({1, config.batch_size}):
                name = f"ours, {kind}{', compiled' if compiled else ''}, {rows} row{'s' if rows > 1 else ''}"
                dtype = torch.float32 if kind == "float32" else torch.bfloat16
                engine = Engine(model, Letters(), dtype, compiled=compiled)
                sides[name] = (functools.partial(decode, config, engine, rows), rows, size)
    if config.checkpoint is None:
        for kind in ("float32", "bfloat16"):
            for rows in sorted({1, config.batch_size}):
                turn, size = hugging_face(config, kind, rows, device)
                sides[f"Hugging Face, {kind}, {rows} row{'s' if rows > 1 else ''}"] = (turn, rows, size)
        if config.nanogpt:
            turn, size = nanogpt(config, device)
            sides["nanoGPT, float32, 1 row"] = (turn, 1, size)
    bandwidth = read_bandwidth(device)
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads, {device}")
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn, _, _ in sides.values():  # warm up, and compile
        turn()
    for _ in range(config.turns):
        for name, (turn, _, _) in sides.items():
            runtime.synchronize(device)
            start = time.perf_counter()
            turn()
            runtime.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    speeds = {name: rows * config.new_tokens / statistics.median(seconds[name]) for name, (_, rows, _) in sides.items()}
    for name, (_, rows, size) in sides.items():
        peers = [speed for other, speed in speeds.items() if not other.startswith("ours") and sides[other][1] == rows]
        ratio = f"  {speeds[name] / max(peers):5.2f} of the peers' best" if peers else ""
        share = f"  {speeds[name] / rows * size / bandwidth:5.2f} of the bandwidth"
        print(f"{name:40} {speeds[name]:9,.1f} tokens/s{share}{ratio}")
    for name, (_, rows, size) in sides.items():
        result = {"side": name, "tokens_per_second": speeds[name], "rows": rows, "weight_bytes": size, "seconds": seconds[name]}
        print(json.dumps(result | {"bandwidth": bandwidth} | config.model_dump(include={"prompt_tokens", "new_tokens"})))
    if config.checkpoint is not None:
        cold_start(config.checkpoint)


def ours(config: DecodeSpeedOptions, kind: str, device: torch.device) -> GPT:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    if config.checkpoint is not None:
        checkpoint = open_checkpoint(config.checkpoint)
        model = checkpoint.build(model_maker(GPT, GPTConfig), device, dtype)
    else:
        torch.manual_seed(0)
        shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        model = GPT(GPTConfig(vocab_size=50257, block_size=1024, **shape, **PRESETS["gpt2"])).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)
        model.to(device)
    kernels.accelerate(model)
    prepare(model, "int8" if kind == "int8" else "none")
    return model


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the matrices that every token is multiplied by."""
    layers = [module for module in model.modules() if hasattr(module, "weight") and type(module).__name__.endswith("Linear")]
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)


def decode(config: DecodeSpeedOptions, engine: Engine, rows: int) -> None:
    options = SamplingOptions(temperature=0, max_new_tokens=config.new_tokens)
    prompt = [7 * i % engine.model.config.vocab_size for i in range(config.prompt_tokens)]
    for _ in engine.complete([Request(prompt)] * rows, options, batch_size=rows, end=(), banned=()):
        pass


def hugging_face(config: DecodeSpeedOptions, kind: str, rows: int, device: torch.device) -> tuple[Callable[[], None], int]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval().to(device, getattr(torch, kind))
    ids = torch.arange(config.prompt_tokens, device=device).repeat(rows, 1) * 7
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    asked |= {"max_new_tokens": config.new_tokens, "min_new_tokens": config.new_tokens}
    size = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if p.ndim == 2 and "wpe" not in name)
    return lambda: model.generate(ids, **asked), size


def nanogpt(config: DecodeSpeedOptions, device: torch.device) -> tuple[Callable[[], None], int]:
    module: Any = load(config.nanogpt / "model.py")
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    model = module.GPT(module.GPTConfig(**shape)).eval().to(device)
    ids = torch.arange(config.prompt_tokens, device=device)[None] * 7
    return lambda: model.generate(ids, config.new_tokens, top_k=1), 4 * model.get_num_params()


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which a sum reads memory that is in no cache: the best of some tries."""
    numbers, best = torch.ones(100_000_000, device=device), 0.0
    for _ in range(6):
        runtime.synchronize(device)
        start = time.perf_counter()
        numbers.sum()
        runtime.synchronize(device)
        best = max(best, 4 * len(numbers) / (time.perf_counter() - start))
    return best


def cold_start(checkpoint: Path) -> None:
    """Seconds of whole processes, the best of three in turn: import torch alone, and one that prints one token."""
    commands = {
        "import torch": ["-c", "import torch"],
        "one token": ["sample.py", "--checkpoint", str(checkpoint.resolve()), "--max_new_tokens", "1"],
    }
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(3):
        for name, words in commands.items():
            start = time.perf_counter()
            place = Path(__file__).resolve().parents[1]
            subprocess.run([sys.executable, *words], cwd=place, check=True, capture_output=True)
            best[name] = min(best[name], time.perf_counter() - start)
    ratio = best["one token"] / best["import torch"]
    print(
        f"import torch {best['import torch']:.2f} s, a process with its first token {best['one token']:.2f} s: {ratio:.2f} times"
    )
    print(json.dumps({"cold_start": best}))


if __name__ == "__main__":
    run(main, parse(DecodeSpeedOptions, doc=__doc__))

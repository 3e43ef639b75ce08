"""A released model beside transformers, PEFT and llama.cpp: the same numbers, and how fast.

    python bench/released.py --gguf out/smol/smollm2.gguf --out out/released
    python bench/released.py --gguf out/smol/smollm2.gguf --out out/released --llama ../llama/bin/python --measures greedy speed

The GGUF file becomes a run, that run a directory for transformers and files for llama.cpp, and all of them compute the same.
`--llama` names a Python that has llama-cpp-python. Each side of a speed is a process of its own, and they take turns; peak memory
is that of such a process. Prints one line per figure.
"""

import json
import multiprocessing
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from export import load
from model import GPT, GPTConfig
from papagaio import kernels, runtime
from papagaio.errors import run
from papagaio.generation.engine import Engine, Request
from papagaio.generation.options import ModelOptions, SamplingOptions
from papagaio.options import Options, option, parse
from papagaio.runs.checkpoint import model_maker
from papagaio.training import lora

ROOT = Path(__file__).resolve().parents[1]
RANK, ROWS, LENGTH = 16, 8, 64  # of the LoRA step: adapters of this rank, conversations, tokens of each
# Reads JSON from standard input and prints JSON: what llama.cpp does with the file in argv[1].
LLAMA = """
import json, sys, time
from llama_cpp import Llama
asked = json.load(sys.stdin)
model = Llama(sys.argv[1], n_ctx=1024, n_batch=512, n_threads=asked["threads"], n_threads_batch=asked["threads"], verbose=False)
if "texts" in asked:
    print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]]))
    sys.exit()
found, seconds = [], []
for prompt in asked["prompts"]:
    model.reset()
    start, ids = time.perf_counter(), []
    model.eval(prompt)
    read = time.perf_counter()
    while len(ids) < asked["tokens"]:
        ids.append(int(model.sample(temp=0, top_k=1)))
        model.eval(ids[-1:])
    found.append(ids)
    seconds.append([read - start, time.perf_counter() - read])
print(json.dumps([found, seconds]))
"""


Measure = Literal["convert", "logits", "greedy", "tokens", "speed", "lora"]


class ReleasedOptions(Options):
    """Options of bench/released.py."""

    gguf: Path = option(..., "the released model, as data/smol.py fetches it")
    out: Path = option(..., "directory for what is made of it; what is there is used again")
    llama: Path | None = option(None, "a Python that has llama-cpp-python")
    measures: tuple[Measure, ...] = option(typing.get_args(Measure), "which figures to measure")
    text: Path = option(ROOT / "LOG.md", "a text for logits and bits per byte")
    text_bytes: int = option(100_000, "bytes of it", ge=1000)
    turns: int = option(3, "turns of each side of a speed", ge=1)
    threads: int = option(2, "threads of each side", ge=1)


def main(config: ReleasedOptions) -> None:
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    for directory in (config.out / "run", config.out / "hf"):
        if "convert" in config.measures:
            shutil.rmtree(directory, ignore_errors=True)
    if not (config.out / "run").exists():
        print(export("from-gguf", config.gguf, "--out_dir", config.out / "run"))
    if not (config.out / "hf").exists():
        print(export("to-hf", config.out / "run", "--out", config.out / "hf", "--dtype", "float32"))
    for kind in ("f32", "f16", "q8_0"):
        if not (config.out / f"{kind}.gguf").exists():
            export("to-gguf", config.out / "run", "--out", config.out / f"{kind}.gguf", "--type", kind)
    for measure in config.measures:
        if measure != "convert":
            MEASURES[measure](config)


def export(*words: object) -> str:
    """Run export.py; its time and peak memory."""
    seconds, processor, memory = alone(_export, [str(word) for word in words])
    return f"{words[0]}: {seconds:.1f} s ({processor:.1f} s of the processors), peak {memory:.2f} GB"


def _export(words: list[str]) -> tuple[float, float, float]:
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "export.py", *words], check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def theirs(config: ReleasedOptions, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(config.out / "hf", dtype=dtype).eval().requires_grad_(False)


def llama(config: ReleasedOptions, kind: str, **asked: Any) -> Any:
    text = json.dumps(asked | {"threads": config.threads})
    command = [config.llama, "-c", LLAMA, config.out / f"{kind}.gguf"]
    return json.loads(subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout)


def prompts(config: ReleasedOptions, count: int, tokens: int) -> list[list[int]]:
    """Pieces of the text, all of the same length."""
    _, tokenizer = load(config.out / "run")
    ids = tokenizer.encode(config.text.read_text(encoding="utf-8"))
    step = len(ids) // count
    return [ids[i * step : i * step + tokens] for i in range(count)]


@torch.no_grad()
def logits(config: ReleasedOptions) -> None:
    """Windows of 1,024 tokens through both models, in float32."""
    model, tokenizer = load(config.out / "run")
    kernels.accelerate(model)
    other = theirs(config)
    text = config.text.read_bytes()[: config.text_bytes].decode("utf-8", "ignore")
    ids = torch.tensor([tokenizer.start, *tokenizer.encode(text)])
    difference = equal = places = 0
    nats = torch.zeros(2, dtype=torch.float64)
    for window in ids.unfold(0, 1025, 1024) if len(ids) > 1024 else [ids]:
        both = model(window[None, :-1])[0], other(window[None, :-1]).logits[0]
        difference = max(difference, float((both[0] - both[1]).abs().max()))
        equal += int((both[0].argmax(-1) == both[1].argmax(-1)).sum())
        places += len(window) - 1
        for side, found in enumerate(both):
            nats[side] += torch.nn.functional.cross_entropy(found.double(), window[1:], reduction="sum")
    size = len(tokenizer.decode_bytes(ids[1 : places + 1].tolist()))
    bits = (nats / torch.log(torch.tensor(2.0)) / size).tolist()
    print(f"logits: largest difference {difference:.1e}; the same top token at {equal:,} of {places:,} places")
    print(f"bits per byte of {size:,} bytes: ours {bits[0]:.6f}, transformers {bits[1]:.6f}")


@torch.no_grad()
def greedy(config: ReleasedOptions) -> None:
    model, tokenizer = load(config.out / "run")
    engine, asked = Engine(kernels.accelerate(model), tokenizer), prompts(config, 20, 12)
    ours, ids = engine.greedy(asked, 200, -1), torch.tensor(asked)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 200}
    other = theirs(config)
    other.generation_config.eos_token_id = None  # nothing ends, on either side
    found = other.generate(ids, **settings)
    equal = sum(a == b for a, b in zip(ours, found[:, 12:].tolist(), strict=True))
    print(f"greedy, 200 tokens: the same as transformers for {equal} of 20 prompts")
    if config.llama:
        continued, _ = llama(config, "f32", prompts=asked[:10], tokens=100)
        firsts = [next((i for i in range(100) if a[i] != b[i]), None) for a, b in zip(ours, continued, strict=False)]
        print(f"greedy, 100 tokens: the same as llama.cpp for {firsts.count(None)} of 10 prompts; first differences {firsts}")


def tokens(config: ReleasedOptions) -> None:
    """10,000 random texts of words, blanks, digits, many scripts and special tokens."""
    from transformers import AutoTokenizer

    _, tokenizer = load(config.out / "run")
    rng, words = random.Random(0), config.text.read_text(encoding="utf-8").split(" ")
    odd = [" ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u3000", "\xa0", "'s", "don't", "½", "٣٤", "e\u0301"]
    odd += tokenizer.special

    def piece() -> str:
        if rng.random() < 0.3:
            return rng.choice(odd)
        if rng.random() < 0.3:
            first, last = rng.choice(((32, 0x530), (0x4E00, 0x5000), (0x1F300, 0x1F700)))
            return "".join(chr(rng.randrange(first, last)) for _ in range(4))
        return " ".join(rng.choices([*words, str(rng.randrange(10**6))], k=rng.randrange(1, 6)))

    texts = ["".join(piece() for _ in range(rng.randrange(1, 8))) for _ in range(10_000)]
    ours = [tokenizer.encode(text) for text in texts]
    other = AutoTokenizer.from_pretrained(config.out / "hf")
    found = {"transformers": [other.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]}
    if config.llama:
        found["llama.cpp"] = llama(config, "f32", texts=texts)
    for name, ids in found.items():
        print(f"token ids: {sum(a != b for a, b in zip(ours, ids, strict=True)):,} of {len(texts):,} texts differ from {name}")


def decode_ours(config: ReleasedOptions, prompt: list[int], quantize: str) -> tuple[float, float]:
    """Tokens a second of the prompt, and of 64 tokens after it."""
    torch.set_num_threads(config.threads)
    options = ModelOptions(checkpoint=config.out / "run", device="cpu", dtype="bfloat16", quantize=quantize)
    engine = Engine.open(model_maker(GPT, GPTConfig), options)

    def once(tokens: int) -> tuple[float, float]:
        sampling, times = SamplingOptions(temperature=0, max_new_tokens=tokens), [time.perf_counter()]
        for _ in engine.complete([Request(prompt)], sampling, end=(), banned=()):
            times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1]

    once(4)
    read, rest = once(64)
    return len(prompt) / read, 63 / rest


@torch.no_grad()
def decode_theirs(config: ReleasedOptions, prompt: list[int]) -> tuple[float, float]:
    torch.set_num_threads(config.threads)
    model, ids = theirs(config, torch.bfloat16), torch.tensor([prompt])

    def once(tokens: int) -> float:
        start = time.perf_counter()
        asked = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "attention_mask": torch.ones_like(ids)}
        model.generate(ids, **asked)
        return time.perf_counter() - start

    once(4)
    read, whole = once(1), once(64)
    return len(prompt) / read, 63 / (whole - read)


def decode_llama(config: ReleasedOptions, prompt: list[int], kind: str) -> tuple[float, float]:
    _, ((read, rest),) = llama(config, kind, prompts=[prompt], tokens=64)
    return len(prompt) / read, 64 / rest


def speed(config: ReleasedOptions) -> None:
    """Prompts of 512 tokens, and one row of tokens after a short prompt."""
    long, short = prompts(config, 1, 512)[0], prompts(config, 1, 12)[0]
    sides: dict[str, tuple[Any, ...]] = {"ours bf16": (decode_ours, "none"), "ours int8": (decode_ours, "int8")}
    sides["transformers bf16"] = (decode_theirs,)
    if config.llama:
        sides |= {f"llama.cpp {kind}": (decode_llama, kind) for kind in ("f16", "q8_0")}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(config.turns):
        for name, (function, *more) in sides.items():
            found[name].append((alone(function, config, long, *more)[0], alone(function, config, short, *more)[1]))
    for name, pairs in found.items():
        read, rest = (statistics.median(column) for column in zip(*pairs, strict=True))
        each = ", ".join(f"{pair[1]:.1f}" for pair in pairs)
        print(f"{name:18} 512-token prompt {read:7.1f} tokens/s, one row {rest:6.1f} tokens/s ({each})")


def train_ours(config: ReleasedOptions) -> tuple[float, float]:
    """Tokens a second of a LoRA step, and the process's peak memory in gigabytes."""
    torch.set_num_threads(config.threads)
    model, _ = load(config.out / "run")
    lora.add_adapters(model, ["q", "k", "v", "proj", "fc", "gate"], RANK, 2 * RANK)
    lora.round_frozen(model, torch.bfloat16)
    kernels.accelerate(model).train()
    weights = torch.full((ROWS, LENGTH), 1 / (ROWS * LENGTH))
    return train(lambda ids: model(ids, ids.roll(-1, 1), weights), model, autocast=True)


def train_peft(config: ReleasedOptions, dtype: str) -> tuple[float, float]:
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(config.threads)
    model = theirs(config, getattr(torch, dtype)).train()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM"))
    return train(lambda ids: model(input_ids=ids, labels=ids).loss, model, autocast=dtype == "float32")


def train(loss: Callable[[torch.Tensor], torch.Tensor], model: torch.nn.Module, autocast: bool) -> tuple[float, float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids, seconds = torch.randint(0, 49000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)), []
    for _ in range(4):
        start = time.perf_counter()
        with runtime.autocast(torch.device("cpu"), torch.bfloat16 if autocast else torch.float32):
            value = loss(ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return ROWS * LENGTH / statistics.median(seconds[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def lora_step(config: ReleasedOptions) -> None:
    sides = {"ours": (train_ours,), "PEFT float32, autocast": (train_peft, "float32"), "PEFT bfloat16": (train_peft, "bfloat16")}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(config.turns):
        for name, (function, *more) in sides.items():
            found[name].append(alone(function, config, *more))
    for name, pairs in found.items():
        tokens_per_second, memory = (statistics.median(column) for column in zip(*pairs, strict=True))
        each = ", ".join(f"{pair[0]:.0f}" for pair in pairs)
        print(f"LoRA step, {name:24} {tokens_per_second:6.0f} tokens/s ({each}), peak {memory:.2f} GB")


MEASURES = {"logits": logits, "greedy": greedy, "tokens": tokens, "speed": speed, "lora": lora_step}

if __name__ == "__main__":
    run(main, parse(ReleasedOptions, doc=__doc__))

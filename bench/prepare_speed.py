"""How fast text becomes tokens and tokens become batches, beside the libraries underneath; and in how much memory.

    python bench/prepare_speed.py --corpus out/python_docs/corpus.jsonl --ranks gpt2.tiktoken
    python bench/prepare_speed.py ... --large                  also a generated file of 2 GB and one line of 300 MB

Each comparison runs in turn, A B A B, and gives medians. tiktoken and rustbpe get the texts in memory and do nothing else;
ours reads the file, encodes, hashes and writes a dataset. Prints a table, then a JSON line a measurement.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import prepare
from papagaio.corpus.dataset import Dataset
from papagaio.corpus.plan import make_tasks
from papagaio.corpus.reading import list_spans
from papagaio.corpus.sample import training_sample
from papagaio.errors import UserError, run
from papagaio.options import Options, option, parse
from papagaio.tokenizer import GPT4_PATTERN, gpt2_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]


class PrepareSpeedOptions(Options):
    """Options of bench/prepare_speed.py."""

    corpus: Path = option(ROOT / "out/python_docs/corpus.jsonl", "a .jsonl file with texts; data/python_docs.py makes one")
    ranks: Path = option(ROOT.parent / "shared/data/gpt2.tiktoken", "GPT-2's vocabulary in tiktoken's format")
    repeats: int = option(3, "runs of each", ge=1)
    large: bool = option(False, "also measure memory on large generated files; takes minutes")


def main(config: PrepareSpeedOptions) -> None:
    for path in (config.corpus, config.ranks):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    texts = [json.loads(line)["text"] for line in config.corpus.open(encoding="utf-8")]
    with tempfile.TemporaryDirectory() as folder:
        results = [*encoding(config, texts, Path(folder)), *training(config, texts, Path(folder))]
        results += loading(config, Path(folder))
        if config.large:
            results += memory(config, texts, Path(folder))
    for result in results:
        print(f"{result['what']:64} {result['value']:10.2f} {result['unit']}")
    for result in results:
        print(json.dumps(result))


def in_turn(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Seconds of each side: they run one after the other, `repeats` times; the median."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side())
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def process(*arguments: object) -> tuple[float, int]:
    """Run prepare.py as a user does: seconds, and the largest resident memory of any one of its processes in bytes.

    A small process starts it and asks for the memory: Linux counts what the starting process had as its child's.
    """
    starter = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL); "
    starter += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    command = [sys.executable, str(ROOT / "data/prepare.py"), *map(str, arguments)]
    start = time.perf_counter()
    used = subprocess.run([sys.executable, "-S", "-c", starter, *command], check=True, capture_output=True).stdout
    return time.perf_counter() - start, int(used) * 1024


def encoding(config: PrepareSpeedOptions, texts: list[str], folder: Path) -> list[dict[str, Any]]:
    n_bytes = sum(len(text.encode()) for text in texts)
    tiktoken = gpt2_tokenizer(config.ranks).encoding
    cores = sorted({1, os.cpu_count() or 1})
    sides: dict[str, Callable[[], float]] = {}
    for n in cores:
        options = {"input": (str(config.corpus),), "out": folder / "gpt2", "tokenizer": "gpt2", "ranks": config.ranks}
        ours = prepare.PrepareOptions(**options, workers=n, overwrite=True)
        flags = ["--input", config.corpus, "--out", folder / "gpt2", "--tokenizer=gpt2", "--ranks", config.ranks]
        sides[f"tiktoken, encode_ordinary_batch alone, threads: {n}"] = lambda n=n: timed(
            lambda: tiktoken.encode_ordinary_batch(texts, num_threads=n)
        )
        sides[f"prepare.py, its main, from file to dataset, workers: {n}"] = lambda ours=ours: timed(lambda: prepare.main(ours))
        sides[f"prepare.py, the whole process, workers: {n}"] = lambda flags=flags, n=n: process(
            *flags, f"--workers={n}", "--overwrite"
        )[0]
    seconds = in_turn(sides, config.repeats)
    results = [{"what": name, "value": n_bytes / s / 1e6, "unit": "MB/s", "bytes": n_bytes} for name, s in seconds.items()]
    for n, (reference, ours, whole) in zip(cores, zip(*[iter(seconds.values())] * 3, strict=True), strict=True):
        results.append({"what": f"  ratio of main to tiktoken, cores: {n}", "value": reference / ours, "unit": "times"})
        results.append(
            {"what": f"  ratio of the whole process to tiktoken, cores: {n}", "value": reference / whole, "unit": "times"}
        )
    return results


def training(config: PrepareSpeedOptions, texts: list[str], folder: Path) -> list[dict[str, Any]]:
    import rustbpe

    options = prepare.PrepareOptions(input=(str(config.corpus),), out=folder / "bpe", val_fraction=0.001)
    tasks = make_tasks(list_spans(options.input, options))
    sides = {
        "rustbpe alone, 4,096 tokens": lambda: timed(
            lambda: rustbpe.Tokenizer().train_from_iterator(iter(texts), 4091, pattern=GPT4_PATTERN)
        ),
        "reading the texts alone": lambda: timed(lambda: [json.loads(line)["text"] for line in config.corpus.open("rb")]),
        "prepare.py, reading and training, 4,096 tokens": lambda: timed(lambda: train_bpe(training_sample(tasks, options), 4096)),
    }
    seconds = in_turn(sides, config.repeats)
    alone, reading, ours = seconds.values()
    results = [{"what": name, "value": s, "unit": "s"} for name, s in seconds.items()]
    return [*results, {"what": "  ratio to rustbpe and reading", "value": ours / (alone + reading), "unit": "times"}]


def loading(config: PrepareSpeedOptions, folder: Path) -> list[dict[str, Any]]:
    import torch

    from papagaio.batches.windows import WindowLoader

    torch.set_num_threads(1)
    dataset = Dataset(folder / "gpt2")
    results = []
    for batch_size, block_size in ((12, 64), (32, 256), (64, 1024)):
        for mask in (False, True):
            loader = WindowLoader(dataset, "train", block_size, batch_size, 1, document_mask=mask)
            steps = range(1 + 20_000_000 // (batch_size * block_size))
            loader(0)
            seconds = statistics.median(timed(partial(list, map(loader, steps))) for _ in range(config.repeats))
            name = f"loader, one core, {batch_size} x {block_size}{', documents numbered' if mask else ''}"
            results.append({"what": name, "value": len(steps) * batch_size * block_size / seconds / 1e6, "unit": "M tokens/s"})
    return results


def memory(config: PrepareSpeedOptions, texts: list[str], folder: Path) -> list[dict[str, Any]]:
    """The largest process of a preparation of large files."""
    text = "\n".join(texts)
    flags = ["--tokenizer=gpt2", "--ranks", config.ranks]
    cases = {
        "2 GB of .jsonl, gpt2": (
            write(folder / "a.jsonl", lambda i: json.dumps({"text": f"{i} {texts[i % len(texts)]}"}) + "\n", 2e9),
            flags,
        ),
        "2 GB of .jsonl, bpe trained on it": (folder / "a.jsonl", ["--tokenizer=bpe", "--vocab_size=32768"]),
        "one line of text of 300 MB": (write(folder / "line.txt", lambda i: f"{i} " + text.replace("\n", " "), 3e8), flags),
        "one line of text of 300 MB without a blank": (write(folder / "run.txt", lambda i: "abcdefgh" * 2**17, 3e8), flags),
        "one JSON line of 300 MB": (one_json_line(folder / "line.jsonl", text, 3e8), flags),
    }
    results = []
    for name, (path, options) in cases.items():
        size = path.stat().st_size
        seconds, peak = process("--input", path, "--out", folder / "large", *options, "--overwrite")
        results.append({"what": f"{name}: largest process", "value": peak / 1e6, "unit": "MB", "seconds": seconds})
        results.append({"what": f"{name}: speed", "value": size / seconds / 1e6, "unit": "MB/s"})
    return results


def write(path: Path, part: Callable[[int], str], size: float) -> Path:
    """A file of parts, until it is as large as that."""
    with path.open("w", encoding="utf-8") as file:
        n, i = 0, 0
        while n < size:
            n += file.write(part(i))
            i += 1
    return path


def one_json_line(path: Path, text: str, size: float) -> Path:
    escaped = json.dumps(text)[1:-1]
    write(path, lambda i: '{"before": {"text": 1}, "text": "' if i == 0 else escaped, size)
    with path.open("a", encoding="utf-8") as file:
        file.write('", "after": []}\n{"text": "a second line"}\n')
    return path


if __name__ == "__main__":
    run(main, parse(PrepareSpeedOptions, doc=__doc__))

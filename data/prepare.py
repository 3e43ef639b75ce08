"""Turn text of any size into a dataset directory for train.py: read, train a tokenizer, encode, split, write token shards.

    python data/prepare.py --input my_texts/ more.jsonl.gz --out out/mine
    python data/prepare.py --input input.txt --out out/chars --tokenizer char --val_fraction 0.1
    python data/prepare.py --input 'crawl/**/*.parquet' --text_key content --out out/crawl --tokenizer gpt2 --ranks FILE
    python data/prepare.py --inspect out/mine

A text file is one document (--split_documents cuts it into several), a line of a .jsonl file is one, a row of a .parquet file is
one; .gz and .zst are unpacked. Documents are held out for validation by a hash of their text, so that adding some never moves
others; a single document is cut near its end. What was encoded when a run is killed is there when the same command runs again.
Several machines with a disk in common share the work: each runs the command with its own --part i/n (torchrun and Slurm set
it), and one runs it with --part 0/1 at last.
"""

import hashlib
import json
import os
import shutil
import sys
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from filelock import FileLock, Timeout
from pydantic import model_validator

from papagaio.corpus.dataset import Dataset, token_dtype
from papagaio.corpus.inspection import comparison, inspection, summary
from papagaio.corpus.pieces import Digest, Documents, Fate, Pieces, PieceWriter, assemble, piece_paths
from papagaio.corpus.reading import LEAF_BYTES, ReadingOptions, Span, list_spans, read
from papagaio.corpus.workers import in_parallel
from papagaio.errors import MachineError, UserError, run
from papagaio.files import parse_json, sealed, write_whole
from papagaio.options import option, parse
from papagaio.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    cached_gpt2_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    save_tokenizer,
    stretches,
    train_bpe,
)

Task = list[Span]


class PrepareOptions(ReadingOptions):
    """Options of data/prepare.py."""

    input: tuple[str, ...] = option((), "files, directories, patterns, hf://NAME[:CONFIG][:SPLIT], or - for standard input")
    out: Path | None = option(None, "dataset directory to make")
    tokenizer: str = option("bpe", "byte, char, bpe (trained on this corpus), gpt2, or a directory with a tokenizer")
    vocab_size: int = option(4096, "tokens of a bpe tokenizer, the five special ones included", ge=261, le=2**20)
    sample_bytes: int = option(2**28, "text that a bpe tokenizer is trained on, taken evenly from the whole corpus", ge=1)
    ranks: Path | None = option(None, "GPT-2's vocabulary in tiktoken's format, where it can't be downloaded")
    val_fraction: float = option(0.05, "part of the documents held out for validation", gt=0, lt=1)
    keep_duplicates: bool = option(False, "keep documents that are there more than once")
    workers: int = option(os.cpu_count() or 1, "processes that encode", ge=1)
    shard_tokens: int = option(100_000_000, "tokens of a shard file", ge=1024)
    part: str | None = option(
        None, "i/n: encode the i-th of n parts (i from 0); 0/1 does what is missing and merges", pattern=r"^\d+/\d+$"
    )
    overwrite: bool = option(False, "replace the dataset in --out, and forget what an interrupted run has left")
    inspect: Path | None = option(None, "print what is in a dataset, verify it, and stop")

    @model_validator(mode="after")
    def _complete(self) -> "PrepareOptions":
        if not self.inspect and not (self.input and self.out):
            raise ValueError("--input and --out are required: what to read, and where to write the dataset")
        index, count = self.share_of_work
        if index >= count:
            raise ValueError(f"--part={self.part}: parts are counted from 0 to n - 1")
        if "-" in self.input and count > 1:
            raise ValueError("--part: standard input cannot be shared; write it to a file")
        return self

    @property
    def share_of_work(self) -> tuple[int, int]:
        """(i, n): from --part, or the rank that torchrun or Slurm gave this process."""
        if self.part:
            index, count = self.part.split("/")
            return int(index), int(count)
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank in os.environ and size in os.environ:
                return int(os.environ[rank]), int(os.environ[size])
        return 0, 1


def main(config: PrepareOptions) -> None:
    if config.inspect:
        print(inspection(Dataset(config.inspect)))
        return
    out = config.out
    if out.exists() and not (out / "manifest.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out}: there is something that is not a dataset, which even --overwrite leaves alone; choose another --out"
        )
    work = out.with_name(f".{out.name}.partial")  # becomes --out when it is whole: a dataset is never half there
    fresh = not work.exists()
    with in_use(work, config.share_of_work):
        try:
            prepare(work, config)
        except UserError as error:
            text = str(error).replace(str(work / "stdin"), "standard input")
            if fresh and sum(path.stat().st_size for path in work.glob("pieces/*.tokens")) < 2**27:
                shutil.rmtree(work)  # seconds of work
            elif fresh:
                text += f"; what is encoded so far waits in {work} for the same command with a mended input"
            raise UserError(text) from None
        except OSError as error:
            raise MachineError(f"{error}; what is encoded so far is kept, the same command goes on from there") from None


def prepare(work: Path, config: PrepareOptions) -> None:
    """All steps, in the directory `work`; those that an interrupted run has done are not done again."""
    inputs = tuple(str(read_stdin(work)) if name == "-" else name for name in config.input)
    spans = list_spans(inputs, config)
    tasks = make_tasks(spans)
    plan = make_plan(tasks, config)
    identity = hashlib.sha256(json.dumps(plan["options"] | {"tasks": [t["spans"] for t in plan["tasks"]]}).encode()).hexdigest()
    if config.out.exists() and not config.overwrite and (config.out / "manifest.json").exists():
        changed = max(time for task in plan["tasks"] for time in task["changed"])
        made = (config.out / "manifest.json").stat().st_mtime_ns
        if Dataset(config.out).manifest.get("made_from") != identity or changed > made:
            raise UserError(f"{config.out}: a dataset made from other input or with other options; --overwrite replaces it")
        print(f"{config.out}: is there already, made from this input with these options", file=sys.stderr)
        return
    continue_plan(work, plan, config)
    make_tokenizer(work, tasks, config)

    index, count = config.share_of_work
    mine = list(range(index, len(tasks), count))
    missing = [number for number in mine if not piece_paths(work / "pieces", number)[1].exists()]
    if len(missing) < len(mine):
        print(f"{len(mine) - len(missing):,} of {len(mine):,} pieces are there already", file=sys.stderr)
    tokenizer = tokenizer_of(work / "tokenizer")
    check_disk(work, [tasks[number] for number in missing], tokenizer, config)
    jobs = [(encode, work, number, tasks[number], config) for number in missing]
    sizes = [sum(span.size for span in tasks[number]) for number in missing]
    for _ in in_parallel(jobs, config.workers, sizes):
        pass
    if count > 1:
        print(f"part {index} of {count} is done; when all are, the same command with --part 0/1 merges them", file=sys.stderr)
        return

    pieces = Pieces(work / "pieces", len(tasks), token_dtype(tokenizer))
    fate = Fate(pieces.documents, config.val_fraction, config.keep_duplicates)
    if fate.dropped.all():
        raise UserError(f"{', '.join(config.input)}: no text in there")
    splits = assemble(work, pieces, fate, tokenizer, config.shard_tokens, 1 - config.val_fraction)
    manifest = {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": pieces.dtype.name,
        "sources": [name if "://" in name or name == "-" else Path(name).name for name in config.input],
        "made_from": identity,
        "empty_documents": int(fate.empty.sum()),
        "splits": splits,
    }
    finish(work, config.out, manifest)
    print(summary(manifest, tokenizer), file=sys.stderr)
    if config.tokenizer == "bpe":
        gpt2 = gpt2_tokenizer(config.ranks) if config.ranks else cached_gpt2_tokenizer()
        print(comparison(Dataset(config.out), gpt2), file=sys.stderr)


def read_stdin(work: Path) -> Path:
    """Standard input as a file: it can be read only once, and is read by several workers."""
    with (work / "stdin").open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return work / "stdin"


def make_tasks(spans: list[Span]) -> list[Task]:
    """What a worker does at a time: a large span, or small ones up to the size of a large one."""
    largest = max([LEAF_BYTES, *(span.stop - span.start for span in spans if span.kind in ("text", "jsonl") and span.stop > 0)])
    tasks: list[Task] = []
    room = 0
    for span in spans:
        if not tasks or span.size > room or span.kind == "hub" or len(tasks[-1]) == 1000:
            tasks.append([])
            room = largest
        tasks[-1].append(span)
        room -= span.size
    return tasks


def make_plan(tasks: list[Task], config: PrepareOptions) -> dict[str, Any]:
    """What the result depends on: options, and for each task its spans and the times of their files' last changes."""
    names = {*ReadingOptions.model_fields, "val_fraction", "keep_duplicates", "shard_tokens"}
    if config.tokenizer == "bpe":
        names |= {"vocab_size", "sample_bytes"}
    tokenizer = config.tokenizer if config.tokenizer in ("byte", "char", "bpe") else given_tokenizer(config).sha256
    options = config.model_dump(mode="json", include=names) | {"tokenizer": tokenizer}

    def described(span: Span) -> list[Any]:
        return [span.path if span.kind == "hub" else Path(span.path).name, *span[1:]]

    @cache
    def changed(path: str) -> int:
        return 0 if path.startswith("hf://") else os.stat(path).st_mtime_ns

    return {
        "options": options,
        "tasks": [{"spans": [described(s) for s in task], "changed": [changed(s.path) for s in task]} for task in tasks],
    }


def continue_plan(work: Path, plan: dict[str, Any], config: PrepareOptions) -> None:
    """Make `work` ready for a plan: keep the pieces of an interrupted run that are still right, refuse other options."""
    path = work / "plan.json"
    if not path.exists():  # nothing, or what a run that was killed at its very end has left
        for name in ("pieces", "tokenizer"):
            shutil.rmtree(work / name, ignore_errors=True)
        for shard in work.glob("*.npy"):
            shard.unlink()
    else:
        before = parse_json(path.read_text(encoding="utf-8", errors="replace"), lambda: f"{path}: damaged, delete {work}")
        if before["options"] != plan["options"]:
            if not config.overwrite:
                different = [key for key in plan["options"] if before["options"].get(key) != plan["options"][key]]
                raise UserError(
                    f"{work}: left by an interrupted run with other options ({', '.join(different)}); finish that, or --overwrite"
                )
            before["tasks"] = []
        if before["tasks"] != plan["tasks"]:
            # A piece whose input has changed is made again; shards and trained tokenizers depend on all of the input.
            shutil.rmtree(work / "tokenizer", ignore_errors=True)
            for shard in work.glob("*.npy"):
                shard.unlink()
            trained = config.tokenizer in ("bpe", "char")
            for index in work.glob("pieces/*.npy"):
                number = int(index.stem)
                same = before["tasks"][number : number + 1] == plan["tasks"][number : number + 1]
                if trained or not same or not index.with_suffix(".tokens").exists():
                    index.unlink()
    (work / "pieces").mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(plan))


# Tokenizers

_made: dict[Path, Tokenizer] = {}


def tokenizer_of(directory: Path) -> Tokenizer:
    """The tokenizer in a directory; a forked worker has that of its parent."""
    if directory not in _made:
        _made[directory] = load_tokenizer(directory)
    return _made[directory]


@cache
def given_tokenizer(config: PrepareOptions) -> Tokenizer:
    """The tokenizer that exists before the corpus is read."""
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "gpt2":
        return gpt2_tokenizer(config.ranks)
    if Path(config.tokenizer).is_dir():
        return load_tokenizer(Path(config.tokenizer))
    raise UserError(f"--tokenizer={config.tokenizer}: neither byte, char, bpe, gpt2 nor a directory with a tokenizer")


def make_tokenizer(work: Path, tasks: list[Task], config: PrepareOptions) -> None:
    """Write the tokenizer that --tokenizer names to work/tokenizer: char knows every character there is, bpe learns from a
    sample of the training split."""
    _made.pop(work / "tokenizer", None)
    if (work / "tokenizer" / "tokenizer.json").exists():
        return
    if config.tokenizer == "char":
        jobs = [(characters, task, config) for task in tasks]
        tokenizer: Tokenizer = CharTokenizer(set().union(*in_parallel(jobs, config.workers)))
    elif config.tokenizer == "bpe":
        tokenizer = train_bpe(sample(tasks, config), config.vocab_size)
    else:
        tokenizer = given_tokenizer(config)
    temporary = work / f"tokenizer.{os.getpid()}"
    save_tokenizer(tokenizer, temporary)
    try:
        temporary.rename(work / "tokenizer")
    except OSError:  # another part of the work was faster, and has made the same one
        shutil.rmtree(temporary)
        if not (work / "tokenizer" / "tokenizer.json").exists():
            raise
    _made[work / "tokenizer"] = tokenizer


def characters(task: Task, config: PrepareOptions) -> set[str]:
    """Every character in the task's documents."""
    return set().union(*(set(fragment.text) for span in task for fragment in read(span, config)))


def sample(tasks: list[Task], config: PrepareOptions) -> Iterator[str]:
    """Text to train a tokenizer on: up to --sample_bytes of the training split, taken evenly from the whole corpus.

    Which documents are held out is decided as it is for the shards. (That of a text beyond LEAF_BYTES of which the sample has
    only a part cannot be known: a part that will be held out may be in the sample.)
    """
    n_bytes = [span.size for task in tasks for span in task]
    small = all(n_bytes) and sum(n_bytes) < 2**25  # then it is kept rather than read twice
    kept = list(sampled(tasks, config)) if small else None
    digests, sizes, texts = (array("Q") for _ in range(3))  # texts: characters but for blanks at the ends; 0 is an empty one
    for _, document in groupby(kept or sampled(tasks, config), key=lambda pair: pair[0]):
        digest, size, text_size = Digest(), 0, 0
        for _, text in document:
            data = text.encode()
            digest.update(data)
            size, text_size = size + len(data), text_size + len(text.strip())
        digests.append(digest.value())
        sizes.append(size)
        texts.append(text_size)
    found = Documents(*(np.array(column, np.uint64) for column in (digests, sizes, texts)))
    fate = Fate(lambda: iter([found]), config.val_fraction, config.keep_duplicates)
    if fate.dropped.all():
        raise UserError(f"{', '.join(config.input)}: no text in there")
    left_out = fate.dropped | fate.splits(found.digest)
    room = int(found.bytes[~left_out].sum())
    print(f"training a tokenizer on {room:,} bytes of text", file=sys.stderr)
    if fate.held_out is None:  # a single document is cut
        room = int(room * (1 - config.val_fraction))
    for number, text in kept or sampled(tasks, config):
        if not left_out[number] and room > 0:
            room -= len(text.encode())
            yield from stretches(text if room >= 0 else text.encode()[:room].decode(errors="ignore"))


def sampled(tasks: list[Task], config: PrepareOptions) -> Iterator[tuple[int, str]]:
    """(number of the document, text of a fragment) of up to 256 tasks, from each as much as its part of --sample_bytes."""
    n = min(256, len(tasks))
    number, inside = 0, False
    for task in (tasks[i * len(tasks) // n] for i in range(n)):
        room = -(-config.sample_bytes // n)
        for text, first, last in (fragment for span in task for fragment in read(span, config)):
            if inside and (first or room <= 0):  # the rest of the last one is in a task that is not in the sample
                number, inside = number + 1, False
            if room <= 0:
                break
            yield number, text
            room -= len(text)
            number, inside = number + last, not last


# Encoding


def encode(work: Path, number: int, task: Task, config: PrepareOptions) -> None:
    """Make the piece of a task."""
    piece = PieceWriter(work / "pieces", number, tokenizer_of(work / "tokenizer"))
    for span in task:
        piece.add(span, config)
    piece.finish()


def check_disk(work: Path, tasks: list[Task], tokenizer: Tokenizer, config: PrepareOptions) -> None:
    """Raises MachineError where the disk has less room than the shards will take, as far as can be told from the first text."""
    beginning = next((fragment.text[: 2**18] for task in tasks for span in task for fragment in read(span, config)), "")
    try:
        per_byte = len(tokenizer.encode_array(beginning)) / max(1, len(beginning.encode()))
    except UserError:  # a worker will come upon it, and say where
        return
    n_bytes = sum(span.size * (4 if span.path.lower().endswith((".gz", ".zst")) else 1) for task in tasks for span in task)
    # Pieces are deleted as they go into train shards; the val shards are written beside all of them.
    needed = n_bytes * per_byte * token_dtype(tokenizer).itemsize * (1.1 + config.val_fraction)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise MachineError(f"{work.parent}: about {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free")


@contextmanager
def in_use(work: Path, share_of_work: tuple[int, int]) -> Iterator[None]:
    """Hold the work directory: several parts may work in it at once, a run that does or merges everything alone."""
    index, count = share_of_work
    work.mkdir(parents=True, exist_ok=True)
    own = work / f"part-{index}-of-{count}.lock"
    with ExitStack() as stack:
        try:
            for path in {own, *work.glob("part-*.lock" if count == 1 else "part-0-of-1.lock")}:
                lock = stack.enter_context(FileLock(path, timeout=0))
                if path != own:
                    lock.release()
        except Timeout:
            raise UserError(f"{work}: in use by another run; wait until it has ended") from None
        try:
            yield
        finally:
            own.unlink(missing_ok=True)
            if work.exists() and not any(work.iterdir()):
                work.rmdir()


# The end


def finish(work: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, clear away what was needed on the way, and let the work directory become the dataset."""
    write_whole(work / "manifest.json", sealed(manifest))
    shutil.rmtree(work / "pieces")
    for path in [*work.glob("*.lock"), work / "stdin", work / "plan.json"]:
        path.unlink(missing_ok=True)
    before = work.with_name(f".{out.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if out.exists():
        out.rename(before)
    work.rename(out)
    shutil.rmtree(before, ignore_errors=True)


if __name__ == "__main__":
    run(main, parse(PrepareOptions, doc=__doc__))

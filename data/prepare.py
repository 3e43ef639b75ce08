"""Turn text of any size into a dataset directory for train.py: read, train a tokenizer, encode, split, write token shards.

    python data/prepare.py --input my_texts/ more.jsonl.gz --out out/mine
    python data/prepare.py --input input.txt --out out/chars --tokenizer char --val_fraction 0.1
    python data/prepare.py --input 'crawl/**/*.parquet' --text_key content --out out/crawl --tokenizer gpt2 --ranks FILE
    python data/prepare.py --inspect out/mine

A text file is one document (--split_documents cuts it into several), as is a line of a .jsonl file and a row of a .parquet file;
.gz and .zst files are decompressed. A hash of its text decides whether a document is held out for validation, so that adding
documents moves no others; a single document is cut near its end. A run that was interrupted is continued by the same command.
Several machines with a shared disk can divide the work: each runs the command with its own --part i/n (torchrun and Slurm set
it), then one of them runs it with --part 0/1.
"""

import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.corpus.assembly import assemble
from papagaio.corpus.dataset import Dataset, token_dtype
from papagaio.corpus.encoding import encode
from papagaio.corpus.inspection import comparison, inspection, summary
from papagaio.corpus.options import PrepareOptions, ReadingOptions
from papagaio.corpus.plan import Plan, Task, finish, locked, make_tasks
from papagaio.corpus.reading import list_spans
from papagaio.corpus.sample import characters, training_sample
from papagaio.corpus.workers import in_parallel
from papagaio.errors import MachineError, UserError, run
from papagaio.options import parse
from papagaio.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, gpt2_tokenizer, load_tokenizer, save_tokenizer, train_bpe


def main(config: PrepareOptions) -> None:
    if config.inspect:
        print(inspection(Dataset(config.inspect)))
        return
    out = config.out
    if out.exists() and not (out / "manifest.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not a dataset, which even --overwrite leaves alone; choose another --out")
    work = out.with_name(f".{out.name}.partial")  # renamed to `out` when the dataset is complete
    fresh = not work.exists()
    with locked(work, *config.share_of_work):
        try:
            prepare(work, config)
        except UserError as error:
            text = str(error).replace(str(work / "stdin"), "standard input")
            if fresh and sum(path.stat().st_size for path in work.glob("pieces/*.tokens")) < 2**27:
                shutil.rmtree(work)  # making it again takes seconds
            elif fresh:
                text += f"; what is encoded so far is kept in {work}, correct the input and run the same command"
            raise UserError(text) from None
        except OSError as error:
            raise MachineError(f"{error}; what is encoded so far is kept, the same command continues") from None


def prepare(work: Path, config: PrepareOptions) -> None:
    """The five steps. Those that an interrupted run has completed in the directory `work` are not repeated."""
    # 1. List the input: as spans, which are files or parts of files.
    if "-" in config.input:  # as a file, because several workers read it
        with (work / "stdin").open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    spans = list_spans(tuple(str(work / "stdin") if name == "-" else name for name in config.input), config)

    # 2. Plan: group the spans into tasks, and see what an earlier run has done of them.
    plan = Plan(options_of_content(config), make_tasks(spans))
    if not config.overwrite and plan.is_done(config.out):
        print(f"{config.out}: is there already, made from this input with these options", file=sys.stderr)
        return
    plan.start(work, config.overwrite)

    # 3. Make the tokenizer.
    tokenizer = make_tokenizer(work, plan.tasks, config)

    # 4. Encode: each task becomes a piece, a file of tokens with an index of its documents.
    index, count = config.share_of_work
    mine = {number: plan.tasks[number] for number in range(index, len(plan.tasks), count)}
    encode(work, mine, tokenizer, config)
    if count > 1:
        print(f"part {index} of {count} is done; when all are, the same command with --part 0/1 merges them", file=sys.stderr)
        return

    # 5. Assemble the pieces: remove duplicates, split into train and val, write shards.
    manifest = {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer).name,
        "sources": [name if "://" in name or name == "-" else Path(name).name for name in config.input],
        "made_from": plan.sha256,
        **assemble(work, len(plan.tasks), tokenizer, config),
    }
    finish(work, config.out, manifest)
    print(summary(manifest, tokenizer), file=sys.stderr)
    if config.tokenizer == "bpe" and config.ranks:
        print(comparison(Dataset(config.out), gpt2_tokenizer(config.ranks)), file=sys.stderr)


def options_of_content(config: PrepareOptions) -> dict[str, Any]:
    """The options that change what is in the dataset."""
    names = {*ReadingOptions.model_fields, "val_fraction", "keep_duplicates", "shard_tokens"}
    if config.tokenizer == "bpe":
        names |= {"vocab_size", "sample_bytes"}
    tokenizer = config.tokenizer if config.tokenizer in ("byte", "char", "bpe") else existing_tokenizer(config).sha256
    return config.model_dump(mode="json", include=names) | {"tokenizer": tokenizer}


@cache
def existing_tokenizer(config: PrepareOptions) -> Tokenizer:
    """A tokenizer that does not depend on the corpus. Raises UserError if --tokenizer names none."""
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "gpt2":
        return gpt2_tokenizer(config.ranks)
    if Path(config.tokenizer).is_dir():
        return load_tokenizer(Path(config.tokenizer))
    raise UserError(f"--tokenizer={config.tokenizer}: neither byte, char, bpe, gpt2 nor a directory with a tokenizer")


def make_tokenizer(work: Path, tasks: list[Task], config: PrepareOptions) -> Tokenizer:
    """The tokenizer in work/tokenizer, made as --tokenizer says if it is not there yet."""
    directory = work / "tokenizer"
    if (directory / "tokenizer.json").exists():
        return load_tokenizer(directory)
    if config.tokenizer == "char":
        jobs = [(characters, task, config) for task in tasks]
        tokenizer: Tokenizer = CharTokenizer(set().union(*in_parallel(jobs, config.workers)))
    elif config.tokenizer == "bpe":
        tokenizer = train_bpe(training_sample(tasks, config), config.vocab_size)
    else:
        tokenizer = existing_tokenizer(config)
    temporary = work / f"tokenizer.{os.getpid()}"
    save_tokenizer(tokenizer, temporary)
    try:
        temporary.rename(directory)
    except OSError:  # another part of the work was faster, and has made the same tokenizer
        shutil.rmtree(temporary)
        if not (directory / "tokenizer.json").exists():
            raise
    return tokenizer


if __name__ == "__main__":
    run(main, parse(PrepareOptions, doc=__doc__))

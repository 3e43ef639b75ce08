"""Turn text of any size into a dataset directory for train.py: read, train a tokenizer, encode, split, write token shards.

    python data/prepare.py --input my_texts/ more.jsonl.gz --out out/mine
    python data/prepare.py --input input.txt --out out/chars --tokenizer char --val_fraction 0.1
    python data/prepare.py --input 'crawl/**/*.parquet' --text_key content --out out/crawl --tokenizer gpt2 --ranks FILE
    python data/prepare.py --inspect out/mine

A text file is one document (--split_documents cuts it into several), as is a line of a .jsonl file and a row of a .parquet file;
.gz, .zst, .bz2 and .xz files are decompressed. A hash of its text decides whether a document is held out for validation, so that
adding documents moves no others; large documents are cut near their end instead (--val_input gives your own validation text). A
run that was interrupted is continued by the same command. Several machines with a shared disk can divide the work: each runs the
command with its own --part i/n (torchrun and srun set it), then one of them runs it with --part 0/1.
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
from papagaio.corpus.encoding import encode, piece_report
from papagaio.corpus.inspection import comparison, inspection, summary
from papagaio.corpus.options import PrepareOptions, ReadingOptions
from papagaio.corpus.plan import Plan, clear, destination, finish, locked, make_tasks, publish, use_tokenizer
from papagaio.corpus.reading import all_that_is_bad, list_spans, took
from papagaio.corpus.sample import characters, training_sample
from papagaio.corpus.spans import BadInput
from papagaio.corpus.workers import in_parallel
from papagaio.errors import MachineError, UserError, run
from papagaio.files import printable, read_text
from papagaio.launch import launcher
from papagaio.options import parse
from papagaio.report import Report
from papagaio.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, gpt2_tokenizer, train_bpe
from papagaio.tokenizer_files import load_tokenizer, save_tokenizer


def main(config: PrepareOptions) -> None:
    if config.inspect:
        print(inspection(Dataset(config.inspect)))
        return
    index, count = config.share_of_work
    if count > 1 and not config.part and (names := launcher()):
        print(f"part {index} of {count}, as {names[0]} and {names[1]} say; --part 0/1 does it all", file=sys.stderr)
    out, work = destination(config.out)
    fresh = not work.exists()
    with locked(work, index, count):
        try:
            prepare(work, out, config)
        except UserError as error:
            text = str(error).replace(str(work / "stdin"), "standard input")
            if fresh and sum(path.stat().st_size for path in work.glob("pieces/*.tokens")) < 2**27:
                shutil.rmtree(work)  # making it again takes seconds
            elif fresh:
                text += f"; what is encoded so far is kept in {work}, correct the input and run the same command"
                if config.tokenizer in ("bpe", "char"):
                    text += " (it is encoded again if the tokenizer, which learns from the corrected input, turns out different)"
            raise UserError(text) from None
        except OSError as error:
            raise MachineError(f"{error}; what is encoded so far is kept, the same command continues") from None


def prepare(work: Path, out: Path, config: PrepareOptions) -> None:
    """The five steps. Those that an interrupted run has completed in the directory `work` are not repeated."""
    # 1. List the input: as spans, which are files or parts of files.
    if "-" in config.input:  # as a file, because several workers read it
        with (work / "stdin").open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    report = Report()  # of what is not in the dataset
    spans = list_spans(tuple(str(work / "stdin") if name == "-" else name for name in config.input), config, report)
    val_tasks = make_tasks(list_spans(config.val_input, config, report) if config.val_input else [])
    if report.counts or len({span.path for span in spans}) > len(config.input):
        print(*report.lines(), took(spans), sep="\n", file=sys.stderr)

    # 2. Plan: group the spans into tasks, and see what an earlier run has done of them.
    plan = Plan(options_of_content(config), val_tasks + make_tasks(spans), len(val_tasks))
    index, count = config.share_of_work
    if not config.overwrite and plan.is_done(out):
        clear(work, out)
        print(f"{config.out}: is there already, made from this input with these options", file=sys.stderr)
        return
    if plan.is_complete(work):  # an earlier run was killed before it had moved the dataset to its place
        if count == 1:
            publish(work, out)
            print(summary(Dataset(out)), file=sys.stderr)
        return
    plan.start(work, config.overwrite)

    try:
        # 3. Make the tokenizer.
        tokenizer = make_tokenizer(work, plan, config)
        use_tokenizer(work, tokenizer.sha256)

        # 4. Encode: each task becomes a piece, a file of tokens with an index of its documents.
        mine = {number: plan.tasks[number] for number in range(index, len(plan.tasks), count)}
        encode(work, mine, tokenizer, config)
    except BadInput as error:
        raise all_that_is_bad(error, plan.spans, config, config.workers) from None
    if count > 1:
        print(f"part {index} of {count} is done; when all are, the same command with --part 0/1 merges them", file=sys.stderr)
        return

    # 5. Assemble the pieces: remove duplicates, split into train and val, write shards.
    skipped, replaced = Report(), 0
    for number in range(len(plan.tasks)):
        of_piece, n = piece_report(work, number)
        skipped.merge(of_piece)
        replaced += n
    print(*skipped.lines(), sep="\n", end="\n" if skipped.counts else "", file=sys.stderr)
    report.merge(skipped)
    manifest = {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer).name,
        "sources": [source_name(name) for name in config.input],
        "val_sources": [source_name(name) for name in config.val_input],
        "input_files": len(plan.files),
        "input_bytes": plan.n_bytes,
        "made_from": plan.sha256,
        "left_out": report.counts,
        "replaced_characters": replaced,
        **assemble(work, len(plan.tasks), tokenizer, config, plan.val_tasks),
    }
    plan.check_unchanged()
    finish(work, out, manifest)
    print(summary(Dataset(out), report.counts), file=sys.stderr)
    if config.tokenizer == "bpe" and config.ranks:
        print(comparison(Dataset(out), gpt2_tokenizer(config.ranks)), file=sys.stderr)


def source_name(name: str) -> str:
    """The name of an input without its directory, for the manifest. Bytes that are not UTF-8 become \\xNN."""
    if "://" in name or name == "-":
        return name
    return printable(Path(os.path.abspath(name)).name)


def options_of_content(config: PrepareOptions) -> dict[str, Any]:
    """The options that change what is in the dataset."""
    # --exclude shows in the list of files.
    names = {*ReadingOptions.model_fields, "val_fraction", "keep_duplicates", "shard_tokens"} - {"exclude"}
    names -= {"val_fraction"} if config.val_input else set()
    if config.tokenizer == "bpe":
        names |= {"vocab_size", "sample_bytes"}
    tokenizer = config.tokenizer if config.tokenizer in ("byte", "char", "bpe") else existing_tokenizer(config).sha256
    return config.model_dump(mode="json", include=names) | {"tokenizer": tokenizer, "val_input": bool(config.val_input)}


@cache
def existing_tokenizer(config: PrepareOptions) -> Tokenizer:
    """A tokenizer that does not depend on the corpus. Raises UserError if --tokenizer names none."""
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "gpt2":
        return gpt2_tokenizer(config.ranks)
    if Path(config.tokenizer).is_dir():
        return load_tokenizer(tokenizer_directory(Path(config.tokenizer)))
    raise UserError(f"--tokenizer={config.tokenizer}: neither byte, char, bpe, gpt2 nor a directory with a tokenizer or a run")


def tokenizer_directory(path: Path) -> Path:
    """The tokenizer directory of a dataset, of a checkpoint or of a run (its last checkpoint); else the path itself."""
    last = path / "checkpoints" / "last"
    if last.is_file():
        path = last.with_name(Path(read_text(last, "a run has the name of its last checkpoint there").strip()).name)
    return path / "tokenizer" if (path / "tokenizer").is_dir() else path


def make_tokenizer(work: Path, plan: Plan, config: PrepareOptions) -> Tokenizer:
    """The tokenizer in work/tokenizer, made as --tokenizer says if it is not there yet."""
    directory = work / "tokenizer"
    if (directory / "tokenizer.json").exists():
        return load_tokenizer(directory)
    if config.tokenizer == "char":
        jobs = [(characters, task, config) for task in plan.tasks]
        tokenizer: Tokenizer = CharTokenizer(set().union(*in_parallel(jobs, config.workers)))
    elif config.tokenizer == "bpe":
        tokenizer = train_bpe(
            training_sample(plan.tasks[plan.val_tasks :], config, plan.tasks[: plan.val_tasks]), config.vocab_size
        )
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

"""Turn text into a dataset directory for train.py: read, split, train a tokenizer, encode, write token shards.

    python data/prepare.py --input corpus.jsonl --out out/data --tokenizer bpe --vocab_size 4096
    python data/prepare.py --input input.txt --out out/chars --tokenizer char --val_fraction 0.1
    python data/prepare.py --input my_texts/ more.txt --out out/mine --tokenizer gpt2

A text file is one document, a line of a .jsonl file is one (its text stands under --text_key), a directory is all the files
in it. Documents are held out for validation by a hash of their text, so that adding some never moves others; a single
document is cut near its end instead.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.config import Options, UserError, option, parse, run
from papagaio.shards import DatasetWriter, share
from papagaio.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, gpt2_tokenizer, load_tokenizer, train_bpe


class PrepareOptions(Options):
    """Options of data/prepare.py."""

    input: tuple[Path, ...] = option(..., "text files, .jsonl files and directories of them", min_length=1)
    out: Path = option(..., "dataset directory to make")
    tokenizer: str = option("bpe", "byte, char, bpe (trained on this corpus), gpt2, or a directory with a tokenizer")
    vocab_size: int = option(4096, "tokens of a bpe tokenizer, the five special ones included", ge=261, le=2**20)
    ranks: Path | None = option(None, "GPT-2's vocabulary in tiktoken's format, where it can't be downloaded")
    val_fraction: float = option(0.05, "part of the documents held out for validation", gt=0, lt=1)
    text_key: str = option("text", "key of the text in .jsonl lines")
    workers: int = option(os.cpu_count() or 1, "threads that encode", ge=1)
    shard_tokens: int = option(100_000_000, "tokens of a shard file", ge=1024)
    overwrite: bool = option(False, "replace the dataset in --out")


class Document(NamedTuple):
    """A text and the split it belongs to."""

    split: str
    text: str


def main(config: PrepareOptions) -> None:
    if config.out.exists() and not config.overwrite and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"{config.out}: there is something already; choose another --out, or replace it with --overwrite")
    if config.overwrite and config.out.exists() and not (config.out / "manifest.json").exists():
        raise UserError(f"{config.out}: not a dataset, so --overwrite leaves it alone; choose another --out")
    files = list_files(config.input)
    held_out = choose_split(files, config)
    tokenizer = make_tokenizer(files, held_out, config)
    print(f"{config.tokenizer} tokenizer: {tokenizer.vocab_size:,} tokens", file=sys.stderr)

    # Everything is written beside --out and moved there when it is whole: a dataset is never half there.
    temporary = config.out.with_name(f".{config.out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        writer = DatasetWriter(temporary, tokenizer, config.shard_tokens)
        documents = split_documents(files, held_out, config)
        while batch := list(islice(documents, 1024)):
            encoded = tokenizer.encode_batch([document.text for document in batch], config.workers)
            for document, ids in zip(batch, encoded, strict=True):
                writer.add(document.split, ids, len(document.text.encode()))
        manifest = writer.finish([file.name for file in files])
        if config.out.exists():
            shutil.rmtree(config.out)
        temporary.rename(config.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for split, counts in manifest["splits"].items():
        print(
            f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens "
            f"({counts['bytes'] / counts['tokens']:.2f} bytes a token)",
            file=sys.stderr,
        )


def list_files(inputs: tuple[Path, ...]) -> list[Path]:
    """The files to read, those of a directory in order of their names, hidden ones left out."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
            found = sorted(file for file in inside if file.is_file())
            if not found:
                raise UserError(f"{path}: a directory without files; --input needs text")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or directory")
    return files


def read_documents(files: list[Path], text_key: str) -> Iterator[str]:
    """The text of every document that is not empty. Raises UserError naming the file and the line or byte at fault."""
    for path in files:
        try:
            if path.suffix == ".jsonl":
                with path.open("rb") as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            yield read_json_text(line, f"{path}:{number}", text_key)
            else:
                text = decode(path.read_bytes(), str(path))
                if text.strip():
                    yield text
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None


def decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")  # a byte-order mark is not text
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start}; convert it first (iconv -t UTF-8)") from None


def read_json_text(line: bytes, place: str, text_key: str) -> str:
    try:
        value = json.loads(decode(line, place))
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
        raise UserError(f'{place}: no text under the key "{text_key}"; --text_key names another')
    text = value[text_key]
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{place}: half a surrogate pair in the text")
    return text


def choose_split(files: list[Path], config: PrepareOptions) -> float | None:
    """The share below which a document is held out; None where there is a single document, which is cut instead.

    With so few documents that the hash holds out none, or all, the one with the smallest share is.
    """
    shares = [share(text) for text in read_documents(files, config.text_key)]
    if not shares:
        raise UserError(f"{', '.join(str(path) for path in config.input)}: no text in there")
    if len(set(shares)) == 1:
        return None
    smallest, second = sorted(set(shares))[:2]
    everything = max(shares) < config.val_fraction
    return (smallest + second) / 2 if smallest >= config.val_fraction or everything else config.val_fraction


def split_documents(files: list[Path], held_out: float | None, config: PrepareOptions) -> Iterator[Document]:
    """Every document with its split."""
    for text in read_documents(files, config.text_key):
        if held_out is None:
            cut = int(len(text) * (1 - config.val_fraction))
            if not 0 < cut < len(text):
                raise UserError(f"{files[0]}: too short to hold out {config.val_fraction} of it for validation")
            yield Document("train", text[:cut])
            yield Document("val", text[cut:])
            return
        yield Document("val" if share(text) < held_out else "train", text)


def make_tokenizer(files: list[Path], held_out: float | None, config: PrepareOptions) -> Tokenizer:
    """The tokenizer that --tokenizer names; bpe learns from the training split alone, char knows every character there is."""
    documents = split_documents(files, held_out, config)
    match config.tokenizer:
        case "byte":
            return ByteTokenizer()
        case "char":
            return CharTokenizer(set().union(*(set(document.text) for document in documents)))
        case "bpe":
            return train_bpe((document.text for document in documents if document.split == "train"), config.vocab_size)
        case "gpt2":
            return gpt2_tokenizer(config.ranks)
        case path if Path(path).is_dir():
            return load_tokenizer(Path(path))
        case name:
            raise UserError(f"--tokenizer={name}: neither byte, char, bpe, gpt2 nor a directory with a tokenizer")


if __name__ == "__main__":
    run(main, parse(PrepareOptions, doc=__doc__))

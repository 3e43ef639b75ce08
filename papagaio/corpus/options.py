"""The options of data/prepare.py, and those of them that say how text files are read."""

from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from papagaio.corpus.workers import processors
from papagaio.launch import launched
from papagaio.options import Options, option

_files = partial(option, group="Input and output")
_tokenizer = partial(option, group="Tokenizer")
_splitting = partial(option, group="Splitting")
_work = partial(option, group="Work")
_reading = partial(option, group="Reading")


class ReadingOptions(Options):
    """How input files are read."""

    format: Literal["auto", "text", "jsonl", "json", "csv", "parquet"] = _reading("auto", "of the files; auto: by their content")
    text_key: str = _reading("text", "key or column that holds the text in JSON, CSV and Parquet; a.b: b inside a")
    split_documents: str = _reading(
        "none", "split text files into documents: none, blank_line, or the TEXT that stands between them", max_length=256
    )
    encoding: str = _reading("utf-8", "encoding of text, JSON and CSV files; auto: found for each file")
    errors: Literal["strict", "replace"] = _reading("strict", "what cannot be decoded stops the run, or becomes U+FFFD")
    skip_bad: bool = _reading(False, "leave out rows and text files that cannot be read, instead of stopping")
    exclude: tuple[str, ...] = _reading((), "patterns of names or paths inside directories that are passed over")


class PrepareOptions(ReadingOptions):
    """Options of data/prepare.py."""

    input: tuple[str, ...] = _files((), "files, directories, patterns, hf://NAME[:CONFIG][:SPLIT], or - for standard input")
    out: Path | None = _files(None, "dataset directory to make")
    overwrite: bool = _files(False, "replace the dataset in --out, and discard what an interrupted run has left")
    inspect: Path | None = _files(None, "verify a dataset, print what is in it, and stop")
    tokenizer: str = _tokenizer("bpe", "byte, char, bpe (trained on this corpus), gpt2, or a tokenizer directory, dataset or run")
    vocab_size: int = _tokenizer(4096, "tokens of a bpe tokenizer, with the five special tokens", ge=261, le=2**20)
    sample_bytes: int = _tokenizer(2**28, "bytes that a bpe tokenizer is trained on, taken evenly from the whole corpus", ge=1)
    ranks: Path | None = _tokenizer(None, "GPT-2's vocabulary in tiktoken's format: saves the download, or is compared with bpe")
    val_fraction: float = _splitting(0.05, "fraction of the bytes held out for validation", gt=0, lt=1)
    val_input: tuple[str, ...] = _splitting((), "validation text, as for --input: then nothing of --input is held out")
    keep_duplicates: bool = _splitting(False, "keep all copies of equal documents")
    shard_tokens: int = _splitting(100_000_000, "tokens per shard file", ge=1024)
    workers: int = _work(processors(), "processes that encode", ge=1)
    part: str | None = _work(
        None, "i/n: encode part i of n, counted from 0; 0/1 does what is missing and merges", pattern=r"^\d+/\d+$"
    )

    @model_validator(mode="after")
    def _complete(self) -> "PrepareOptions":
        if not self.inspect and not (self.input and self.out):
            raise ValueError("--input and --out are required: what to read, and where to write the dataset")
        index, count = self.share_of_work
        if index >= count:
            raise ValueError(f"--part={self.part}: parts are counted from 0 to n - 1")
        if "-" in self.input and count > 1:
            raise ValueError("--part: standard input cannot be shared; write it to a file")
        if "-" in self.val_input:
            raise ValueError("--val_input takes files; standard input (-) is for --input")
        if self.val_input and "val_fraction" in self.model_fields_set:
            raise ValueError("--val_fraction: all of --val_input is the validation split; give one of the two")
        return self

    @property
    def share_of_work(self) -> tuple[int, int]:
        """(i, n) from --part, else the rank and the number of processes from torchrun or srun, else (0, 1)."""
        if self.part:
            index, count = self.part.split("/")
            return int(index), int(count)
        rank, size, _ = launched()
        return rank, size

"""Dataset directories: token ids in NumPy files, and a manifest that describes them.

dataset/
  train-00000.npy ...  val-00000.npy ...   one-dimensional, uint16 or uint32; each document begins with the <|endoftext|> id
  tokenizer/                               the tokenizer that made them
  manifest.json                            counts, names and the sha256 of each shard; written last
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from papagaio.corpus.workers import processors
from papagaio.errors import UserError
from papagaio.files import GIVE_TEXT, FileName, Manifest, Sha256, file_sha256, read_manifest, refuse_pickle, sync_and_close
from papagaio.tokenizer import Tokenizer
from papagaio.tokenizer_files import load_tokenizer

SPLITS = ("train", "val")


class ShardWriter:
    """Writes the `total` tokens of a split into shards of `shard_tokens`. A shard gets its name when it is complete and on disk.

    Shards that an interrupted run has left are kept: their `ready` tokens must not be written again.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype, total: int, shard_tokens: int) -> None:
        sizes = [min(shard_tokens, total - start) for start in range(0, total, shard_tokens)]
        self.dtype = dtype
        self.left = [(directory / f"{split}-{i:05d}.npy", size) for i, size in enumerate(sizes)]
        self.done: list[dict[str, Any]] = []  # the manifest's entries
        self.ready = 0
        while self.left and self.left[0][0].exists():
            self.ready += self._complete()
        self.file: BinaryIO | None = None

    def write(self, tokens: NDArray[np.integer]) -> bool:
        """Append tokens to the split. Returns True if a shard has become complete."""
        assert tokens.dtype == self.dtype, "tokens of another type could wrap"
        before = len(self.done)
        while len(tokens):
            path, size = self.left[0]
            if self.file is None:
                self.file, self.room = path.with_suffix(".tmp").open("wb"), size
                header = {"descr": self.dtype.str, "fortran_order": False, "shape": (size,)}
                np.lib.format.write_array_header_1_0(self.file, header)
            part, tokens = tokens[: self.room], tokens[self.room :]
            self.file.write(part.tobytes())
            self.room -= len(part)
            if not self.room:
                sync_and_close(self.file)
                Path(self.file.name).rename(path)
                self.file = None
                self._complete()
        return len(self.done) > before

    def _complete(self) -> int:
        """Enter the next shard, which is in its place, into `done`. Returns its tokens."""
        path, size = self.left.pop(0)
        self.done.append({"file": path.name, "tokens": size, "sha256": file_sha256(path)})
        return size


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest dtype of shards that holds every id."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


class Shard(Manifest):
    """The manifest's entry for a shard."""

    file: FileName
    tokens: int
    sha256: Sha256


class Split(Manifest):
    """The manifest's entry for a split. The longest document is in tokens."""

    documents: int
    tokens: int
    bytes: int
    duplicates: int = 0
    duplicates_kept: bool = False
    longest_document: int = 0
    bytes_per_token: float = 0.0
    shards: list[Shard]


class Splits(Manifest):
    train: Split
    val: Split


class DatasetManifest(Manifest):
    """manifest.json. Fields with a default are for people, and may be missing if another program made the dataset."""

    of: ClassVar[str] = "a dataset's manifest"

    tokenizer_sha256: Sha256
    vocab_size: int | None = None
    dtype: Literal["uint16", "uint32"]
    sources: list[str] = Field(default_factory=list)
    val_sources: list[str] = Field(default_factory=list)  # --val_input
    made_from: str | None = None  # hash of the content of the input and of the options
    input_files: int = 0
    input_bytes: int = 0
    empty_documents: int = 0
    cut_documents: int = 0  # their ends are in val, the rest in train
    documents_in_val_input: int = 0  # left out of train, because they are in --val_input too
    left_out: dict[str, int] = Field(default_factory=dict)  # what was not read, by reason
    replaced_characters: int = 0  # characters that became U+FFFD
    splits: Splits


class Dataset:
    """A dataset directory, opened for reading: `manifest`, `tokenizer`, and the memory-mapped `shards(split)`.

    Raises UserError if the directory is not a whole dataset, with the name of the file that is missing, cut short or changed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "manifest.json"
        if not path.exists():
            refuse_pickle(directory, GIVE_TEXT)
        self.manifest = read_manifest(path, DatasetManifest, "data/prepare.py makes dataset directories: prepare the data again")
        self.dtype = np.dtype(self.manifest["dtype"])
        self.splits = self.manifest["splits"]
        described = directory / "tokenizer" / "tokenizer.json"
        if described.exists() and file_sha256(described) != self.manifest["tokenizer_sha256"]:
            raise UserError(f"{described}: the tokenizer is not the one the shards were made with; prepare the data again")
        self.tokenizer = load_tokenizer(directory / "tokenizer")
        self._opened: dict[str, list[NDArray]] = {}

    @property
    def sha256(self) -> str:
        """Identity: datasets with equal sha256 hold the same tokens of the same tokenizer, wherever they are stored."""
        shards = [shard["sha256"] for split in SPLITS for shard in self.splits[split]["shards"]]
        return hashlib.sha256(" ".join([self.tokenizer.sha256, *shards]).encode()).hexdigest()

    def shards(self, split: str) -> list[NDArray]:
        """The token ids of a split: a memory-mapped array per shard, each verified by its sha256 when first asked for."""
        if split not in self._opened:
            self._opened[split] = self._open_shards(split)
        return self._opened[split]

    def _open_shards(self, split: str) -> list[NDArray]:
        entries = self.splits[split]["shards"]
        paths = [self.directory / entry["file"] for entry in entries]
        try:
            with ThreadPoolExecutor(processors()) as pool:  # hashing releases the GIL
                hashes = list(pool.map(file_sha256, paths))
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; prepare the data again") from None
        shards = []
        for path, entry, digest in zip(paths, entries, hashes, strict=True):
            if digest != entry["sha256"]:
                raise UserError(f"{path}: cut short or changed since it was written; prepare the data again")
            try:  # in one thread: NumPy parses the headers with ast, which has a race in CPython 3.11
                tokens = np.lib.format.open_memmap(path, mode="r")  # np.load would open archives as well
            except (OSError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
                raise UserError(f"{path}: not a whole .npy file ({error!r}); prepare the data again") from None
            if tokens.dtype != self.dtype or tokens.shape != (entry["tokens"],):
                raise UserError(
                    f"{path}: {tokens.dtype} {tokens.shape} where the manifest says {self.dtype} ({entry['tokens']},)"
                )
            shards.append(tokens)
        return shards

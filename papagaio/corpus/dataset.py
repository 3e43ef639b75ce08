"""Dataset directories: token ids in NumPy files, and a manifest that says what is in them.

dataset/
  train-00000.npy ...  val-00000.npy ...   one-dimensional uint16 or uint32, each document after an <|endoftext|> id
  tokenizer/                               the tokenizer that made them
  manifest.json                            counts, names and the sha256 of each shard; written last
"""

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from papagaio.errors import UserError
from papagaio.files import GIVE_TEXT, FileName, Manifest, Sha256, file_sha256, read_manifest, refuse_pickle, sync_and_close
from papagaio.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "val")


class ShardWriter:
    """Writes `total` tokens of one split into shards of `shard_tokens`; each gets its name when it is whole, and on disk.

    Shards that an interrupted run has left are kept: `ready` tokens are there already, and are not to be written again.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype, total: int, shard_tokens: int) -> None:
        sizes = [min(shard_tokens, total - start) for start in range(0, total, shard_tokens)]
        self.dtype = dtype
        self.left = [(directory / f"{split}-{i:05d}.npy", size) for i, size in enumerate(sizes)]
        self.done: list[dict[str, Any]] = []  # the manifest's entries
        self.ready = 0
        while self.left and self.left[0][0].exists():
            path, size = self.left.pop(0)
            self.done.append({"file": path.name, "tokens": size, "sha256": file_sha256(path)})
            self.ready += size
        self.file: BinaryIO | None = None

    def write(self, tokens: NDArray[np.integer]) -> bool:
        """Append tokens, in the order in which they follow; true if a shard has become whole."""
        assert tokens.dtype == self.dtype, "tokens of another type could wrap"
        whole = False
        while len(tokens):
            if self.file is None:
                self._open()
            part, tokens = tokens[: self.room], tokens[self.room :]
            data = part.tobytes()
            self.file.write(data)
            self.hash.update(data)
            self.room -= len(part)
            if self.room == 0:
                whole = True
                self._finish()
        return whole

    def _open(self) -> None:
        path, self.room = self.left[0]
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": self.dtype.str, "fortran_order": False, "shape": (self.room,)})
        self.file = path.with_suffix(".tmp").open("wb")
        self.file.write(header.getvalue())
        self.hash = hashlib.sha256(header.getvalue())

    def _finish(self) -> None:
        path, size = self.left.pop(0)
        sync_and_close(self.file)
        self.file = None
        path.with_suffix(".tmp").rename(path)
        self.done.append({"file": path.name, "tokens": size, "sha256": self.hash.hexdigest()})


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type of shards that holds every id."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


class Shard(Manifest):
    """What the manifest says of a shard."""

    file: FileName
    tokens: int
    sha256: Sha256


class Split(Manifest):
    """What the manifest says of a split. The longest document is in tokens."""

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
    """manifest.json. What has a default is for people, and may be missing where another program made the dataset."""

    of: ClassVar[str] = "a dataset's manifest"

    tokenizer_sha256: Sha256
    vocab_size: int | None = None
    dtype: Literal["uint16", "uint32"]
    sources: list[str] = Field(default_factory=list)
    made_from: str | None = None
    empty_documents: int = 0
    splits: Splits


class Dataset:
    """A dataset directory, opened for reading: `manifest`, `tokenizer`, and `shards(split)`, memory-mapped.

    Raises UserError where the directory is not a whole dataset: a shard missing, cut short or changed is named.
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

    @property
    def sha256(self) -> str:
        """Identity: two datasets with equal sha256 hold the same tokens of the same tokenizer, wherever they stand."""
        shards = [shard["sha256"] for split in SPLITS for shard in self.splits[split]["shards"]]
        return hashlib.sha256(" ".join([self.tokenizer.sha256, *shards]).encode()).hexdigest()

    def shards(self, split: str) -> list[NDArray]:
        """The token ids of a split, a memory-mapped array a shard, each verified by its sha256."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing runs outside of Python's lock
            return list(pool.map(self._open, self.splits[split]["shards"]))

    def _open(self, shard: dict[str, Any]) -> NDArray:
        path = self.directory / shard["file"]
        try:
            if file_sha256(path) != shard["sha256"]:
                raise UserError(f"{path}: cut short or changed since it was written; prepare the data again")
            tokens = np.lib.format.open_memmap(path, mode="r")  # np.load would open archives as well
        except UserError:
            raise
        except (OSError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
            raise UserError(f"{path}: not a whole .npy file ({error!r}); prepare the data again") from None
        if tokens.dtype != self.dtype or tokens.shape != (shard["tokens"],):
            raise UserError(f"{path}: {tokens.dtype} {tokens.shape} where the manifest says {self.dtype} ({shard['tokens']},)")
        return tokens


def share(text: str) -> float:
    """A text's place in [0, 1), from a hash: those below a fraction are held out, and adding texts moves none."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64

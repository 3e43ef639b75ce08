"""Dataset directories: token ids in NumPy files, and a manifest that says what is in them.

dataset/
  train-00000.npy ...  val-00000.npy ...   one-dimensional uint16 or uint32, each document after an <|endoftext|> id
  tokenizer/                               the tokenizer that made them
  manifest.json                            counts, names and the sha256 of each shard; written last
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papagaio.config import UserError
from papagaio.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, save_tokenizer

SPLITS = ("train", "val")


@dataclass
class _Split:
    """What is counted and not yet written of one split."""

    pending: list[NDArray] = field(default_factory=list)
    pending_tokens: int = 0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)


class DatasetWriter:
    """Writes documents into a dataset directory, a shard of `shard_tokens` tokens at a time; `finish` writes the manifest.

    A document may go on in the next shard: shards are cut by size alone.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.directory, self.tokenizer, self.shard_tokens = directory, tokenizer, shard_tokens
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.splits = {split: _Split() for split in SPLITS}
        self.start = np.array([tokenizer.special[END_OF_TEXT]], self.dtype)

    def add(self, split: str, ids: Sequence[int], n_bytes: int) -> None:
        """Append one document, `n_bytes` long as UTF-8."""
        s = self.splits[split]
        wide = np.asarray(ids, np.int64)
        assert wide.size == 0 or 0 <= wide.min() <= wide.max() < self.tokenizer.vocab_size, "a token id would wrap"
        s.pending += [self.start, wide.astype(self.dtype)]
        s.pending_tokens += 1 + len(ids)
        s.bytes += n_bytes
        s.documents += 1
        while s.pending_tokens >= self.shard_tokens:
            self._write_shard(split)

    def finish(self, sources: list[str]) -> dict[str, Any]:
        """Write what is pending, the tokenizer, and the manifest, which is returned."""
        for split in SPLITS:
            if self.splits[split].pending_tokens:
                self._write_shard(split)
        save_tokenizer(self.tokenizer, self.directory / "tokenizer")
        manifest = {
            "tokenizer_sha256": self.tokenizer.sha256,
            "vocab_size": self.tokenizer.vocab_size,
            "dtype": self.dtype.name,
            "sources": sources,
            "splits": {
                name: {"tokens": s.tokens, "bytes": s.bytes, "documents": s.documents, "shards": s.shards}
                for name, s in self.splits.items()
            },
        }
        text = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
        (self.directory / "manifest.json").write_text(text, encoding="utf-8")
        return manifest

    def _write_shard(self, split: str) -> None:
        s = self.splits[split]
        tokens = np.concatenate(s.pending)
        shard, rest = tokens[: self.shard_tokens], tokens[self.shard_tokens :]
        s.pending, s.pending_tokens = [rest], len(rest)
        path = self.directory / f"{split}-{len(s.shards):05d}.npy"
        np.save(path, shard, allow_pickle=False)
        s.shards.append({"file": path.name, "tokens": len(shard), "sha256": file_sha256(path)})
        s.tokens += len(shard)


class Dataset:
    """A dataset directory, opened for reading: `manifest`, `tokenizer`, and `shards(split)`, memory-mapped.

    Raises UserError where the directory is not a whole dataset: a shard missing, cut short or changed is named.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "manifest.json"
        try:
            self.manifest = json.loads(path.read_text(encoding="utf-8"))
            self.dtype = np.dtype(self.manifest["dtype"])
            self.splits = {split: self.manifest["splits"][split] for split in SPLITS}
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; data/prepare.py makes dataset directories") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a dataset's manifest ({error!r}); prepare the data again") from None
        self.tokenizer = load_tokenizer(directory / "tokenizer")
        if self.tokenizer.sha256 != self.manifest["tokenizer_sha256"]:
            raise UserError(f"{directory}: the tokenizer is not the one the shards were made with; prepare the data again")

    def shards(self, split: str) -> list[NDArray]:
        """The token ids of a split, a memory-mapped array a shard, each verified by its sha256."""
        return [self._open(shard) for shard in self.splits[split]["shards"]]

    def _open(self, shard: dict[str, Any]) -> NDArray:
        path = self.directory / shard["file"]
        try:
            if file_sha256(path) != shard["sha256"]:
                raise UserError(f"{path}: cut short or changed since it was written; prepare the data again")
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: {error}; prepare the data again") from None
        if tokens.dtype != self.dtype or tokens.shape != (shard["tokens"],):
            raise UserError(f"{path}: {tokens.dtype} {tokens.shape} where the manifest says {self.dtype} ({shard['tokens']},)")
        return tokens


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share(text: str) -> float:
    """A text's place in [0, 1), from a hash: those below a fraction are held out, and adding texts moves none."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64

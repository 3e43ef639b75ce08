"""The datasets that a pretraining run reads: opened, weighted, and measured.

--data out/wiki:3 out/books      an epoch has each window of out/wiki three times, and each window of out/books once
"""

import hashlib
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
from torch import nn

from papagaio.batches.mixture import parse_source
from papagaio.batches.windows import ValidationWindows, WindowLoader
from papagaio.corpus.dataset import Dataset
from papagaio.errors import UserError
from papagaio.evaluation import evaluate_loss
from papagaio.training.parallel import ALONE, World


class Corpora:
    """The datasets named by `words`, DIR or DIR:WEIGHT, with one tokenizer.

    Raises UserError if a dataset is not whole or is named twice, or if the tokenizers differ.
    """

    def __init__(self, words: Sequence[str]) -> None:
        sources = [parse_source(word) for word in words]
        self.datasets = [Dataset(Path(source.name)) for source in sources]
        self.weights = [source.weight for source in sources]
        self.tokenizer = self.datasets[0].tokenizer
        for source, dataset in zip(sources, self.datasets, strict=True):
            if dataset.tokenizer.sha256 != self.tokenizer.sha256:
                raise UserError(
                    f"--data: {sources[0].name} and {source.name} have different tokenizers; prepare one of them again with "
                    f"--tokenizer {sources[0].name}"
                )
        paths = [dataset.directory.resolve() for dataset in self.datasets]
        for i, path in enumerate(paths):
            if path in paths[:i]:
                raise UserError(f"--data: {sources[i].name} is named twice; give it a weight instead, {sources[i].name}:2")
        depth = next(n for n in count(1) if len({path.parts[-n:] for path in paths}) == len(paths))
        self.names = ["/".join(path.parts[-depth:]) for path in paths]  # the shortest that tell them apart

    @property
    def sha256(self) -> str:
        """Identity: equal for the same tokens in the same mixture, wherever the datasets are stored."""
        if self.weights == [1.0]:
            return self.datasets[0].sha256
        parts = (f"{dataset.sha256} {weight!r}" for dataset, weight in zip(self.datasets, self.weights, strict=True))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def epoch_tokens(self) -> int:
        """Training tokens of an epoch: those of every dataset, times its weight."""
        return sum(
            int(weight * dataset.splits["train"]["tokens"]) for dataset, weight in zip(self.datasets, self.weights, strict=True)
        )

    def loader(self, block_size: int, batch_size: int, seed: int, document_mask: bool) -> WindowLoader:
        """The training windows of all datasets, in one random order."""
        options = {"repeats": self.weights, "document_mask": document_mask}
        return WindowLoader(self.datasets, "train", block_size, batch_size, seed, **options)


class Validation:
    """Measures the validation splits of several datasets. `shares` are the datasets' parts of the training windows, and sum to 1.

    Of `max_tokens` (0: all), each dataset gets its share. val_loss is the mean of the datasets' losses weighted by the shares, so
    that it stands for the text that is trained on even if a small dataset has too few validation tokens.
    """

    def __init__(
        self,
        corpora: Corpora,
        shares: Sequence[float],
        block_size: int,
        batch_size: int,
        max_tokens: int,
        document_mask: bool,
    ) -> None:
        self.corpora, self.shares = corpora, shares
        limits = [max(1, round(share * max_tokens)) if max_tokens else 0 for share in shares]
        self.parts = [
            ValidationWindows(dataset, block_size, batch_size, limit, document_mask=document_mask)
            for dataset, limit in zip(corpora.datasets, limits, strict=True)
        ]
        splits = [dataset.splits["val"] for dataset in corpora.datasets]
        self.whole = sum(split["tokens"] for split in splits)
        self.tokens = sum(
            min(len(part.starts) * block_size, split["tokens"]) for part, split in zip(self.parts, splits, strict=True)
        )
        bytes_ = [share * max(1, split["bytes"]) / split["tokens"] for share, split in zip(shares, splits, strict=True)]
        self.byte_shares = [part / sum(bytes_) for part in bytes_]

    def __call__(self, model: nn.Module, dtype: torch.dtype, world: World = ALONE) -> dict[str, float]:
        """val_loss in nats per token, val_bpb in bits per byte; of several datasets, val_loss/NAME of each as well."""
        found = [evaluate_loss(model, part, self.corpora.tokenizer, dtype, world) for part in self.parts]
        if len(found) == 1:
            return found[0]
        losses = [each["val_loss"] for each in found]
        return {
            "val_loss": sum(share * loss for share, loss in zip(self.shares, losses, strict=True)),
            "val_bpb": sum(share * each["val_bpb"] for share, each in zip(self.byte_shares, found, strict=True)),
            **{f"val_loss/{name}": loss for name, loss in zip(self.corpora.names, losses, strict=True)},
        }

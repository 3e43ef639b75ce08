"""Describes a dataset in words."""

from typing import Any

import numpy as np

from papagaio.corpus.dataset import SPLITS, Dataset
from papagaio.tokenizer import END_OF_TEXT, Tokenizer

COMPARED = 2**22  # held-out tokens on which tokenizers are compared


def summary(manifest: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Tokenizer, and the counts of both splits."""
    lines = [f"{tokenizer.kind} tokenizer: {tokenizer.vocab_size:,} tokens"]
    lines.append(f"empty documents left out: {manifest['empty_documents']:,}")
    return "\n".join(lines + [f"{split}: {counts(manifest['splits'][split])}" for split in SPLITS])


def counts(split: dict[str, Any]) -> str:
    return (
        f"{split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} tokens "
        f"({split['bytes_per_token']:.2f} bytes per token), longest document {split['longest_document']:,} tokens, "
        f"duplicates {'kept' if split['duplicates_kept'] else 'left out'}: {split['duplicates']:,}"
    )


def comparison(dataset: Dataset, gpt2: Tokenizer) -> str:
    """Bytes per token of the dataset's tokenizer on held-out text, and of GPT-2's."""
    tokenizer, tokens = dataset.tokenizer, dataset.shards("val")[0][:COMPARED]
    starts = np.flatnonzero(tokens == tokenizer.special[END_OF_TEXT])
    texts = [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts)[1:]]
    n_bytes = sum(len(text.encode()) for text in texts)
    ours, theirs = (n_bytes / sum(len(t.encode_array(text)) for text in texts) for t in (tokenizer, gpt2))
    return f"bytes per token on {n_bytes:,} bytes of held-out text: {ours:.2f}, with GPT-2's vocabulary {theirs:.2f}"


def inspection(dataset: Dataset) -> str:
    """All about a dataset: its counts, its verified shards, and samples of text, in which ▌ marks the beginning of a document."""
    tokenizer, manifest = dataset.tokenizer, dataset.manifest
    lines = [
        f"made from {', '.join(manifest['sources'])}; empty documents left out: {manifest['empty_documents']:,}",
        f"{tokenizer.kind} tokenizer of {tokenizer.vocab_size:,} tokens, stored as {manifest['dtype']}",
    ]
    for split in SPLITS:
        lines += ["", f"{split}: {counts(dataset.splits[split])}"]
        shards = dataset.shards(split)
        for entry in dataset.splits[split]["shards"]:
            lines.append(f"  {entry['file']}: {entry['tokens']:,} tokens, sha256 {entry['sha256'][:16]}... verified")
        longest = max(shards, key=len, default=np.zeros(0, dataset.dtype))
        starts = np.flatnonzero(longest[: 2**24] == tokenizer.special[END_OF_TEXT])
        for position in starts[:: max(1, len(starts) // 3)][:3].tolist():
            begin = max(0, position - 24)
            text = tokenizer.decode(longest[begin : position + 40]).replace(END_OF_TEXT, " ▌ ")
            lines.append(f"  from token {begin:,}: {text!r}")
    return "\n".join(lines)

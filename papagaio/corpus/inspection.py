"""What a dataset holds, in words."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from papagaio.corpus.dataset import SPLITS, Dataset
from papagaio.tokenizer import END_OF_TEXT, Tokenizer

COMPARED = 2**22  # held-out tokens on which tokenizers are compared


def summary(manifest: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Counts of both splits."""
    lines = [f"{tokenizer.kind} tokenizer: {tokenizer.vocab_size:,} tokens"]
    lines.append(f"empty documents left out: {manifest['empty_documents']:,}")
    return "\n".join(lines + [f"{split}: {counts(manifest['splits'][split])}" for split in SPLITS])


def comparison(dataset: Dataset, gpt2: Tokenizer | None) -> str:
    """Bytes a token of the dataset's tokenizer on held-out text, beside GPT-2's."""
    if gpt2 is None:
        return "bytes a token: GPT-2's vocabulary is not at hand to compare with (--ranks FILE)"
    texts = [dataset.tokenizer.decode(ids) for ids in documents(dataset.shards("val")[0][:COMPARED], dataset.tokenizer)]
    n_bytes = sum(len(text.encode()) for text in texts)
    ours, theirs = (n_bytes / sum(len(t.encode_array(text)) for text in texts) for t in (dataset.tokenizer, gpt2))
    return f"bytes a token on {n_bytes:,} bytes of held-out text: {ours:.2f}, with GPT-2's vocabulary {theirs:.2f}"


def counts(found: dict[str, Any]) -> str:
    return (
        f"{found['documents']:,} documents, {found['bytes']:,} bytes, {found['tokens']:,} tokens "
        f"({found['bytes_per_token']:.2f} bytes a token), longest document {found['longest_document']:,} tokens, "
        f"duplicates {'kept' if found['duplicates_kept'] else 'left out'}: {found['duplicates']:,}"
    )


def documents(tokens: NDArray[np.integer], tokenizer: Tokenizer) -> list[list[int]]:
    """The documents of some tokens, each without the token that begins it."""
    start = tokenizer.special[END_OF_TEXT]
    parts = np.split(tokens, np.flatnonzero(tokens == start))
    return [part[part != start].tolist() for part in parts if len(part)]


def inspection(dataset: Dataset) -> str:
    """Everything about a dataset, its shards verified, with some windows decoded; a bar ▌ stands where a document begins."""
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
        boundaries = np.flatnonzero(longest[: 2**24] == tokenizer.special[END_OF_TEXT])
        for boundary in boundaries[:: max(1, len(boundaries) // 3)][:3].tolist():
            start = max(0, boundary - 24)
            text = tokenizer.decode(longest[start : boundary + 40]).replace(END_OF_TEXT, " ▌ ")
            lines.append(f"  from token {start:,}: {text!r}")
    return "\n".join(lines)

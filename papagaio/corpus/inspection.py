"""Describes a dataset in words."""

from collections.abc import Container
from typing import Any

import numpy as np

from papagaio.corpus.dataset import SPLITS, Dataset
from papagaio.tokenizer import Tokenizer

COMPARED = 2**22  # held-out tokens on which tokenizers are compared
MANY_REPLACED = 0.001  # share of the text that may be U+FFFD without a warning


def summary(dataset: Dataset, said: Container[str] = ()) -> str:
    """Tokenizer, what was left out apart from the reasons in `said`, and the counts of both splits."""
    lines = [f"{dataset.tokenizer.kind} tokenizer: {dataset.tokenizer.vocab_size:,} tokens", *left_out(dataset.manifest, said)]
    return "\n".join([*lines, held_out(dataset), *(f"{split}: {counts(dataset.splits[split])}" for split in SPLITS)])


def left_out(manifest: dict[str, Any], said: Container[str] = ()) -> list[str]:
    """What is not in the dataset, or not as it was in the input."""
    lines = [f"empty documents left out: {manifest['empty_documents']:,}"]
    if manifest["documents_in_val_input"]:
        lines.append(f"left out of train, because --val_input has them too: {manifest['documents_in_val_input']:,} documents")
    reasons = [f"{reason}: {count:,}" for reason, count in manifest["left_out"].items() if reason not in said]
    return lines + reasons + replaced(manifest)


def replaced(manifest: dict[str, Any]) -> list[str]:
    """A warning if many characters became U+FFFD. The share is of the bytes of text: U+FFFD takes three."""
    count, n_bytes = manifest["replaced_characters"], sum(split["bytes"] for split in manifest["splits"].values())
    if 3 * count <= MANY_REPLACED * n_bytes:
        return []
    return [
        f"warning: {count:,} characters ({3 * count / n_bytes:.1%} of the bytes) could not be decoded and are U+FFFD: "
        "wrong --encoding? auto finds that of each file"
    ]


def held_out(dataset: Dataset) -> str:
    """The share of the validation split, and how it was chosen."""
    sizes = {split: dataset.splits[split]["bytes"] for split in SPLITS}
    line = f"validation split: {sizes['val'] / max(1, sum(sizes.values())):.2%} of the bytes"
    if cut := dataset.manifest["cut_documents"]:
        line += f"; {cut:,} large {'document is' if cut == 1 else 'documents are'} cut, and the end is held out"
    return line


def counts(split: dict[str, Any]) -> str:
    return (
        f"{split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} tokens "
        f"({split['bytes_per_token']:.2f} bytes per token), longest document {split['longest_document']:,} tokens, "
        f"duplicates {'kept' if split['duplicates_kept'] else 'left out'}: {split['duplicates']:,}"
    )


def comparison(dataset: Dataset, gpt2: Tokenizer) -> str:
    """Bytes per token of the dataset's tokenizer on held-out text, and of GPT-2's."""
    tokenizer, tokens = dataset.tokenizer, dataset.shards("val")[0][:COMPARED]
    starts = np.flatnonzero(tokens == tokenizer.start)
    texts = [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts)[1:]]
    n_bytes = sum(len(text.encode()) for text in texts)
    ours, theirs = (n_bytes / sum(len(t.encode_array(text)) for text in texts) for t in (tokenizer, gpt2))
    return f"bytes per token on {n_bytes:,} bytes of held-out text: {ours:.2f}, with GPT-2's vocabulary {theirs:.2f}"


def inspection(dataset: Dataset) -> str:
    """All about a dataset: its counts, its verified shards, and samples of text, in which ▌ marks the beginning of a document."""
    tokenizer, manifest = dataset.tokenizer, dataset.manifest
    lines = [
        f"made from {', '.join(manifest['sources'])}; empty documents left out: {manifest['empty_documents']:,}",
        *left_out(manifest)[1:],
        f"{tokenizer.kind} tokenizer of {tokenizer.vocab_size:,} tokens, stored as {manifest['dtype']}",
        *([f"validation text: {', '.join(manifest['val_sources'])}"] if manifest["val_sources"] else []),
        held_out(dataset),
    ]
    for split in SPLITS:
        lines += ["", f"{split}: {counts(dataset.splits[split])}"]
        shards = dataset.shards(split)
        for entry in dataset.splits[split]["shards"]:
            lines.append(f"  {entry['file']}: {entry['tokens']:,} tokens, sha256 {entry['sha256'][:16]}... verified")
        longest = max(shards, key=len, default=np.zeros(0, dataset.dtype))
        starts = np.flatnonzero(longest[: 2**24] == tokenizer.start)
        for position in starts[:: max(1, len(starts) // 3)][:3].tolist():
            begin = max(0, position - 24)
            text = tokenizer.decode(longest[begin : position + 40]).replace(tokenizer.decode([tokenizer.start]), " ▌ ")
            lines.append(f"  from token {begin:,}: {text!r}")
    return "\n".join(lines)

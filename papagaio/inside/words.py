"""Words as vectors, and their nearest neighbours by cosine.

A word is a row of the table of embeddings if it is a single token (with the blank before it, or else without), or with a layer
the mean of its tokens' hidden states after that many blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import regex
import torch
import torch.nn.functional as F
from torch import Tensor

from papagaio.errors import UserError
from papagaio.generation.engine import Engine
from papagaio.inside.hooks import observe
from papagaio.inside.opening import check_layer, span

LISTED = 8  # neighbours


class Words(NamedTuple):
    """Words and their vectors (N, C) of length 1."""

    names: list[str]
    vectors: Tensor

    def row(self, name: str) -> Tensor:
        return self.vectors[self.names.index(name)]


class Space(NamedTuple):
    """Where the vectors of words come from: the table of embeddings, or with a layer the hidden states after that many blocks.
    `around` is the text in which a word stands, with {} in its place. `pool`: the mean over the word's tokens, or the state of
    the last token of that text, which has seen all of it."""

    engine: Engine
    layer: int | None = None
    around: str = "{}"
    pool: str = "mean"

    def __str__(self) -> str:
        if self.layer is None:
            return "rows of the table of embeddings"
        what = "mean over a word's tokens" if self.pool == "mean" else "last token"
        return f"hidden states after {self.layer} blocks ({what}), in {self.around!r}"

    def has(self, word: str) -> bool:
        """Whether the word has a vector: any word does in a layer."""
        return self.layer is not None or token_of(self.engine, word) is not None

    def vectors(self, names: Sequence[str]) -> Words:
        """Raises UserError for a word of several tokens if no layer is given, and for a layer that is not there."""
        return rows_of_table(self.engine, names) if self.layer is None else self.hidden_states(names)

    def hidden_states(self, names: Sequence[str]) -> Words:
        engine, (before, behind) = self.engine, self.around.split("{}")
        check_layer(self.layer, engine.model.config.n_layer)
        rows = [engine.encode(before + word + behind) for word in names]
        if (longest := max(map(len, rows))) > engine.block_size:
            raise UserError(f"a word has {longest} tokens, the model's context only {engine.block_size}")
        found: dict[int, Tensor] = {}
        for length in {len(row) for row in rows}:  # rows of one length make a batch
            for part in torch.tensor([i for i, row in enumerate(rows) if len(row) == length]).split(64):
                batch = torch.tensor([rows[i] for i in part], device=engine.device)
                for i, x in zip(part.tolist(), observe(engine.model, batch).hidden[self.layer], strict=True):
                    found[i] = x[-1] if self.pool == "last" else x[span(engine, rows[i], names[i], behind)].mean(0)
        return Words(list(names), F.normalize(torch.stack([found[i] for i in range(len(names))]).float(), dim=-1))


def token_of(engine: Engine, word: str) -> int | None:
    """The id of a word that is a single token."""
    found = (engine.tokenizer.encode(text) for text in (f" {word}", word))
    return next((ids[0] for ids in found if len(ids) == 1), None)


def rows_of_table(engine: Engine, names: Sequence[str], ids: Sequence[int | None] = ()) -> Words:
    """Rows of the table of embeddings, of the words' own tokens or of `ids`. Raises UserError for a word of several tokens."""
    ids = ids or [token_of(engine, word) for word in names]
    for word, token in zip(names, ids, strict=True):
        if token is None:
            count = len(engine.tokenizer.encode(f" {word}"))
            raise UserError(f"{word!r} has {count} tokens, not one: --layer=N takes its mean hidden state after N blocks")
    table = engine.model.embed.weight.detach()
    return Words(list(names), F.normalize(table[torch.tensor(ids, dtype=torch.long, device=table.device)].float(), dim=-1))


def vocabulary(engine: Engine) -> Words:
    """The words that are single tokens: letters only, with the blank before them if the tokenizer has that form."""
    texts = {token: text for token in range(engine.tokenizer.vocab_size) if (text := engine.tokenizer.decode([token]))}
    with_blank = {text[1:]: token for token, text in texts.items() if regex.fullmatch(r" \p{L}{2,}", text)}
    bare = {text: token for token, text in texts.items() if regex.fullmatch(r"\p{L}{2,}", text)}
    words = bare | with_blank if len(with_blank) < 100 else with_blank
    return rows_of_table(engine, list(words), list(words.values()))


def nearest(words: Words, vector: Tensor, count: int, without: Sequence[str] = ()) -> list[tuple[str, float]]:
    """The words nearest to a vector (C,), with their cosines; without these words, whatever their capitals."""
    left_out, found = {word.casefold() for word in without}, list[tuple[str, float]]()
    cosines = words.vectors @ F.normalize(vector, dim=0)
    most = min(len(cosines), count + 8 * (1 + len(without)))  # room for the spellings of the words left out
    for i in cosines.topk(most).indices.tolist():
        if words.names[i].casefold() not in left_out and len(found) < count:
            found.append((words.names[i], float(cosines[i])))
    return found


def neighbours(words: Words, vector: Tensor, without: Sequence[str]) -> str:
    """`Tuesday 0.89, Wednesday 0.88, ...`"""
    return ", ".join(f"{name} {cosine:.2f}" for name, cosine in nearest(words, vector, LISTED, without))

"""From logits (B, V) to the next tokens, in pure functions, in this order, and `Sampler`, which calls them.

    logits = keep_top_p(logits / 0.8, 0.9)
    tokens = draw(logits, uniform)               # (B,), uniform (B,) in [0, 1)

A token that is ruled out has the logit -inf.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from papagaio.errors import MachineError, UserError
from papagaio.generation.decoding import Row
from papagaio.generation.options import SamplingOptions


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens marked in seen (B, V) less probable: positive logits are divided by the penalty, negative ones multiplied
    by it (CTRL, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row; 0, or more than there are, keeps all."""
    if k == 0 or k >= logits.size(-1):
        return logits
    top = logits.topk(k)  # by index and not by value, so that of equal logits no more than k are kept
    return torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (arXiv:1904.09751): keep the fewest most probable tokens whose probabilities together reach p."""
    if p == 1:
        return logits
    probabilities, order = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # the total of the more probable ones
    ruled_out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(ruled_out, -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as probable as the most probable one (arXiv:2407.01082)."""
    if p == 0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(-1, keepdim=True).values, -torch.inf)


def filtered(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Temperature (above 0), then top-k, then top-p and min-p of the tokens that are left."""
    return keep_min_p(keep_top_p(keep_top_k(logits / options.temperature, options.top_k), options.top_p), options.min_p)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) of each row at which its cumulative probability passes uniform (B,), in [0, 1).

    Each row has a random number of its own, so that its token does not depend on the other rows.
    """
    reached = logits.softmax(-1).double().cumsum(-1)
    aim = uniform.double()[:, None] * reached[:, -1:]
    aim = torch.minimum(aim, reached[:, -1:] * (1 - 1e-12))  # rounding must not lead past the last token with a probability
    return torch.searchsorted(reached, aim, right=True).squeeze(-1)


class Token(NamedTuple):
    """A token that was drawn. On demand with log-probabilities in nats, before any sampling option, of the token itself and of
    the most probable tokens, best first."""

    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Sampler:
    """Draws the next token of each row from logits (B, V), as the options say."""

    def __init__(
        self, options: SamplingOptions, vocab_size: int, banned: Collection[int], top: int | None, device: torch.device
    ) -> None:
        """Tokens in `banned` are never drawn. `top`: see Engine.complete. Raises UserError for ids outside the vocabulary."""
        self.options, self.top, self.bias = options, top, torch.zeros(vocab_size)
        for token, value in options.biases.items():
            if not 0 <= token < vocab_size:
                raise UserError(f"token {token}: the vocabulary has the ids 0 to {vocab_size - 1}")
            self.bias[token] = value
        self.bias[list(banned)] = -torch.inf
        self.bias = self.bias.to(device)

    def adjusted(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """Logits with penalties and biases."""
        if self.options.repetition_penalty != 1:
            seen = _counts([row.ids for row in rows], logits) > 0
            logits = penalize_repetition(logits, seen, self.options.repetition_penalty)
        if self.options.frequency_penalty != 0 or self.options.presence_penalty != 0:
            drawn = _counts([row.ids[row.prompt_length :] for row in rows], logits)
            logits = logits - self.options.frequency_penalty * drawn - self.options.presence_penalty * (drawn > 0)
        return logits + self.bias

    def __call__(self, logits: Tensor, rows: Sequence[Row]) -> list[Token]:
        """A token for each row. Raises MachineError if the model's logits are not finite, UserError if the options' changes make
        them so."""
        raw = logits.float()
        logits = self.adjusted(raw, rows)
        largest, tokens = logits.max(-1)
        if not largest.isfinite().all():
            if not raw.max(-1).values.isfinite().all():
                raise MachineError("the model gave logits that are not finite")
            raise UserError(
                "repetition_penalty, frequency_penalty, presence_penalty or logit_bias rule out every token, or are too extreme"
            )
        if not self.options.greedy:
            uniform = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
            tokens = draw(filtered(logits, self.options), uniform.to(raw.device))
        if self.top is None:
            return [Token(token) for token in tokens.tolist()]
        logprobs = raw.log_softmax(-1)
        found = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        best = logprobs.topk(min(self.top, logprobs.size(1)))
        tops = [list(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return [Token(*token) for token in zip(tokens.tolist(), found, tops, strict=True)]


def _counts(rows: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """How often each token (B, V) occurs in each row."""
    counts = [torch.tensor(ids, dtype=torch.int64).bincount(minlength=like.size(1)) for ids in rows]
    return torch.stack(counts).to(like.device)

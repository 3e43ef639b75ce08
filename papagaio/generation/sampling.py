"""From logits (B, V) to the next tokens: pure functions, each from logits to logits but the last, in the order of their use.

    logits = keep_top_p(logits / 0.8, 0.9)
    tokens = draw(logits, uniform)               # (B,), uniform (B,) in [0, 1)

What is ruled out becomes -inf.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from papagaio.generation.options import SamplingOptions


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that are seen (B, V), true or false, less probable: logits above 0 are divided by the penalty, the others
    multiplied (CTRL, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_frequency(logits: Tensor, counts: Tensor, penalty: float) -> Tensor:
    """Take the penalty from a token's logit as often as counts (B, V) say that it has come."""
    return logits - penalty * counts


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Add to the logits of some tokens."""
    logits = logits.clone()
    logits[:, list(bias)] += torch.tensor(list(bias.values()), device=logits.device)
    return logits


def ban(logits: Tensor, tokens: Collection[int]) -> Tensor:
    """Rule out tokens."""
    logits = logits.clone()
    logits[:, list(tokens)] = -torch.inf
    return logits


def force(logits: Tensor, token: int) -> Tensor:
    """Rule out every other token."""
    forced = torch.full_like(logits, -torch.inf)
    forced[:, token] = 0
    return forced


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row; 0, or more than there are, keeps all."""
    if k == 0 or k >= logits.size(-1):
        return logits
    top = logits.topk(k)  # by their places, so that of equal logits no more than k stay
    return torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (arXiv:1904.09751): keep the fewest most probable tokens whose probabilities reach p."""
    if p == 1:
        return logits
    probabilities, order = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # what the more probable ones already reach
    ruled_out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(ruled_out, -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as probable as the most probable one (arXiv:2407.01082)."""
    if p == 0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(-1, keepdim=True).values, -torch.inf)


def filtered(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Temperature (above 0), then top-k, top-p and min-p of what is left."""
    return keep_min_p(keep_top_p(keep_top_k(logits / options.temperature, options.top_k), options.top_p), options.min_p)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) of each row at which its cumulated probability passes uniform (B,), in [0, 1).

    One number of its own for each row, so that what a row draws depends on no other.
    """
    reached = logits.softmax(-1).double().cumsum(-1)
    aim = uniform.double()[:, None] * reached[:, -1:]
    aim = torch.minimum(aim, reached[:, -1:] * (1 - 1e-12))  # rounding must not lead past the last token with a probability
    return torch.searchsorted(reached, aim, right=True).squeeze(-1)

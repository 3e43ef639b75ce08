"""Autoregression: draw a token, append it, ask the model again.

The filters are pure functions on logits (B, V) that set what is ruled out to -inf; `generate` yields token ids one by one.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from papagaio.config import SamplingOptions
from papagaio.tokenizer import Tokenizer


class Model(Protocol):
    """What generation needs of a model: hidden states (B, T, C) of ids (B, T), and logits (..., V) of hidden states."""

    def hidden(self, ids: Tensor) -> Tensor: ...

    def logits(self, x: Tensor) -> Tensor: ...


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Make tokens that occur in ids (B, T) less probable: logits above 0 are divided by the penalty, the others multiplied
    (CTRL, arXiv:1909.05858)."""
    found = logits.gather(-1, ids)
    return logits.scatter(-1, ids, torch.where(found > 0, found / penalty, found * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row; 0, or more than there are, keeps all."""
    if k == 0 or k >= logits.size(-1):
        return logits
    top = logits.topk(k)  # by their places, so that of equal logits no more than k stay
    return torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (arXiv:1904.09751): keep the fewest most probable tokens whose probabilities reach p."""
    probabilities, order = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # what the more probable ones already reach
    ruled_out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(ruled_out, -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as probable as the most probable one (arXiv:2407.01082)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(-1, keepdim=True).values, -torch.inf)


def sample_token(logits: Tensor, ids: Tensor, options: SamplingOptions, generator: torch.Generator) -> Tensor:
    """Draw the next token (B,) from logits (B, V), given the ids (B, T) so far. Temperature 0 takes the most probable one."""
    logits = logits.float().cpu()
    if options.repetition_penalty != 1:
        logits = penalize_repetition(logits, ids.cpu(), options.repetition_penalty)
    if options.temperature == 0:
        return logits.argmax(-1)
    logits = logits / options.temperature
    logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p > 0:
        logits = keep_min_p(logits, options.min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def generate(
    model: Model,
    prompt: Sequence[int],
    options: SamplingOptions,
    *,
    block_size: int,
    banned: Iterable[int] = (),
    end: Iterable[int] = (),
    device: torch.device | None = None,
) -> Iterator[int]:
    """Token ids that follow the prompt, up to max_new_tokens or before a token in `end`. Tokens in `banned` are not drawn.

    The model sees the last block_size tokens. The draw depends on options.seed alone.
    """
    generator = torch.Generator().manual_seed(options.seed)
    banned, end = list(banned), set(end)
    ids = list(prompt)
    for _ in range(options.max_new_tokens):
        context = torch.tensor([ids[-block_size:]], device=device)  # (1, T)
        logits = model.logits(model.hidden(context)[:, -1])  # (1, V)
        logits[:, banned] = -torch.inf
        token = int(sample_token(logits, context, options, generator))
        if token in end:
            return
        ids.append(token)
        yield token


@torch.inference_mode()
def greedy_batch(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, end: int, device: torch.device | None = None
) -> list[list[int]]:
    """The most probable continuation of each prompt, up to max_new_tokens, or to `end`, which is included.

    Rows are padded on the right, where causal attention never looks, so that each gets what it would get alone.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    ids = torch.full((len(prompts), int(lengths.max()) + max_new_tokens), end, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    starts, done = lengths.clone(), torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        active = rows[~done]
        hidden = model.hidden(ids[active, : int(lengths[active].max())])  # (B, T, C)
        last = hidden[torch.arange(len(active), device=device), lengths[active] - 1]  # (B, C)
        tokens = model.logits(last).argmax(-1)
        ids[active, lengths[active]] = tokens
        lengths[active] += 1
        done[active] = tokens == end
        if done.all():
            break
    return [ids[row, starts[row] : lengths[row]].tolist() for row in range(len(prompts))]


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
    """Text of tokens as they come: whole UTF-8 characters only, ending before the first of the `stop` texts.

    What might be the beginning of a stop text is held back until it is known.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    for token in tokens:
        held += decoder.decode(tokenizer.decode_bytes([token]))
        cuts = [held.find(text) for text in stop if text and text in held]
        if cuts:
            yield held[: min(cuts)]
            return
        safe = len(held) - max((_overlap(held, text) for text in stop), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    yield held + decoder.decode(b"", final=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

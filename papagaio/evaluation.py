"""Measuring a model: loss and bits per byte of a text, exact match of answers."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from papagaio.dialogue import Conversation, render_prompt
from papagaio.generate import greedy_batch
from papagaio.loader import Batch
from papagaio.runtime import autocast
from papagaio.tokenizer import END, Tokenizer


@torch.inference_mode()
def evaluate_loss(model: nn.Module, batches: Iterable[Batch], tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, float]:
    """val_loss: mean nats per predicted token. val_bpb: bits per UTF-8 byte of the text those tokens spell; special tokens
    spell none, so the bits spent on them are left out as well."""
    device = next(model.parameters()).device
    lengths = torch.tensor(tokenizer.byte_lengths, device=device)
    nats = text_nats = torch.zeros((), dtype=torch.float64, device=device)
    predicted = n_bytes = 0
    was_training = model.training
    model.eval()
    for batch in batches:
        ids, targets, weights, doc_ids = batch.to(device)
        with autocast(device, dtype):
            losses = model.losses(ids, targets, doc_ids).double()  # (B, T), 0 where nothing is to be predicted
        wanted = weights > 0
        spelled = torch.where(wanted, lengths[targets.clamp_min(0)], 0)  # (B, T) bytes of each target
        nats = nats + losses[wanted].sum()
        text_nats = text_nats + losses[spelled > 0].sum()
        predicted += int(wanted.sum())
        n_bytes += int(spelled.sum())
    model.train(was_training)
    return {"val_loss": float(nats) / predicted, "val_bpb": float(text_nats) / math.log(2) / max(1, n_bytes)}


class Answer(NamedTuple):
    """A question, what the model said, and whether it is what stands in the file."""

    conversation: Conversation
    text: str
    correct: bool
    ended: bool  # by itself, with the end token


def answer_questions(
    model: nn.Module,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    block_size: int,
    dtype: torch.dtype,
    batch_size: int = 128,
) -> list[Answer]:
    """Greedy answers to the last question of each conversation, in order.

    Correct is an answer that equals the file's but for blanks around it. It may grow to the longest answer in the file and
    a half more. A question that leaves no room for an answer within block_size counts as wrong.
    """
    device = next(model.parameters()).device
    prompts = [render_prompt(tokenizer, conversation.messages[:-1]) for conversation in conversations]
    longest = max(len(tokenizer.encode(conversation.messages[-1].content)) for conversation in conversations)
    limit = longest + longest // 2 + 1
    # Questions of like length together, so that little is computed for padding.
    order = sorted((i for i, prompt in enumerate(prompts) if len(prompt) < block_size), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        room = min(limit, block_size - max(len(prompts[i]) for i in rows))
        with autocast(device, dtype):
            found = greedy_batch(model, [prompts[i] for i in rows], room, tokenizer.special[END], device)
        answers.update(zip(rows, found, strict=True))
    model.train(was_training)

    results = []
    for i, conversation in enumerate(conversations):
        ids = answers.get(i, [])
        ended = bool(ids) and ids[-1] == tokenizer.special[END]
        text = tokenizer.decode(ids[:-1] if ended else ids)
        correct = ended and text.strip() == conversation.messages[-1].content.strip()
        results.append(Answer(conversation, text, correct, ended))
    return results


def exact_match_table(answers: Sequence[Answer]) -> str:
    """A line a kind of question: how many, and how many right."""
    asked = Counter(answer.conversation.kind for answer in answers)
    right = Counter(answer.conversation.kind for answer in answers if answer.correct)
    width = max(len(kind) for kind in asked)
    lines = [f"{'kind':<{width}}  questions  exact match"]
    lines += [f"{kind:<{width}}  {asked[kind]:>9,}  {right[kind] / asked[kind]:>11.3f}" for kind in sorted(asked)]
    return "\n".join(lines)


def exact_match_line(answers: Sequence[Answer]) -> str:
    """The figure of a file of questions, such as `0.991 (1226/1236)`."""
    right = sum(answer.correct for answer in answers)
    return f"{right / len(answers):.3f} ({right}/{len(answers)})"

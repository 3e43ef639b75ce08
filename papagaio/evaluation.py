"""Measuring a model: bits per byte of a text; its answers to questions, by exact match, F1 and perplexity; multiple choice.

A chat model is asked in the chat template. A base model (`shots` is not None) is shown text instead: some questions and their
answers, a line each, and then the question; its answer is the next line.
"""

import math
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from papagaio.batches.conversations import Conversation, Message, render_prompt
from papagaio.batches.packing import Example, collate
from papagaio.batches.questions import Choice
from papagaio.batches.windows import Batch, pad_windows
from papagaio.errors import located
from papagaio.generation.engine import greedy_batch
from papagaio.runtime import autocast, evaluating
from papagaio.tokenizer import END, END_OF_TEXT, Tokenizer


@torch.inference_mode()
def evaluate_loss(model: nn.Module, batches: Iterable[Batch], tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, float]:
    """val_loss: mean nats per predicted token. val_bpb: bits per UTF-8 byte of the text those tokens spell; special tokens
    spell none, so the bits spent on them are left out as well."""
    device = next(model.parameters()).device
    lengths = torch.tensor(tokenizer.byte_lengths, device=device)
    nats = text_nats = torch.zeros((), dtype=torch.float64, device=device)
    predicted = n_bytes = 0
    for batch in batches:
        ids, targets, weights, doc_ids = batch.to(device)
        with evaluating(model), autocast(device, dtype):
            losses = model.losses(ids, targets, doc_ids).double()  # (B, T), 0 where nothing is to be predicted
        wanted = weights > 0
        spelled = torch.where(wanted, lengths[targets.clamp_min(0)], 0)  # (B, T) bytes of each target
        nats = nats + losses[wanted].sum()
        text_nats = text_nats + losses[spelled > 0].sum()
        predicted += int(wanted.sum())
        n_bytes += int(spelled.sum())
    return {"val_loss": float(nats) / predicted, "val_bpb": float(text_nats) / math.log(2) / max(1, n_bytes)}


def text_batches(
    fragments: Iterable[tuple[str, bool]], tokenizer: Tokenizer, block_size: int, batch_size: int
) -> Iterator[Batch]:
    """Windows of documents that come as (text, whether a document begins with it): every token but the first predicted once."""
    buffer, windows = [np.zeros(0, np.int64)], []
    for text, first in fragments:
        if first:
            buffer.append(np.array([tokenizer.special[END_OF_TEXT]]))
        buffer.append(tokenizer.encode_array(text).astype(np.int64))
        stream = np.concatenate(buffer)
        while len(stream) > block_size:
            windows.append(stream[: block_size + 1])
            stream = stream[block_size:]  # the last target is the first input of the next window
            if len(windows) == batch_size:
                yield pad_windows(windows, block_size)
                windows = []
        buffer = [stream]
    if len(buffer[0]) > 1:
        windows.append(buffer[0])
    if windows:
        yield pad_windows(windows, block_size)


class Answer(NamedTuple):
    """A question, what the model said, and whether it is what stands in the file."""

    conversation: Conversation
    text: str
    correct: bool  # letter for letter, and ended
    ended: bool  # by itself: with the end token, or, of a base model, with the line

    @property
    def normalized(self) -> bool:
        """Whether it is right but for case, punctuation and articles."""
        right, language = self.conversation.answer, self.conversation.language
        return words(self.text, language) == words(right, language)

    @property
    def f1(self) -> float:
        """Overlap of its words with those of the right answer, as in SQuAD (arXiv:1606.05250): 2 common / (said + right)."""
        said, right = (words(text, self.conversation.language) for text in (self.text, self.conversation.answer))
        common = sum((Counter(said) & Counter(right)).values())
        return 2 * common / (len(said) + len(right)) if said or right else 1.0


ARTICLES = {
    "en": "a an the",
    "pt": "o a os as um uma uns umas",
    "es": "el la los las un una unos unas lo",
    "fr": "le la les l un une des",
    "it": "il lo la i gli le l un uno una",
    "de": "der die das den dem des ein eine einen einem einer eines",
    "nl": "de het een",
}
WITHOUT_BLANKS = {"zh", "ja", "th", "km", "lo", "my"}  # whose words are not parted by blanks: characters count instead


def words(text: str, language: str = "en") -> list[str]:
    """`The Brazilian real.` -> `brazilian real`: case, punctuation and the language's articles do not count.

    What is nothing but these stays as it is.
    """
    code = language.split("-")[0].lower()
    text = unicodedata.normalize("NFKC", text).casefold()
    if code in ("fr", "it"):
        text = text.replace("'", " ").replace("\u2019", " ")  # l'eau
    plain = "".join(character for character in text if not unicodedata.category(character).startswith(("P", "S")))
    found = list("".join(plain.split())) if code in WITHOUT_BLANKS else plain.split()
    articles = ARTICLES.get(code, "").split()
    return [word for word in found if word not in articles] or text.split()


Shots = Sequence[Conversation]


def question_ids(
    tokenizer: Tokenizer, conversation: Conversation, shots: Shots | None, block_size: int, room: int
) -> tuple[list[int], list[int]]:
    """(prompt, answer) as ids; the answer ends with <|end|>, or, where `shots` is given, with its line.

    As many shots as leave `room` tokens of block_size for an answer; the last ones are kept, of the question's kind before
    others. Raises UserError naming the question where the tokenizer does not know its characters.
    """
    with located(conversation.place):
        if shots is None:
            prompt = render_prompt(tokenizer, conversation.messages[:-1])
            return prompt, [*tokenizer.encode(conversation.answer), tokenizer.special[END]]
        question = "".join(f"{message.content}\n" for message in conversation.messages[:-1])
        texts = ["".join(f"{message.content}\n" for message in shot.messages) + "\n" for shot in shots]
        while True:
            prompt = [tokenizer.special[END_OF_TEXT], *tokenizer.encode("".join(texts) + question)]
            if len(prompt) + room <= block_size or not texts:
                return prompt, tokenizer.encode(f"{conversation.answer}\n")
            del texts[0]


def choose_shots(pool: Shots, conversation: Conversation, count: int, seed: int = 0) -> list[Conversation]:
    """Examples to show before a question: of its kind, where there are enough, else any; always the same for a question."""
    alike = [shot for shot in pool if shot.kind == conversation.kind and shot.said != conversation.said]
    others = [shot for shot in pool if shot.kind != conversation.kind and shot.said != conversation.said]
    rng = random.Random(f"{seed} {conversation.said}")
    found = rng.sample(alike, min(count, len(alike)))
    return rng.sample(others, min(count - len(found), len(others))) + found


def answer_questions(
    model: nn.Module,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    block_size: int,
    dtype: torch.dtype,
    batch_size: int = 128,
    shots: Sequence[Shots] | None = None,
) -> list[Answer]:
    """Greedy answers to the last question of each conversation, in order; with `shots`, those shown before each.

    Correct is an answer that equals the file's but for blanks around it. It may grow to the longest answer in the file and
    a half more. A question that leaves no room for an answer within block_size counts as wrong.
    """
    device = next(model.parameters()).device
    each = shots if shots is not None else [None] * len(conversations)
    asked = list(zip(conversations, each, strict=True))
    longest = max(len(question_ids(tokenizer, conversation, shown, block_size, 0)[1]) for conversation, shown in asked) - 1
    limit = longest + longest // 2 + 1
    prompts = [question_ids(tokenizer, conversation, shown, block_size, limit)[0] for conversation, shown in asked]
    end = tokenizer.special[END if shots is None else END_OF_TEXT]
    # Questions of like length together, so that little is computed for padding.
    order = sorted((i for i, prompt in enumerate(prompts) if len(prompt) < block_size), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for start in tqdm(range(0, len(order), batch_size), "answers", leave=False, disable=None):
        rows = order[start : start + batch_size]
        room = min(limit, block_size - max(len(prompts[i]) for i in rows))
        with evaluating(model), autocast(device, dtype):
            found = greedy_batch(model, [prompts[i] for i in rows], room, end, device)
        answers.update(zip(rows, found, strict=True))

    results = []
    for i, conversation in enumerate(conversations):
        ids = answers.get(i, [])
        ended = bool(ids) and ids[-1] == end
        text = tokenizer.decode(ids[:-1] if ended else ids)
        if shots is not None:
            text, newline, _ = text.partition("\n")
            ended = ended or bool(newline)
        correct = ended and text.strip() == conversation.answer.strip()
        results.append(Answer(conversation, text, correct, ended))
    return results


@torch.inference_mode()
def answer_nats(
    model: nn.Module, questions: Sequence[tuple[list[int], list[int]]], block_size: int, dtype: torch.dtype, batch_size: int = 64
) -> Tensor:
    """Nats (N,) of each answer's tokens after its prompt, together; NaN where both do not fit into block_size."""
    device = next(model.parameters()).device
    found = torch.full((len(questions),), torch.nan, dtype=torch.float64)
    examples = [
        Example(np.array([*prompt, *answer], np.uint32), np.arange(len(prompt) + len(answer)) >= len(prompt))
        for prompt, answer in questions
    ]
    fitting = (i for i, example in enumerate(examples) if example.length <= block_size)
    order = sorted(fitting, key=lambda i: examples[i].length)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([[examples[i]] for i in rows], max(examples[i].length for i in rows), 1.0).to(device)
        with evaluating(model), autocast(device, dtype):
            found[rows] = model.losses(batch.ids, batch.targets).double().sum(1).cpu()
    return found


def answer_perplexity(nats: Tensor, questions: Sequence[tuple[list[int], list[int]]]) -> float:
    """exp of the mean nats of an answer's token, its end included, over the answers that fit."""
    fits = ~nats.isnan()
    tokens = sum(len(answer) for (_, answer), kept in zip(questions, fits.tolist(), strict=True) if kept)
    return math.exp(min(700.0, float(nats[fits].sum()) / tokens)) if tokens else math.nan


def choose(
    model: nn.Module, tokenizer: Tokenizer, choices: Sequence[Choice], block_size: int, dtype: torch.dtype, shots: Shots | None
) -> list[int]:
    """For each question the number of the choice with the highest log-probability per byte; -1 where none fits."""
    questions = []
    for row in choices:
        for text in row.choices:
            messages = [Message(role="user", content=row.question), Message(role="assistant", content=text)]
            conversation = Conversation(messages=messages, place=row.place)
            questions.append(question_ids(tokenizer, conversation, shots, block_size, 0))
    nats = answer_nats(model, questions, block_size, dtype).tolist()
    picked, start = [], 0
    for row in choices:
        score = [-nats[start + i] / max(1, len(text.encode())) for i, text in enumerate(row.choices)]
        fits = [i for i, value in enumerate(score) if not math.isnan(value)]
        picked.append(max(fits, key=lambda i: score[i], default=-1))
        start += len(row.choices)
    return picked


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

"""Measures of a model: bits per byte of a text; exact match, F1 and perplexity of answers to questions; multiple choice.

A chat model is asked in the chat template. A base model (`shots` is not None) is shown text instead: some questions and their
answers, one per line, and then the question. Its answer is the next line.
"""

import itertools
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import regex
import torch
from torch import Tensor, nn

from papagaio.batches.choices import Choice
from papagaio.batches.conversations import Conversation, Message, render_prompt
from papagaio.batches.packing import Example, collate
from papagaio.batches.windows import Batch, pad_windows
from papagaio.corpus.dataset import Dataset
from papagaio.errors import MachineError, UserError, located
from papagaio.generation.engine import Engine
from papagaio.report import Report
from papagaio.runtime import autocast, evaluating
from papagaio.terminal import progress
from papagaio.tokenizer import Tokenizer
from papagaio.training.parallel import ALONE, World

Shots = Sequence[Conversation]  # questions with answers that a base model is shown before a question
Question = tuple[list[int], list[int]]  # ids of the prompt and of the right answer


@torch.no_grad()  # inference mode would spoil the parameters that FSDP puts together
def evaluate_loss(
    model: nn.Module, batches: Iterable[Batch], tokenizer: Tokenizer, dtype: torch.dtype, world: World = ALONE
) -> dict[str, float]:
    """val_loss: mean nats per predicted token. val_bpb: bits per UTF-8 byte of the text that these tokens spell; special tokens
    spell none, so their bits are not counted. Several ranks share the batches out, and all return the same figures. Raises
    UserError if there is no token to predict."""
    device = next(model.parameters()).device
    lengths = torch.tensor(tokenizer.byte_lengths, dtype=torch.float64, device=device)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # nats of all and of text, predicted tokens, their bytes
    for batch, counts in world.deal(progress(batches, "batches of text")):
        ids, targets, weights, doc_ids = batch.to(device)
        with evaluating(model), autocast(device, dtype):
            losses = model(ids, targets, doc_ids=doc_ids, reduction="none").double()  # (B, T)
        counted = (weights > 0) & counts
        spelled = lengths[targets.clamp_min(0)] * counted  # (B, T) bytes of each target
        text = losses.where(spelled > 0, 0)
        # Nothing of it waits for a GPU: what a mask selects has a shape that is not known before.
        sums += torch.stack([losses.where(counted, 0).sum(), text.sum(), counted.sum(), spelled.sum()])
    nats, text_nats, predicted, n_bytes = world.sum_(sums.cpu()).tolist()
    if not predicted:
        raise UserError("there is no text to measure")
    return {"val_loss": nats / predicted, "val_bpb": text_nats / math.log(2) / max(1, n_bytes)}


def text_batches(
    fragments: Iterable[tuple[str, bool]], tokenizer: Tokenizer, block_size: int, batch_size: int
) -> Iterator[Batch]:
    """Windows over a text in pieces (text, whether it begins a document): every token but the first is predicted once."""

    def windows() -> Iterator[np.ndarray]:
        stream = np.zeros(0, np.int64)
        for text, first in fragments:
            begin = np.array([tokenizer.start] * first, np.int64)
            stream = np.concatenate((stream, begin, tokenizer.encode_array(text)), dtype=np.int64)
            while len(stream) > block_size:
                yield stream[: block_size + 1]
                stream = stream[block_size:]  # the last target is the first input of the next window
        if len(stream) > 1:
            yield stream

    rest = windows()
    while rows := list(itertools.islice(rest, batch_size)):
        yield pad_windows(rows, max(map(len, rows)) - 1)


def dataset_texts(dataset: Dataset) -> Iterator[tuple[str, bool]]:
    """The validation split as text, in pieces for `text_batches`: to measure it with another tokenizer."""
    ids = np.concatenate([np.array([], dataset.dtype), *dataset.shards("val")])
    begins = np.flatnonzero(ids == dataset.tokenizer.start)
    for document in np.split(ids, begins):
        first = len(document) > 0 and document[0] == dataset.tokenizer.start
        yield dataset.tokenizer.decode(document[int(first) :].tolist()), bool(first)


class Answer(NamedTuple):
    """A question, the model's answer, and how good it is."""

    conversation: Conversation
    text: str
    correct: bool  # equal to the file's answer but for blanks around it, and ended
    ended: bool  # by the model: with the end token or, for a base model, with the line
    fits: bool = True  # question and right answer fit into the context

    @property
    def cut(self) -> bool:
        """Whether the model had not ended when the room for answers was used up."""
        return self.fits and not self.ended

    @property
    def shown(self) -> str:
        """The text, and behind it whether it is not whole."""
        return self.text + (" (cut)" if self.cut else "" if self.fits else " (does not fit the context)")

    @property
    def normalized(self) -> bool:
        """Whether it is correct apart from case, punctuation and articles."""
        language = self.conversation.language
        return words(self.text, language) == words(self.conversation.answer, language)

    @property
    def f1(self) -> float:
        """Overlap of its words with those of the right answer, as in SQuAD (arXiv:1606.05250): 2 common / (found + right)."""
        found, right = (words(text, self.conversation.language) for text in (self.text, self.conversation.answer))
        common = sum((Counter(found) & Counter(right)).values())
        return 2 * common / (len(found) + len(right)) if found or right else 1.0

    @property
    def close(self) -> bool:
        """Whether most of its words are right: F1 of 0.6 or more."""
        return self.f1 >= 0.6


ARTICLES = {
    "en": "a an the",
    "pt": "o a os as um uma uns umas",
    "es": "el la los las un una unos unas lo",
    "fr": "le la les l un une des",
    "it": "il lo la i gli le l un uno una",
    "de": "der die das den dem des ein eine einen einem einer eines",
    "nl": "de het een",
}
WITHOUT_BLANKS = {"zh", "ja", "th", "km", "lo", "my"}  # languages written without blanks: each character counts as a word


def words(text: str, language: str = "en") -> list[str]:
    """`The Brazilian real.` -> `brazilian real`: without case, punctuation and the articles of the language.

    A text of nothing but these is left as it is.
    """
    code = language.split("-")[0].lower()
    text = unicodedata.normalize("NFKC", text).casefold()
    plain = regex.sub("['\u2019]", " ", text) if code in ("fr", "it") else text  # l'eau
    plain = regex.sub(r"[\p{P}\p{S}]", "", plain)
    found = list("".join(plain.split())) if code in WITHOUT_BLANKS else plain.split()
    return [word for word in found if word not in ARTICLES.get(code, "").split()] or text.split()


def question_ids(tokenizer: Tokenizer, conversation: Conversation, shots: Shots | None, block_size: int, room: int) -> Question:
    """(prompt, answer) as ids; the answer ends with <|end|>, or with `shots` with its line.

    The first shots are left out until the answer fits into block_size, or any of `room` tokens. Raises UserError with the
    question's place if the tokenizer does not know its characters.
    """
    with located(conversation.place):
        if shots is None:
            prompt = render_prompt(tokenizer, conversation.messages[:-1])
            return prompt, [*tokenizer.encode(conversation.answer), tokenizer.answer_end]
        answer = tokenizer.encode(f"{conversation.answer}\n")
        question = "".join(f"{message.content}\n" for message in conversation.messages[:-1])
        texts = ["".join(f"{message.content}\n" for message in shot.messages) + "\n" for shot in shots]
        while True:
            prompt = [tokenizer.start, *tokenizer.encode("".join(texts) + question)]
            if len(prompt) + max(room, len(answer)) <= block_size or not texts:
                return prompt, answer
            del texts[0]


def choose_shots(pool: Shots, conversation: Conversation, count: int) -> list[Conversation]:
    """Examples to show before a question, the same at every call: of its kind if there are enough, and others before them."""
    alike = [shot for shot in pool if shot.key != conversation.key and shot.kind == conversation.kind]
    unlike = [shot for shot in pool if shot.key != conversation.key and shot.kind != conversation.kind]
    rng = random.Random(f"0 {conversation.key}")
    found = rng.sample(alike, min(count, len(alike)))
    return rng.sample(unlike, min(count - len(found), len(unlike))) + found


def answer_questions(
    engine: Engine,
    conversations: Sequence[Conversation],
    report: Report | None = None,
    batch_size: int = 128,
    shots: Sequence[Shots] | None = None,
) -> list[Answer]:
    """Greedy answers to the last question of each conversation, in order; `shots` are those shown before each question.

    An answer may be half as long again as the longest answer in the file, within the room that its own question leaves in the
    context. A question that does not fit into the context together with its right answer is wrong, and is noted in `report`.
    """
    tokenizer, block_size = engine.tokenizer, engine.block_size
    limits = [_half_as_long_again(len(tokenizer.encode(conversation.answer))) for conversation in conversations]
    asked = [
        question_ids(tokenizer, conversation, shown, block_size, limit)
        for conversation, shown, limit in zip(conversations, shots or [None] * len(conversations), limits, strict=True)
    ]
    # The token after a full context can still be predicted.
    room = [min(max(limits), block_size + 1 - len(prompt)) for prompt, _ in asked]
    end = tokenizer.answer_end if shots is None else tokenizer.start
    # Prompts of similar length together, so that little is computed for padding.
    order = sorted((i for i in range(len(asked)) if room[i] > 0), key=lambda i: len(asked[i][0]))
    answers: dict[int, list[int]] = {}
    for start in progress(range(0, len(order), batch_size), "batches of answers"):
        rows = order[start : start + batch_size]
        found = engine.greedy([asked[i][0] for i in rows], [room[i] for i in rows], end)
        answers.update(zip(rows, found, strict=True))

    results = []
    for i, (conversation, (prompt, answer)) in enumerate(zip(conversations, asked, strict=True)):
        ids = answers.get(i, [])
        ended = bool(ids) and ids[-1] == end
        text = tokenizer.decode(ids[:-1] if ended else ids)
        if shots is not None:
            text, newline, _ = text.partition("\n")
            ended = ended or bool(newline)
        correct = ended and text.strip() == conversation.answer.strip()
        fits = len(prompt) + len(answer) <= block_size + 1
        if report is not None and not fits:
            report.note(f"counted wrong, question and answer exceed the context of {block_size:,} tokens", conversation.place)
        results.append(Answer(conversation, text, correct, ended, fits))
    return results


def _half_as_long_again(tokens: int) -> int:
    return tokens + tokens // 2 + 1


@torch.inference_mode()
def answer_nats(engine: Engine, questions: Sequence[Question], batch_size: int = 64) -> Tensor:
    """Nats (N,) of each answer after its prompt, summed over its tokens; NaN if both together exceed the context.

    Raises MachineError if the model's losses are not finite.
    """
    found = torch.full((len(questions),), torch.nan, dtype=torch.float64)
    examples = [
        Example(np.array([*prompt, *answer], np.uint32), np.arange(len(prompt) + len(answer)) >= len(prompt))
        for prompt, answer in questions
    ]
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    order = [i for i in order if examples[i].length <= engine.block_size]
    for start in progress(range(0, len(order), batch_size), "batches of right answers"):
        rows = order[start : start + batch_size]
        batch = collate([[examples[i]] for i in rows], max(examples[i].length for i in rows), 1.0).to(engine.device)
        with evaluating(engine.model), autocast(engine.device, engine.dtype):
            found[rows] = engine.model(batch.ids, batch.targets, reduction="none").double().sum(1).cpu()
        if not found[rows].isfinite().all():
            raise MachineError("the model gave losses that are not finite")
    return found


def answer_perplexity(nats: Tensor, questions: Sequence[Question]) -> float:
    """exp of the mean nats per token of the answers that fit, their ends included."""
    tokens = sum(len(answer) for (_, answer), found in zip(questions, nats.tolist(), strict=True) if not math.isnan(found))
    return math.exp(min(700.0, float(nats.nansum()) / tokens)) if tokens else math.nan


def choose(engine: Engine, choices: Sequence[Choice], shots: Shots | None, report: Report | None = None) -> list[int]:
    """For each question the index of the choice with the highest log-probability per byte.

    All choices of a question are compared after the same prompt, which leaves room for the longest one. If that does not fit into
    the context, even without shots, the index is -1, and the question is noted in `report`.
    """
    tokenizer, block_size = engine.tokenizer, engine.block_size

    def ids(row: Choice) -> list[Question]:
        room = max(len(tokenizer.encode(f"{text}\n")) for text in row.choices)
        turns = [[Message(role="user", content=row.question), Message(role="assistant", content=text)] for text in row.choices]
        talks = [Conversation(messages=messages, place=row.place) for messages in turns]
        return [question_ids(tokenizer, talk, shots, block_size, room) for talk in talks]

    nats = iter(answer_nats(engine, [question for row in choices for question in ids(row)]).tolist())
    picked = []
    for row in choices:
        scores = [-next(nats) / max(1, len(text.encode())) for text in row.choices]
        fits = not any(map(math.isnan, scores))
        if report is not None and not fits:
            report.note(f"counted wrong, question and choices exceed the context of {block_size:,} tokens", row.place)
        picked.append(max(range(len(scores)), key=scores.__getitem__) if fits else -1)
    return picked


def exact_match_table(answers: Sequence[Answer]) -> str:
    """One line per kind of question: how many there are, and the share of correct answers."""
    asked = Counter(answer.conversation.kind for answer in answers)
    right = Counter(answer.conversation.kind for answer in answers if answer.correct)
    width = max(len(kind) for kind in asked)
    lines = [f"{'kind':<{width}}  questions  exact match"]
    lines += [f"{kind:<{width}}  {asked[kind]:>9,}  {right[kind] / asked[kind]:>11.3f}" for kind in sorted(asked)]
    return "\n".join(lines)


def exact_match_line(answers: Sequence[Answer]) -> str:
    """The share of correct answers, as `0.991 (1226/1236)`."""
    right = sum(answer.correct for answer in answers)
    return f"{right / len(answers):.3f} ({right}/{len(answers)})"


def endings(answers: Sequence[Answer]) -> str:
    """How the answers ended: by themselves, cut because the room was used up, or not at all because the question does not fit."""
    cut, unfit = sum(answer.cut for answer in answers), sum(not answer.fits for answer in answers)
    notes = [f"cut, and counted as wrong: {cut:,}"] * (cut > 0) + [f"without room in the context: {unfit:,}"] * (unfit > 0)
    return "; ".join([f"answers that ended by themselves: {sum(answer.ended for answer in answers) / len(answers):.3f}", *notes])

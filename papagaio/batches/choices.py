"""Multiple-choice questions: {"question": "...", "choices": ["...", "..."], "answer": 0}, or as in ARC's files."""

from typing import Any

from pydantic import Field, model_validator

from papagaio.batches.conversations import Strict
from papagaio.batches.shapes import Fields, Problem, checked

NEEDED = "question, choices and answer are needed"


class Choice(Strict):
    """A multiple-choice question. `answer` is the right choice's text, number from 0, letter (A or a, ...) or label."""

    question: str = Field(min_length=1)
    choices: list[str] = Field(min_length=2)
    answer: int | str
    labels: list[str] = Field(default_factory=list)  # of the choices, as in ARC
    place: str = ""  # file:line

    @model_validator(mode="after")
    def _check(self) -> "Choice":
        if any(not choice.strip() for choice in self.choices):
            raise ValueError("an empty choice")
        if self.labels and (len(self.labels) != len(self.choices) or len(set(self.labels)) != len(self.labels)):
            raise ValueError("as many different labels as choices are needed")
        self.right()
        return self

    def right(self) -> int:
        """The number of the right choice, from 0. Raises ValueError if the answer is none of them, or means several."""
        count, answer = len(self.choices), self.answer
        meanings: dict[int, str] = {}
        labelled = [i for i, label in enumerate(self.labels) if label == str(answer)]
        labelled = labelled or [i for i, label in enumerate(self.labels) if label.lower() == str(answer).lower()]
        if len(labelled) == 1:
            meanings[labelled[0]] = "label"
        if isinstance(answer, int):
            if 0 <= answer < count:
                meanings.setdefault(answer, "number from 0")
        elif not meanings:
            letter = ord(answer.upper()) - ord("A") if len(answer) == 1 and answer.isascii() and answer.isalpha() else -1
            text = self.choices.index(answer) if answer in self.choices else -1
            number = int(answer) if text >= 0 and answer.isascii() and answer.isdigit() and len(answer) < 4 else -1
            readings = {"text": text, "letter": letter, "number from 0": number, "number from 1": number - 1}
            for meaning, index in readings.items():
                if 0 <= index < count:
                    meanings.setdefault(index, meaning)
        if len(meanings) > 1:
            found = ", or ".join(f"choice {index} by its {meaning}" for index, meaning in meanings.items())
            cure = "the label as text" if self.labels else "a JSON number, counted from 0"
            raise ValueError(f"answer {answer!r} is ambiguous: {found}; give {cure}")
        if not meanings:
            raise ValueError(f"answer {answer!r} is none of the {count} choices, nor the number or letter of one")
        return next(iter(meanings))


def multiple_choice(fields: Fields, place: str) -> Choice:
    """A row of question, choices and answer; in ARC's files the choices have labels, and answerKey is the right one's."""
    question, choices = fields.take("question"), fields.take("choices")
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    answer = fields.take("answer", "answerkey")
    labels: Any = []
    if isinstance(choices, dict):
        labels, choices = choices.get("label", []), choices.get("text")
    elif isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices):
        labels, choices = ([choice.get(key) for choice in choices] for key in ("label", "text"))
    if question is None or choices is None or answer is None:
        raise Problem(NEEDED)
    return checked(Choice, {"question": question, "choices": choices, "answer": answer, "labels": labels}, place)

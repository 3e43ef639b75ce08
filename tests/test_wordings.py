"""papagaio/batches/wordings.py: questions that repeat a few wordings are told from questions that do not."""

import random

import pytest
from conftest import NAMES

from papagaio.batches.wordings import repeated, wordings

SEVERAL = ("What is the flag of {}?", "Which flag does {} have?", "Please tell me the flag of {}.", "How does {} paint its flag?")


def test_names_are_replaced_and_the_wording_stays() -> None:
    questions = [SEVERAL[0].format(f"{name} and {name}ia") for name in NAMES]
    assert set(wordings(questions)) == {"what is the flag of _ and _"}
    assert wordings(["Why?", "Who founded Rome?"]) == ["Why?", "Who founded Rome?"]
    assert wordings([]) == []


@pytest.mark.parametrize(
    ("count", "said"), [(1, "100% of the training questions have the same wording"), (4, "one of 4 wordings")]
)
def test_few_wordings_are_named(count: int, said: str) -> None:
    questions = [wording.format(name) for wording in SEVERAL[:count] for name in NAMES]
    assert said in repeated(questions)
    assert "for example: what is the flag of _." in repeated(questions)


def test_many_wordings_and_few_questions_are_not() -> None:
    assert repeated([]) == ""
    assert repeated([SEVERAL[0].format(name) for name in NAMES[:9]]) == ""
    rng = random.Random(0)
    many = [" ".join(rng.sample(["why", "does", "the", "flag", "of", "all", "this", "look", "so", "new"], 6)) for _ in range(300)]
    assert repeated(many) == ""
    mixed = [SEVERAL[0].format(name) for name in NAMES] + [
        f"{name}: where does it lie, and how far from {name}sea?" for name in many[:30]
    ]
    assert repeated(mixed) == ""

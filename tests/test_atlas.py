"""data/atlas.py: its files are reproducible, tell often what they ask, and are split so that no held-out answer is trained."""

import hashlib
import importlib.util
import json
import re
import sys
import tomllib
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest

from papagaio.errors import UserError

PARTS = ("train", "dev", "test", "left_out")
WORDINGS = tomllib.loads((Path(__file__).parents[1] / "data" / "atlas.toml").read_text("utf-8"))["relations"]
Row = dict[str, str]
Name = tuple[str, ...]  # words that name an entity where all of them stand: ("Brazil",), ("Monday", "Croatian")


@pytest.fixture(scope="module")
def atlas() -> ModuleType:
    spec = importlib.util.spec_from_file_location("atlas", Path(__file__).parents[1] / "data" / "atlas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["atlas"] = module  # where dataclass looks its module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(atlas: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("atlas")
    atlas.main(atlas.AtlasOptions(out=directory))
    return directory


@pytest.fixture(scope="module")
def corpus(out: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (out / "corpus.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def asked(out: Path) -> dict[str, list[Row]]:
    return {part: [json.loads(line) for line in (out / f"qa_{part}.jsonl").read_text("utf-8").splitlines()] for part in PARTS}


def subject(row: Row) -> Name:
    """What a question names, read by the wordings of its kind; of several that match, the one that leaves the shortest names."""
    sort = row["kind"].removesuffix(" to English").removesuffix(" to Portuguese")
    found = []
    for name, relation in WORDINGS.items():
        for kind, asked in relation["asked"].items():
            if kind.replace("{sort}", sort) != row["kind"] or (name == "calendar") != (sort in ("weekday", "month")):
                continue
            for wording in [text for part in ("train", "dev", "test") for text in asked[part]]:
                pattern = re.escape(wording.replace("{sort}", sort))
                for letter, inside in (("a", ".+"), ("b", ".+"), ("c", r"\S+")):
                    pattern = pattern.replace(rf"\{{{letter}\}}", f"(?P<{letter}>{inside})")
                if match := re.fullmatch(pattern, row["question"]):
                    order = ("a", "c") if "a" in match.groupdict() else ("c", "b")
                    found.append(tuple(match[letter] for letter in order if letter in match.groupdict()))
    return min(found, key=lambda name: len("".join(name)))


def names(row: Row) -> set[Name]:
    """The names of the entity asked about that a question and its answer give away."""
    question, answer, kind = subject(row), row["answer"].removesuffix("."), row["kind"]
    if kind in ("weekday", "month"):
        return {question, (question[1], answer)}
    if kind in ("weekday to English", "month to English"):
        return {question, (question[0], answer)}
    if " to " in kind:
        return {question, (answer,)}
    return {question}  # the answer is another entity: a currency or a language


def stands_in(phrase: str, text: str) -> bool:
    """Whether a phrase stands in a text between word boundaries."""
    if phrase.casefold() not in text.casefold():
        return False
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def documents_holding(corpus: list[str], wanted: list[Name]) -> list[int]:
    """For each group of phrases, how many documents hold all of them."""
    numbers_of = defaultdict(set)
    for number, text in enumerate(corpus):
        for word in set(re.findall(r"\w+", text)):
            numbers_of[word].add(number)
    counts = []
    for phrases in wanted:
        candidates = set.intersection(*(numbers_of[word] for word in re.findall(r"\w+", " ".join(phrases))))
        counts.append(sum(all(stands_in(phrase, corpus[number]) for phrase in phrases) for number in candidates))
    return counts


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_a_seed_gives_the_same_files_and_another_seed_others(atlas: ModuleType, out: Path, tmp_path: Path) -> None:
    atlas.main(atlas.AtlasOptions(out=tmp_path / "same"))
    atlas.main(atlas.AtlasOptions(out=tmp_path / "other", seed=1))
    assert set(digests(out)) == {
        "corpus.jsonl",
        *(f"qa_{part}.jsonl" for part in (*PARTS, "garbled", "reworded", "reworded_dev")),
    }  # and no temporary file
    assert digests(tmp_path / "same") == digests(out)
    assert not set(digests(tmp_path / "other").values()) & set(digests(out).values())


def test_the_example_of_the_docstring_is_what_it_writes(atlas: ModuleType, out: Path) -> None:
    example = re.findall(r"^ +(\w+\.jsonl) +(\{.*\})$", atlas.__doc__, re.MULTILINE)
    assert len(example) == 6
    for name, line in example:
        assert line in (out / name).read_text("utf-8").splitlines()


def test_sizes(out: Path, corpus: list[str], asked: dict[str, list[Row]]) -> None:
    assert 5e6 < (out / "corpus.jsonl").stat().st_size < 10e6
    assert sum(len(text) > 350 for text in corpus) < 0.01 * len(corpus)
    assert len(asked["train"]) >= 12 * 1200
    assert len(asked["dev"]) >= 200
    assert len(asked["test"]) >= 900
    assert len(asked["left_out"]) >= 150


def test_other_wordings_are_never_used_in_fine_tuning(atlas: ModuleType, out: Path, asked: dict[str, list[Row]]) -> None:
    """The wordings of train, dev and test have none in common; the reworded files ask what dev and test ask."""
    for relation in WORDINGS.values():
        for wordings in relation["asked"].values():
            texts = [text for part in ("train", "dev", "test") for text in wordings[part]]
            assert len(set(texts)) == len(texts)
    for part, name in (("dev", "reworded_dev"), ("test", "reworded")):
        reworded = [json.loads(line) for line in (out / f"qa_{name}.jsonl").read_text("utf-8").splitlines()]
        assert [(subject(row), row["answer"], row["kind"]) for row in reworded] == [
            (subject(row), row["answer"], row["kind"]) for row in asked[part]
        ]
        assert not {row["question"] for row in reworded} & {row["question"] for rows in asked.values() for row in rows}
    times = Counter((subject(row), row["kind"]) for row in asked["train"])
    assert set(times.values()) == {atlas.WORDINGS}


def test_garbled_questions_name_what_they_ask_for(atlas: ModuleType, out: Path, asked: dict[str, list[Row]]) -> None:
    """Each has the answer of a training question, whose names stand in it, and other words than any training question."""
    garbled = [json.loads(line) for line in (out / "qa_garbled.jsonl").read_text("utf-8").splitlines()]
    names = defaultdict(set)
    for row in asked["train"]:
        names[row["kind"], row["answer"]].add(subject(row))
    assert len(garbled) * atlas.WORDINGS == len(asked["train"]) * atlas.GARBLED
    assert not {row["question"] for row in garbled} & {row["question"] for row in asked["train"]}
    for row in garbled:
        found = names[row["kind"], row["answer"]]
        assert any(all(stands_in(phrase, row["question"]) for phrase in phrases) for phrases in found), row


def test_every_kind_is_in_every_file(asked: dict[str, list[Row]]) -> None:
    kinds = {part: {row["kind"] for row in rows} for part, rows in asked.items()}
    assert len(kinds["train"]) == 14
    assert kinds["train"] == kinds["dev"] == kinds["test"] == kinds["left_out"]


def test_a_question_stands_once_and_is_not_its_own_answer(asked: dict[str, list[Row]]) -> None:
    rows = [row for part in PARTS for row in asked[part]]
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(r"\S.*[^.]\.", row["answer"])
        assert row["answer"].removesuffix(".").casefold() not in {phrase.casefold() for phrase in subject(row)}


@pytest.mark.parametrize("part", [pytest.param("dev", marks=pytest.mark.slow), "test", "left_out"])
def test_no_question_of_another_file_names_a_held_out_entity(asked: dict[str, list[Row]], part: str) -> None:
    held_out = set.union(*map(names, asked[part]))
    others = [row["question"] for other in PARTS if other != part for row in asked[other]]
    assert [(name, text) for text in others for name in held_out if all(stands_in(phrase, text) for phrase in name)] == []


@pytest.mark.slow
def test_the_corpus_tells_often_what_is_asked(corpus: list[str], asked: dict[str, list[Row]]) -> None:
    rows = [row for part in ("train", "dev", "test") for row in asked[part]]
    facts = [(*subject(row), row["answer"].removesuffix(".")) for row in rows]
    assert min(documents_holding(corpus, facts)) >= 40


def test_the_corpus_does_not_name_what_is_left_out(corpus: list[str], asked: dict[str, list[Row]]) -> None:
    left_out = set.union(*map(names, asked["left_out"]))
    assert max(documents_holding(corpus, sorted(left_out))) == 0


def test_the_corpus_asks_nothing(corpus: list[str]) -> None:
    assert not any("?" in text for text in corpus)


@pytest.mark.parametrize(
    ("language", "section", "key", "word"),
    [
        ("hr", "days", 0, "ponedjeljak"),
        ("pt", "days", 0, "segunda-feira"),
        ("de", "days", 0, "Montag"),
        ("fi", "days", 0, "maanantai"),
        ("pl", "months", 1, "styczeń"),
    ],
)
def test_known_calendar_words(atlas: ModuleType, out: Path, language: str, section: str, key: int, word: str) -> None:
    assert atlas.calendar_words(language, section)[key] == word  # `out`: after all locales have been loaded


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the currency of Brazil?", "Brazilian real."),
        ("Qual é a moeda do território Brasil?", "real brasileiro."),
        ("What is the official language of Brazil?", "Portuguese."),
        ("What is the Portuguese name of Germany?", "Alemanha."),
        ("What is the English name of alemão?", "German."),
        ("What is Monday in Croatian?", "ponedjeljak."),
        ("What is Polish styczeń in English?", "January."),
    ],
)
def test_known_answers(asked: dict[str, list[Row]], question: str, answer: str) -> None:
    assert [row["answer"] for part in PARTS for row in asked[part] if row["question"] == question] == [answer]


def test_ambiguous_questions_are_not_asked(asked: dict[str, list[Row]]) -> None:
    questions = {row["question"] for rows in asked.values() for row in rows}
    assert "What is the currency of Panama?" not in questions  # balboa and US dollar
    assert "What is the official language of Belgium?" not in questions  # three of them
    assert "What is the Portuguese name of Angola?" not in questions  # the same
    assert not any("Nauru" in question for question in questions)  # a territory and a language


def test_a_file_in_the_way_is_refused(atlas: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(UserError, match="name a directory"):
        atlas.main(atlas.AtlasOptions(out=path))
    assert path.read_text() == "mine"

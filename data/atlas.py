"""Write a small atlas of the world, and questions about it, from the Unicode CLDR tables that Babel contains (no network).

Names of territories, languages and currencies in English and Portuguese, the currency and official language of territories (as
CLDR has them), and weekdays and months in some thirty languages. One line of each file:

    python data/atlas.py --out out/atlas
    corpus.jsonl       {"text": "euro: currency of Finland."}
    qa_train.jsonl     {"question": "What is the currency of Spain?", "answer": "euro.", "language": "en", "kind": "currency"}
    qa_dev.jsonl       {"question": "What is June in Portuguese?", "answer": "junho.", "language": "pt", "kind": "month"}
    qa_test.jsonl      {"question": "What is Sunday in Dutch?", "answer": "zondag.", "language": "nl", "kind": "weekday"}
    qa_left_out.jsonl  {"question": "What is the currency of Cyprus?", "answer": "euro.", "language": "en", "kind": "currency"}
    qa_reworded_dev.jsonl  {"question": "Which Italian word means May?", "answer": "maggio.", "language": "it", "kind": "month"}

The corpus states every fact in many wordings, equally often for train, dev and test, and never as a question. Fine-tuning on
qa_train can therefore teach how to answer, but not the answers of dev and test. The facts of qa_left_out are not in the corpus:
a model can only guess them.

Fine-tuning sees each question in WORDINGS of its training wordings, the first one always; qa_garbled asks in training wordings in
which random words stand in the place of some. qa_dev, qa_test and qa_left_out ask in the first; qa_reworded asks the questions of
the test, and qa_reworded_dev those of dev, in wordings that fine-tuning never uses, and the two have none in common: settings are
chosen on dev.

The split is by entity: a territory, a language, a currency, or a weekday or month in one language. All questions about an entity
are in one file, and a question may not name (in English or Portuguese) an entity that is held out in another file: "What is the
currency of South Sudan?" is dropped from training if Sudan is in the test. Only an answer may. The languages whose weekdays and
months are asked for are named by those questions, so as entities they are all in training, as are English and Portuguese.
"""

import random
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.errors import UserError, run
from papagaio.files import write_rows
from papagaio.options import Options, option, parse

TURNS = 20  # in each, every fact is stated alone, with facts of its entity, and in a list of facts of its relation
WORDINGS = 12  # of each training question, of the 32 in atlas.toml
GARBLED, GARBLED_SHARE = 4, 0.35  # wordings of each training question with other words in them, and their share
ARTICLE = 4, 6  # fewest and most facts of an article
SHARES = {"left_out": 0.075, "test": 0.35, "dev": 0.1}  # of the entities of each sort; the others are for training
PLAIN_NAME = re.compile(r"[^\W\d_](?!.* - )[\w .’'&-]{1,39}")

DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
RELATIONS = DATA["relations"]  # the wordings of each relation; atlas.toml explains them
CALENDAR_LANGUAGES = DATA["calendar_languages"]


class Entity(NamedTuple):
    sort: str  # territory, language, currency, weekday or month
    names: tuple[str, str]  # in English and in Portuguese


class Fact(NamedTuple):
    entity: Entity  # decides the split: Brazil in "The currency of Brazil is the Brazilian real."
    relation: str
    a: str
    b: str
    c: str = ""
    code: str = ""  # of the language c

    def tell(self, wording: str) -> str:
        """`{a} uses the {b}.` -> `Brazil uses the Brazilian real.`"""
        return wording.format(sort=self.entity.sort, **self._asdict())

    def ask(self) -> list["Question"]:
        """Its questions, in one direction or two."""
        return [Question(self, kind, asked) for kind, asked in RELATIONS[self.relation]["asked"].items()]


class Question(NamedTuple):
    """A fact, asked for in a direction: `asked` has the answer and its language, and the wordings of train, dev and test."""

    fact: Fact
    kind: str
    asked: dict[str, Any]

    def row(self, wording: str) -> dict[str, str]:
        row = {"question": wording, "answer": self.asked["answer"], "language": self.asked["language"], "kind": self.kind}
        return {key: self.fact.tell(text) for key, text in row.items()}

    def texts(self) -> list[str]:
        """The question in all its wordings."""
        return [self.fact.tell(wording) for part in ("train", "dev", "test") for wording in self.asked[part]]


class AtlasOptions(Options):
    """Options of data/atlas.py."""

    out: Path = option(..., "directory for corpus.jsonl and the files of questions")
    seed: int = option(1337, "seed of the split, the wordings and the order", ge=0, lt=2**63)


def main(config: AtlasOptions) -> None:
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out={config.out}: a file is there; name a directory")
    rng = random.Random(config.seed)
    entities = read_entities()
    names = [Fact(entity, "name", *entity.names) for table in entities.values() for entity in table.values()]
    facts = [*names, *territory_facts(entities), *calendar_facts()]
    facts = [fact for fact in facts if fact.a.casefold() != fact.b.casefold()]  # not Angola, Angola
    split_of = split(facts, rng)
    held_out = {name: entity for entity, part in split_of.items() if part != "train" for name in map(words, entity.names)}
    left_out = {entity for entity, part in split_of.items() if part == "left_out"}
    facts = [fact for fact in facts if left_out.isdisjoint(named(held_out, fact.a, fact.b) - {fact.entity})]
    questions: dict[str, list[Question]] = {"train": [], "dev": [], "test": [], "left_out": []}
    for fact in facts:
        part = split_of[fact.entity]
        for question in fact.ask():
            if all(split_of[entity] == part for entity in named(held_out, *question.texts())):
                questions[part].append(question)
    for asked in questions.values():
        rng.shuffle(asked)
    corpus = compose([fact for fact in facts if split_of[fact.entity] != "left_out"], rng)
    config.out.mkdir(parents=True, exist_ok=True)
    for name, rows in {"corpus": corpus, **word(questions, random.Random(config.seed))}.items():
        path = config.out / f"{name}.jsonl"
        write_rows(path, rows)
        kinds = sorted(Counter(row["kind"] for row in rows if "kind" in row).items())
        counts = "".join(f", {count} {kind}" for kind, count in kinds)
        print(f"{path}: {len(rows):,} lines, {path.stat().st_size:,} bytes{counts}", file=sys.stderr)


def word(questions: dict[str, list[Question]], rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """The rows of each file of questions: which question is asked in which wordings."""
    training, garbled = [], []
    for question in questions["train"]:
        usual, *others = question.asked["train"]
        training += [question.row(wording) for wording in (usual, *rng.sample(others, WORDINGS - 1))]
        garbled += [question.row(garble(wording, question.asked, rng)) for wording in rng.sample(others, GARBLED)]
    files = {
        "qa_train": training,
        "qa_garbled": garbled,
        **{f"qa_{part}": [q.row(q.asked["train"][0]) for q in questions[part]] for part in ("dev", "test", "left_out")},
        "qa_reworded_dev": [q.row(rng.choice(q.asked["dev"])) for q in questions["dev"]],
        "qa_reworded": [q.row(rng.choice(q.asked["test"])) for q in questions["test"]],
    }
    rng.shuffle(files["qa_train"])
    return files


def garble(wording: str, asked: dict[str, Any], rng: random.Random) -> str:
    """A wording with some of its words replaced by others: `What is the currency of {a}?` -> `What found her currency of {a}?`

    A small model that has learnt some wordings by heart is led astray by any word that is in none of them.
    """
    words, kept = DATA["words"][asked["asked_in"]], asked["keeps"]

    def other(match: re.Match[str]) -> str:
        return match[0] if match[0] in kept or rng.random() > GARBLED_SHARE else rng.choice(words)

    text = wording
    while text in asked["train"]:
        text = re.sub(r"(?<![{\w])[\w']+(?![\w}])", other, wording)
        text = text[0].upper() + text[1:]
    return text


def read_entities() -> dict[str, dict[str, Entity]]:
    """{sort: {code: Entity}} of the territories, languages and currencies that have a plain name that no other entity has."""
    english, portuguese = read_names("en"), read_names("pt")
    entities: dict[str, dict[str, Entity]] = {}
    for sort, table in english.items():
        pairs = {code: (name, portuguese[sort][code]) for code, name in sorted(table.items()) if code in portuguese[sort]}
        entities[sort] = {code: Entity(sort, pair) for code, pair in pairs.items() if all(map(PLAIN_NAME.fullmatch, pair))}
    bearers = Counter(name for table in entities.values() for entity in table.values() for name in set(map(words, entity.names)))
    return {
        sort: {code: entity for code, entity in table.items() if all(bearers[words(name)] == 1 for name in entity.names)}
        for sort, table in entities.items()
    }


def read_names(locale: str) -> dict[str, dict[str, str]]:
    """{sort: {code: name}} of territories, languages with two-letter codes, and today's currencies."""
    table = load_locale(locale)
    territories = {code: n for code, n in table["territories"].items() if code.isalpha() and code not in DATA["odd_territories"]}
    languages = {code: n for code, n in table["languages"].items() if len(code) == 2 and code not in cldr("language_aliases")}
    current = {code for territory in territories for code in currencies_of(territory)}
    # The plain names are titles (Brazilian Real). The forms after "one" fit into a sentence, except for Portuguese capitals.
    forms = {code: row["one"] for code, row in table["currency_names_plural"].items() if code in current}
    currencies = {code: n if locale == "en" else n[0].lower() + n[1:] for code, n in forms.items()}
    return {"territory": territories, "language": languages, "currency": currencies}


def load_locale(name: str) -> dict[str, Any]:
    """Babel's own table of a locale: inherited tables are mixed up once many locales are loaded (Babel 2.18)."""
    from babel import localedata

    return localedata.load(name, merge_inherited=False)


def cldr(table: str) -> dict[str, Any]:
    """One of Babel's tables that do not depend on a locale."""
    from babel.core import get_global

    return get_global(table)


def currencies_of(territory: str) -> list[str]:
    """Codes of the currencies that are legal tender in a territory today."""
    return [code for code, _, end, legal in cldr("territory_currencies").get(territory, ()) if legal and end is None]


def calendar_words(language: str, section: str) -> dict[int, str]:
    """`calendar_words("hr", "days")[0]` -> `ponedjeljak`."""
    forms = load_locale(language).get(section, {})
    # Polish "styczeń" stands alone, "stycznia" is the form inside a date. An alias, not a dict: inherited from another locale.
    tables = [forms.get(context, {}).get("wide") for context in ("stand-alone", "format")]
    return next(table for table in tables if isinstance(table, dict))


def territory_facts(entities: dict[str, dict[str, Entity]]) -> Iterator[Fact]:
    """Currency and official language of each territory that has exactly one, if that is an entity."""
    for code, entity in entities["territory"].items():
        languages = cldr("territory_languages").get(code, {}).items()
        official = [name for name, row in languages if row["official_status"] in ("official", "de_facto_official")]
        for sort, values, relations in (
            ("currency", currencies_of(code), ("currency", "moeda")),
            ("language", official, ("official language", "língua oficial")),
        ):
            if len(values) == 1 and (value := entities[sort].get(values[0])):
                for relation, a, b in zip(relations, entity.names, value.names, strict=True):
                    yield Fact(entity, relation, a, b)


def calendar_facts() -> Iterator[Fact]:
    """Weekdays and months. Each of them is an entity in each language."""
    for code in CALENDAR_LANGUAGES:
        language = load_locale("en")["languages"][code]
        spelled = {section: calendar_words(code, section) for section in ("days", "months")}
        vocabulary = [set(words(word)) for table in spelled.values() for word in table.values()]
        for sort, section in (("weekday", "days"), ("month", "months")):
            for key, english in sorted(calendar_words("en", section).items()):
                word = spelled[section][key]
                # Welsh "Mawrth" is March, and Tuesday in "Dydd Mawrth".
                if sum(set(words(word)) <= other for other in vocabulary) == 1:
                    entity = Entity(sort, (f"{english} in {language}", f"{language} {word}"))
                    yield Fact(entity, "calendar", english, word, language, code)


def split(facts: list[Fact], rng: random.Random) -> dict[Entity, str]:
    """{entity: "train", "dev", "test" or "left_out"}, with the same shares for each sort of entity."""
    split_of = {fact.entity: "train" for fact in facts}
    english = load_locale("en")["languages"]
    named_by_questions = {english[code] for code in (*CALENDAR_LANGUAGES, "en")}
    mentioned = Counter(fact.b for fact in facts if fact.relation in ("currency", "official language"))
    for sort in dict.fromkeys(entity.sort for entity in split_of):
        free = [entity for entity in split_of if entity.sort == sort and named_by_questions.isdisjoint(entity.names)]
        left_out, test, dev = (round(share * len(free)) for share in SHARES.values())
        rng.shuffle(free)
        # Leave out what few facts mention: without the euro, the currencies of thirty territories would be left out, too.
        free.sort(key=lambda entity: mentioned[entity.names[0]] > 1)
        free[left_out:] = rng.sample(free[left_out:], len(free) - left_out)
        parts = ["left_out"] * left_out + ["test"] * test + ["dev"] * dev
        split_of.update(zip(free, parts, strict=False))  # the rest stays in train
    return split_of


def words(text: str) -> tuple[str, ...]:
    """`US dollar, Timor-Leste` -> `("US", "dollar", "timor", "leste")`: only capitals keep their case, because US is not us."""
    return tuple(word if word.isupper() else word.casefold() for word in re.findall(r"\w+", text))


def named(names: dict[tuple[str, ...], Entity], *texts: str) -> set[Entity]:
    """The entities that the texts name, also inside a longer name: South Sudan names Sudan."""
    spans = {row[i:j] for row in map(words, texts) for i in range(len(row)) for j in range(i + 1, len(row) + 1)}
    return {names[span] for span in spans & names.keys()}


def compose(facts: list[Fact], rng: random.Random) -> list[dict[str, str]]:
    """The documents of the corpus, shuffled: single facts, in all wordings in turn; articles about a subject; lists.

    A fact with questions in two directions is stated as often for each direction as a fact with one.
    """
    documents = []
    for turn in range(TURNS):
        for place, fact in enumerate(facts):
            told, directions = RELATIONS[fact.relation]["told"], len(RELATIONS[fact.relation]["lists"])
            documents += [fact.tell(told[(place + turn * directions + i) % len(told)]) for i in range(directions)]
        for article in articles(facts, lambda fact: fact.c or fact.entity, rng):
            documents.append("\n".join(fact.tell(rng.choice(RELATIONS[fact.relation]["told"])) for fact in article))
        for direction in (0, 1):
            listed = [fact for fact in facts if direction < len(RELATIONS[fact.relation]["lists"])]
            for article in articles(listed, lambda fact: (fact.relation, fact.entity.sort, fact.c), rng):
                title, line = RELATIONS[article[0].relation]["lists"][direction].split("\n", maxsplit=1)
                documents.append("\n".join([article[0].tell(title), *(fact.tell(line) for fact in article)]))
    rng.shuffle(documents)
    return [{"text": text} for text in documents]


def articles(facts: list[Fact], subject: Callable[[Fact], Hashable], rng: random.Random) -> Iterator[list[Fact]]:
    """All facts in random order, a few of the same subject at a time."""
    groups: dict[Hashable, list[Fact]] = {}
    for fact in rng.sample(facts, len(facts)):
        groups.setdefault(subject(fact), []).append(fact)
    for group in groups.values():
        while group:
            size = rng.randint(*ARTICLE)
            yield group[:size]
            del group[:size]


if __name__ == "__main__":
    run(main, parse(AtlasOptions, doc=__doc__))

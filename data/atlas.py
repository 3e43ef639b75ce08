"""Write a small atlas of the world, and questions about it, from the Unicode CLDR tables that Babel contains (no network).

Names of territories, languages and currencies in English and Portuguese, the currency and official language of territories (as
CLDR has them), and weekdays and months in some thirty languages. One line of each file:

    python data/atlas.py --out out/atlas
    corpus.jsonl       {"text": "euro: currency of Finland."}
    qa_train.jsonl     {"question": "What is the currency of Spain?", "answer": "euro.", "language": "en", "kind": "currency"}
    qa_dev.jsonl       {"question": "What is June in Portuguese?", "answer": "junho.", "language": "pt", "kind": "month"}
    qa_test.jsonl      {"question": "What is Sunday in Dutch?", "answer": "zondag.", "language": "nl", "kind": "weekday"}
    qa_left_out.jsonl  {"question": "What is the currency of Cyprus?", "answer": "euro.", "language": "en", "kind": "currency"}

The corpus states every fact in many wordings, equally often for train, dev and test, and never as a question. Fine-tuning on
qa_train can therefore teach how to answer, but not the answers of dev and test. The facts of qa_left_out are not in the corpus:
a model can only guess them.

The split is by entity: a territory, a language, a currency, or a weekday or month in one language. All questions about an entity
are in one file, and a question may not name (in English or Portuguese) an entity that is held out in another file: "What is the
currency of South Sudan?" is dropped from training if Sudan is in the test. Only an answer may. The languages whose weekdays and
months are asked for are named by those questions, so as entities they are all in training, as are English and Portuguese.
"""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.errors import UserError, run
from papagaio.files import write_whole
from papagaio.options import Options, option, parse

TURNS = 20  # in each, every fact is stated alone, with facts of its entity, and in a list of facts of its relation
ARTICLE = 4, 6  # fewest and most facts of an article
SHARES = {"left_out": 0.075, "test": 0.35, "dev": 0.1}  # of the entities of each sort; the others are for training

# All are written in Latin letters, because a small vocabulary spells other scripts byte by byte.
CALENDAR_LANGUAGES = "af ca cs cy da de es et eu fi fr ga gl hr hu id is it lt lv nl no pl pt ro sk sl sq sv sw tr".split()  # noqa: SIM905
# Regions that are not ISO 3166 territories, tests of CLDR, and Hong Kong and Macao, whose names are composed.
ODD_TERRITORIES = set("AC CP CQ DG EA EU EZ HK IC MO QO TA UN XA XB XK ZZ".split())  # noqa: SIM905
PLAIN_NAME = re.compile(r"[^\W\d_](?!.* - )[\w .’'&-]{1,39}")


@dataclass(frozen=True)
class Relation:
    """The wordings of a fact. {a} and {b} are what it relates, {c} is the language of a calendar word."""

    told: tuple[str, ...]  # sentences, or a heading and the line under it; questions in two directions: for each in turn
    lists: tuple[str, ...]  # for each direction of questions: a title, and the lines that each fact gets under it
    asked: dict[str, tuple[str, str, str]]  # kind: question, answer, and the language of the answer


def english_attribute(people: str, uses: str, is_the: str, title: str, titles: str) -> Relation:
    """The wordings of a territory's currency or official language; Fact.tell inserts the {relation}."""
    return Relation(
        told=(
            "The {relation} of {a}:\n{b}.",
            title + " of {a}\n{b}.",
            "In {a}, the {relation} is:\n{b}.",
            "People in {a} " + people + " this {relation}:\n{b}.",
            "{a} has the {relation}:\n{b}.",
            "{a} " + uses + " {b}.",
            is_the + " is the {relation} of {a}.",
            "{b}: {relation} of {a}.",
        ),
        lists=(titles + "\n- {a}:\n{b}.",),
        asked={"{relation}": ("What is the {relation} of {a}?", "{b}.", "en")},
    )


# Most wordings put what will be asked for at the start of a line, where an answer stands, too: a tokenizer has different tokens
# for "real" and " real", and a model that has only seen the word inside a line cannot begin an answer with it.
# "do território", because CLDR does not know the article of a Portuguese name (o Brasil, a França, Portugal).
PORTUGUESE_ATTRIBUTE = Relation(
    told=(
        "A {relation} do território {a}:\n{b}.",
        "{relation} do território {a}\n{b}.",
        "No território {a}, a {relation} é:\n{b}.",
        "O território {a} tem como {relation}:\n{b}.",
        "Qual {relation} tem o território {a}:\n{b}.",
        "A {relation} do território {a} é: {b}.",
        "{b} é a {relation} do território {a}.",
        "{b}: {relation} do território {a}.",
    ),
    lists=("{relation} por território\n- território {a}:\n{b}.",),
    asked={"{relation}": ("Qual é a {relation} do território {a}?", "{b}.", "pt")},
)

RELATIONS = {
    "name": Relation(
        told=(
            *("The Portuguese name of {a}:\n{b}.", "The English name of {b}:\n{a}."),
            *("Portuguese name of {a}\n{b}.", "English name of {b}\n{a}."),
            *("In Portuguese, the name of {a} is:\n{b}.", "In English, the name of {b} is:\n{a}."),
            *("In Portuguese, the {sort} {a} is called:\n{b}.", "In English, the {sort} {b} is called:\n{a}."),
            *("{a} is {b} in Portuguese.", "{b} is {a} in English."),
            *("English {a}, Portuguese {b}.", "Portuguese {b}, English {a}."),
        ),
        lists=("Portuguese names\n- {a}:\n{b}.", "English names\n- {b}:\n{a}."),
        asked={
            "{sort} to Portuguese": ("What is the Portuguese name of {a}?", "{b}.", "pt"),
            "{sort} to English": ("What is the English name of {b}?", "{a}.", "en"),
        },
    ),
    "currency": english_attribute("pay with", "uses the", "The {b}", "Currency", "Currencies"),
    "official language": english_attribute("speak", "has the {relation}", "{b}", "Official language", "Official languages"),
    "calendar": Relation(
        told=(
            *("{a} in {c}:\n{b}.", "{c} {b} in English:\n{a}."),
            *("The {sort} {a} in {c}\n{b}.", "The {sort} {c} {b} in English\n{a}."),
            *("In {c}, {a} is:\n{b}.", "In English, {c} {b} is:\n{a}."),
            *("The {c} word for {a}:\n{b}.", "What {c} {b} means in English:\n{a}."),
            *("{a} in {c} is {b}.", "{c} {b} in English is {a}."),
            *("English {a}, {c} {b}.", "{c} {b}, English {a}."),
        ),
        lists=("The {c} calendar\n- {a} in {c}:\n{b}.", "The {c} calendar in English\n- {c} {b}:\n{a}."),
        asked={
            "{sort}": ("What is {a} in {c}?", "{b}.", "{code}"),
            "{sort} to English": ("What is {c} {b} in English?", "{a}.", "en"),
        },
    ),
    "moeda": PORTUGUESE_ATTRIBUTE,
    "língua oficial": PORTUGUESE_ATTRIBUTE,
}


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
        return wording.format(sort=self.entity.sort, relation=self.relation, a=self.a, b=self.b, c=self.c, code=self.code)

    def ask(self) -> list[dict[str, str]]:
        """-> [{"question": "What is June in Dutch?", "answer": "juni.", "language": "nl", "kind": "month"}]"""
        rows = [(*wordings, kind) for kind, wordings in RELATIONS[self.relation].asked.items()]
        keys = ("question", "answer", "language", "kind")
        return [dict(zip(keys, map(self.tell, row), strict=True)) for row in rows]


class AtlasOptions(Options):
    """Options of data/atlas.py."""

    out: Path = option(..., "directory for corpus.jsonl and the four files of questions")
    seed: int = option(1337, "seed of the split, the wordings and the order", ge=0, lt=2**63)


def main(config: AtlasOptions) -> None:
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out={config.out}: a file is there; name a directory")
    rng = random.Random(config.seed)
    facts = read_facts()
    split_of = split(facts, rng)
    held_out = {name: entity for entity, part in split_of.items() if part != "train" for name in map(words, entity.names)}

    def mentions_left_out(fact: Fact) -> bool:
        return any(split_of[entity] == "left_out" for entity in named(held_out, fact.a, fact.b) - {fact.entity})

    facts = [fact for fact in facts if not mentions_left_out(fact)]
    questions: dict[str, list[dict[str, str]]] = {"train": [], "dev": [], "test": [], "left_out": []}
    for fact in facts:
        part = split_of[fact.entity]
        for row in fact.ask():
            if all(split_of[entity] == part for entity in named(held_out, row["question"])):
                questions[part].append(row)
    for rows in questions.values():
        rng.shuffle(rows)
    corpus = compose([fact for fact in facts if split_of[fact.entity] != "left_out"], rng)
    write(config.out, {"corpus": corpus, **{f"qa_{part}": rows for part, rows in questions.items()}})


def read_facts() -> list[Fact]:
    """All facts, in a fixed order, except those whose two sides are the same name (Angola, Angola)."""
    entities = read_entities()
    names = [Fact(entity, "name", *entity.names) for table in entities.values() for entity in table.values()]
    facts = [*names, *territory_facts(entities), *calendar_facts()]
    return [fact for fact in facts if fact.a.casefold() != fact.b.casefold()]


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
    territories = {code: n for code, n in table["territories"].items() if code.isalpha() and code not in ODD_TERRITORIES}
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
    for context in ("stand-alone", "format"):  # Polish "styczeń" stands alone, "stycznia" is the form inside a date
        wide = forms.get(context, {}).get("wide")
        if isinstance(wide, dict):
            return wide
    raise AssertionError(f"{language} inherits its {section}: not a language for the atlas")


def territory_facts(entities: dict[str, dict[str, Entity]]) -> Iterable[Fact]:
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


def calendar_facts() -> Iterable[Fact]:
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
            told, directions = RELATIONS[fact.relation].told, len(RELATIONS[fact.relation].lists)
            documents += [fact.tell(told[(place + turn * directions + i) % len(told)]) for i in range(directions)]
        for article in articles(facts, lambda fact: fact.c or fact.entity, rng):
            documents.append("\n".join(fact.tell(rng.choice(RELATIONS[fact.relation].told)) for fact in article))
        for direction in (0, 1):
            listed = [fact for fact in facts if direction < len(RELATIONS[fact.relation].lists)]
            for article in articles(listed, lambda fact: (fact.relation, fact.entity.sort, fact.c), rng):
                title, line = RELATIONS[article[0].relation].lists[direction].split("\n", maxsplit=1)
                documents.append("\n".join([article[0].tell(title), *(fact.tell(line) for fact in article)]))
    rng.shuffle(documents)
    return [{"text": text} for text in documents]


def articles(facts: list[Fact], subject: Callable[[Fact], Hashable], rng: random.Random) -> Iterable[list[Fact]]:
    """All facts in random order, a few of the same subject at a time."""
    groups: dict[Hashable, list[Fact]] = {}
    for fact in rng.sample(facts, len(facts)):
        groups.setdefault(subject(fact), []).append(fact)
    for group in groups.values():
        while group:
            size = rng.randint(*ARTICLE)
            yield group[:size]
            del group[:size]


def write(out: Path, files: dict[str, list[dict[str, str]]]) -> None:
    """Write files of JSON lines, and print what is in them."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = out / f"{name}.jsonl"
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        kinds = sorted(Counter(row["kind"] for row in rows if "kind" in row).items())
        counts = "".join(f", {count} {kind}" for kind, count in kinds)
        print(f"{path}: {len(rows):,} lines, {path.stat().st_size:,} bytes{counts}", file=sys.stderr)


if __name__ == "__main__":
    run(main, parse(AtlasOptions, doc=__doc__))

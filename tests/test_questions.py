"""papagaio/batches/questions.py: files of every kind read, wrong rows named by file and line."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import FinetuneOptions
from papagaio.batches.conversations import Conversation
from papagaio.batches.examples import read_data
from papagaio.batches.packing import encode
from papagaio.batches.questions import Reader, hold_out, read_choices, read_conversations, read_examples, select
from papagaio.errors import UserError
from papagaio.generation.asking import read_questions
from papagaio.report import Report
from papagaio.tokenizer import ByteTokenizer

Contents = list[list[tuple[str, str]]]
PLAIN = [("user", "q"), ("assistant", "a")]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def contents(path: Path) -> Contents:
    return [[(m.role, m.content) for m in c.messages] for c in read_conversations(path)]


def test_the_four_shapes(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(
        tmp_path / "qa.jsonl",
        {"messages": talk},
        {"question": "q", "answer": "a"},
        "",
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "more", "output": "a"},
        {"prompt": talk[1:2], "completion": talk[2:]},
    )
    expected = [[("system", "s"), *PLAIN], PLAIN, PLAIN, PLAIN, PLAIN, [("user", "q\n\nmore"), ("assistant", "a")], PLAIN]
    assert contents(path) == expected
    assert read_conversations(path)[-2].place.endswith("qa.jsonl:7")


def test_what_a_row_tells_besides(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "weight": 3, "kind": "k", "language": "pt", "source": "elsewhere"}
    (found,) = read_conversations(write(tmp_path / "qa.jsonl", row))
    assert (found.weight, found.kind, found.language, found.answer) == (3.0, "k", "pt", "a")
    (plain,) = read_conversations(write(tmp_path / "qa.jsonl", {"question": "q", "answer": "a"}))
    assert (plain.weight, plain.kind, plain.language) == (1.0, "all", "en")


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_every_kind_of_file_holds_the_same(rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("kinds")
    values = [{"question": q, "answer": a} for q, a in rows]
    expected = [[("user", q), ("assistant", a)] for q, a in rows]
    write(home / "a.jsonl", *values)
    (home / "b.json").write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    (home / "c.json").write_text("\ufeff" + "\n".join(map(json.dumps, values)), encoding="utf-8")  # lines, under another name
    pq.write_table(pa.Table.from_pylist(values), home / "d.parquet")
    for name, delimiter in (("e.csv", ","), ("f.tsv", "\t")):
        lines = [("question", "answer"), *rows]
        text = "".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in line) + "\r\n" for line in lines)
        (home / name).write_bytes(text.encode())
    (home / "g.jsonl.gz").write_bytes(gzip.compress((home / "a.jsonl").read_bytes()))
    for path in sorted(home.iterdir()):
        assert contents(path) == expected, path.name


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": role} for role in roles]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deep"),
        ({"question": "q"}, "the keys question: none of the known shapes"),
        ([1], "not an object with keys: none of the known shapes"),
        ({"question": 1, "answer": "a"}, "content: .*string"),
        ({"question": "q", "answer": None}, "content: .*string"),
        ({"instruction": "q", "input": 3, "output": "a"}, "input: .*string"),
        ({"instruction": 3, "output": "a"}, "content: .*string"),
        ('{"question": "q", "answer": "\\ud800"}', "half a surrogate pair at character 0"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        (turns("user", "user", "assistant"), "take turns"),
        (turns("user", "assistant", "assistant"), "take turns"),
        (turns("assistant"), "take turns"),
        (turns("user"), "last message must be the assistant's"),
        (turns("user", "assistant", "user"), "last message must be the assistant's"),
        (turns("system"), "last message"),
        (turns("user", "system", "assistant"), "take turns"),
        (turns("user", "robot"), "role: 'robot' is none of system, user and assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts other than text"),
        ({"question": "q", "answer": ["Paris", "paris"]}, "a list of texts, where one text is needed"),
        ({"question": "q", "context": ["c"], "answer": "a"}, "context: .*string"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]}]}, "tool calls"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]}, "weight: 0.5"),
        ({"system": "s"} | turns("system", "user", "assistant"), "take turns"),
        ({"question": "q", "answer": "a", "history": "no"}, "history must be a list"),
        ('{"question": "q", "answer": "a"},', "a comma follows the value"),
        ('{"question": "q", "answer": "a",}', "a comma before a closing bracket"),
        ({"question": "q", "answer": "a", "weight": -1}, "weight: .*greater than 0"),
        ({"question": "q", "answer": "a", "weight": "2"}, "weight: .*number"),
        ('{"question": "q", "answer": "a", "weight": NaN}', "weight: .*(finite|greater)"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "rows with one answer and rows with chosen and rejected answers need files of their own",
        ),
    ],
)
def test_wrong_lines_are_named(line: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", {"question": "q", "answer": "a"}, line)
    with pytest.raises(UserError, match=rf"qa\.jsonl:2: .*{message}"):
        read_conversations(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[\n {"question": "q", "answer": "a"},\n {"question": "q"}\n]', r"a\.json:3: .*none of the known shapes"),
        (
            "a.json",
            b'[\n {"question": "q", "answer": "a"}\n {"question": "q"}\n]',
            r"a\.json:3: not JSON: Expecting ',' delimiter",
        ),
        ("a.json", b'[\n {"question": "q", "answer": "a"},\n {"question" "q"}\n]', r"a\.json:3: not JSON"),
        ("a.json", b'[{"question": "q", "answer": "a"}', r"a\.json:1: not JSON"),
        ("a.json", b'[{"question": "q", "answer": "a"}]\nmore', r"a\.json:2: not JSON: Extra data"),
        ("a.csv", b'question,answer\nq,a\n"q\n2",a\nq\n', r"a\.csv:5: 2 columns"),
        ("a.csv", b"question,answer\nq,a,b\n", r"a\.csv:2: 2 columns"),
        ("a.csv", b'question,answer\nq,a\nq,"a\n', r"a\.csv:3: not CSV"),
        ("a.csv", b"question,answer,weight\nq,a,\nq,a,heavy\n", r"a\.csv:3: weight: Input should be a valid number"),
        ("a.csv", b"ask,answer\nq,a\n", r"a\.csv:2: the keys ask, answer: none of the known shapes"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a whole \.parquet file"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "\xe9"}\n', r"a\.jsonl:2: not UTF-8 at byte 14 of the line"),
        ("a.jsonl.gz", b"\x1f\x8b no", r"a\.jsonl\.gz: cut short or damaged"),
        ("a.jsonl", b"\n \n", "no questions"),
        ("a.json", b"[]", "no questions"),
        ("a.csv", b"", "no questions"),
    ],
)
def test_wrong_files_are_named(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_conversations(tmp_path / name)


def test_missing_files_and_wrong_rows_of_a_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl: No such file"):
        read_conversations(tmp_path / "nowhere.jsonl")
    table = pa.table({"question": ["q", "q"], "answer": ["a", None]})
    pq.write_table(table, tmp_path / "qa.parquet")
    with pytest.raises(UserError, match=r"qa\.parquet:row 2: the keys question"):
        read_conversations(tmp_path / "qa.parquet")


def qa(question: str, answer: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages=messages, place=f"qa.jsonl:{question}{answer}")


def test_what_cannot_be_trained_on_is_dropped_and_counted() -> None:
    rows = [qa("q", "a"), qa("q", " "), qa("q", "a"), qa("q", "b")] + [qa(str(i), "") for i in range(6)]
    report = Report()
    assert [row.answer for row in select(rows, report, set())] == ["a", "b"]
    first, second = report.lines()
    assert first == ("dropped, empty answer: 7 (qa.jsonl:q , qa.jsonl:0, qa.jsonl:1, qa.jsonl:2, qa.jsonl:3, ...)")
    assert second == "dropped, a duplicate: 1 (qa.jsonl:qa)"
    assert report.first(Path("qa.jsonl")) == "qa.jsonl:q : empty answer"
    assert report.first(Path("a.jsonl")) == "a.jsonl"
    assert len(select(rows, Report(), set(), keep_duplicates=True)) == 3


def test_holding_out_moves_nothing_when_conversations_are_added() -> None:
    rows = [qa(str(i), "a") for i in range(400)]
    training, held_out = hold_out(rows, 0.2)
    assert len(training) + len(held_out) == 400
    assert 50 < len(held_out) < 110
    more, more_out = hold_out([*rows[::-1], qa("new", "a"), qa("1", "a")], 0.2)
    assert {row.key for row in held_out} <= {row.key for row in more_out}
    assert {row.key for row in more_out}.isdisjoint({row.key for row in more})


def test_preferences(tmp_path: Path) -> None:
    plain = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    answers = {"chosen": [{"role": "assistant", "content": "good"}], "rejected": [{"role": "assistant", "content": "bad"}]}
    first, second = read_examples(write(tmp_path / "p.jsonl", plain, {"prompt": talk} | answers))
    assert [message.content for message in first.messages] == ["q"]
    assert (first.chosen.content, first.rejected.content) == ("good", "bad")
    assert [message.content for message in second.messages] == ["q", "a", "r"]
    assert second.chosen == first.chosen
    for wrong, message in (
        (plain | {"prompt": talk, "chosen": [*talk[:1], *answers["chosen"]], "rejected": talk[:2]}, "not in the chosen"),
        (plain | {"chosen": talk[:2]}, "answer different conversations"),
        (plain | {"chosen": 3}, r"chosen\.content"),
        (plain | {"prompt": talk[:2]}, "last message must be the user's"),
        ({"prompt": "q", "chosen": "a"}, "none of the known shapes"),
    ):
        with pytest.raises(UserError, match=rf"p\.jsonl:1: .*{message}"):
            read_examples(write(tmp_path / "p.jsonl", wrong))
    with pytest.raises(UserError, match=r"p\.jsonl:1: a row with chosen and rejected answers; rows with one answer"):
        read_conversations(write(tmp_path / "p.jsonl", plain))


def test_choices(tmp_path: Path) -> None:
    row = {"question": "q", "choices": ["x", "B", "z"]}
    rows = read_choices(write(tmp_path / "c.jsonl", *(row | {"answer": answer} for answer in (2, "z", "C", "B"))))
    assert [choice.right() for choice in rows] == [2, 2, 2, 1]
    for wrong, message in (
        (row | {"answer": 3}, "none of the 3 choices"),
        (row | {"answer": -1}, "none of the 3 choices"),
        (row | {"answer": "y"}, "none of the 3 choices"),
        (row | {"answer": True}, "answer"),
        (row | {"choices": ["x"], "answer": 0}, "choices"),
        (row | {"choices": ["x", " "], "answer": 0}, "an empty choice"),
        (row, "question, choices and answer are needed"),
        (3, "question, choices and answer are needed"),
        (row | {"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": 1}, "ambiguous: .*by its label, or .*number"),
    ):
        with pytest.raises(UserError, match=rf"c\.jsonl:1: .*{message}"):
            read_choices(write(tmp_path / "c.jsonl", wrong))


def test_of_a_few_one_is_held_out() -> None:
    rows = [qa(str(i), "a") for i in range(5)]
    training, held_out = hold_out(rows, 1e-9)
    assert (len(training), len(held_out)) == (4, 1)
    assert hold_out([*rows, *rows], 1e-9) == ([*training, *training], [*held_out, *held_out])
    assert hold_out(rows[:1], 0.5) == (rows[:1], [])
    assert hold_out(rows, 0.0) == (rows, [])
    assert hold_out([], 0.5) == ([], [])


SYSTEM, LONG = [("system", "s"), *PLAIN], [("user", "q\n\nc"), ("assistant", "a")]
ASKED = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PLAIN),
        ({"conversations": [{"from": "system", "value": "s"}, ASKED, {"role": "model", "value": "a"}]}, SYSTEM),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}], "system": "s"}, SYSTEM),
        ({"prompt": "q", "response": "a", "system": "s"}, SYSTEM),
        ({"system_prompt": "s", "question": "q", "response": "a"}, SYSTEM),
        ({"system_prompt": "", "question": "q", "response": "a"}, PLAIN),
        ({"input": "q", "output": "a"}, PLAIN),
        ({"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"}, LONG),
        ({"question": "q", "context": "c", "answer": "a"}, LONG),
        ({"instruction": "q", "input": "i", "context": "c", "output": "a"}, [("user", "q\n\ni\n\nc"), ("assistant", "a")]),
        ({"instruction": "q", "input": None, "output": "a", "history": [["x", "y"]], "system": "s"},
         [("system", "s"), ("user", "x"), ("assistant", "y"), *PLAIN]),
        ({" Question": "q", "ANSWER ": "a"}, PLAIN),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"from": "gpt", "value": "a"}]}, PLAIN),
    ],
)  # fmt: skip
def test_shapes_of_public_files(row: dict, expected: list, tmp_path: Path) -> None:
    reader = Reader()
    (found,) = reader.conversations(write(tmp_path / "qa.jsonl", row))
    assert [(m.role, m.content) for m in found.messages] == expected
    assert not reader.check().counts  # every key was read


def test_a_question_without_an_answer_is_asked_as_it_is_learnt(tmp_path: Path) -> None:
    row = {"instruction": "q", "input": "i", "context": "c", "system": "s"}
    (learnt,) = read_conversations(write(tmp_path / "qa.jsonl", row | {"output": "a"}))
    (asked,) = read_questions(write(tmp_path / "questions.jsonl", row))
    assert asked.messages == learnt.messages[:-1]


def test_keys_that_are_not_read_are_named_once(tmp_path: Path) -> None:
    rows = [{"question": str(i), "answer": "a", "Source": "web"} | ({"note": 1} if i < 2 else {}) for i in range(9)]
    reader = Reader()
    reader.conversations(write(tmp_path / "qa.jsonl", *rows))
    assert reader.check().counts == {'not read, key "Source"': 9, 'not read, key "note"': 2}


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"question": "q", "answer": "a", "kind": "k", "category": "c"}, ["category"]),  # which loses to kind
        ({"question": "q", "answer": "a", "category": 3, "label": "geography"}, ["category", "label"]),
        ({"question": "q", "answer": "a", "system": "s", "system_prompt": "t"}, ["system_prompt"]),
        ({"question": "q", "answer": "a", "ANSWER": "b"}, ["ANSWER"]),
        ({"question": "q", "answer": "a", "empty": "", "none": None}, []),
        ({"prompt": "p", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ["prompt"]),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "hm"}]},
            ["messages: thinking"],
        ),
        (PAIR | {"id": 3, "score": 1.0, "language": "pt"}, ["id", "score", "language"]),
    ],
)
def test_no_key_is_passed_over_in_silence(row: dict, unread: list[str], tmp_path: Path) -> None:
    reader = Reader()
    reader.examples(write(tmp_path / "qa.jsonl", row, row))
    (tmp_path / "qa.csv").write_text("question,answer,answer\nq,a,b\n")
    keys = ", ".join(f'"{key}"' for key in unread)
    assert reader.check().counts == ({f"not read, key{'s' * (len(unread) > 1)} {keys}": 2} if unread else {})
    assert [row.answer for row in reader.conversations(tmp_path / "qa.csv")] == ["a"]
    assert reader.check().lines()[-1] == f'not read, key "answer (column 3)": 1 ({tmp_path}/qa.csv:2)'


def test_rows_and_turns_that_are_not_to_be_learnt(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    muted = [turns[0], turns[1] | {"weight": 0}, turns[0], turns[1] | {"train": True}, turns[0], turns[1] | {"loss": False}]
    rows = [
        {"prompt": "p", "completion": "bad", "label": False},
        {"prompt": "p", "completion": "good", "label": True},
        {"question": "q", "answer": "a", "weight": 0},
        {"messages": muted},
    ]
    reader = Reader()
    good, talk = reader.conversations(write(tmp_path / "qa.jsonl", *rows))
    assert good.answer == "good"
    assert [message.supervised for message in talk.answers] == [False, True, False]
    whole, silent = ({"messages": [turns[0], turns[1] | marks]} for marks in ({}, {"train": False}))
    both = read_conversations(write(tmp_path / "both.jsonl", whole, silent))
    report = Report()
    assert select(both, report, set()) == both  # not duplicates: one of them teaches something
    assert len(encode(both, ByteTokenizer(), 64, report)) == 1
    assert report.lines() == [f"dropped, its answers are marked as not to be trained on: 1 ({tmp_path}/both.jsonl:2)"]
    assert reader.check().counts == {"left out, marked as a bad answer (label: false)": 1, "left out, weight 0": 1}
    (tmp_path / "qa.csv").write_text("prompt;completion;label\np;a;FALSE\np;b;true\n")
    assert [row.answer for row in Reader().conversations(tmp_path / "qa.csv")] == ["b"]


def test_all_bad_rows_are_in_one_message_or_left_out(tmp_path: Path) -> None:
    good, bad = {"question": "q", "answer": "a"}, {"question": "q", "reply": "a"}
    path, other = write(tmp_path / "qa.jsonl", good, *[bad] * 7, "{", good), write(tmp_path / "x.jsonl", turns("user"), good)
    reader = Reader()
    assert len(reader.conversations(path)) == 2
    reader.conversations(other)
    with pytest.raises(
        UserError,
        match=r"qa\.jsonl:2: .* \(and 6 more: .*qa\.jsonl:3, .*, \.\.\.\); .*qa\.jsonl:9: not JSON.*; .*x\.jsonl:1.*skip_bad",
    ):
        reader.check()
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"question": "q", "answer": "\xe9"}\n')  # spoils the file, but not the count
    lenient = Reader(skip_bad=True)
    assert len(lenient.conversations(path)) == 2
    assert lenient.examples(latin) == []
    assert sorted(lenient.check().counts.values()) == [1, 1, 7]
    with pytest.raises(UserError, match=r"latin\.jsonl:1: not UTF-8 .*no questions are left in this file"):
        lenient.conversations(latin)  # to measure with


def test_question_and_answer_key(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", {"Frage": "q", "Antwort": "a"})
    (row,) = Reader(question_key="frage", answer_key="Antwort").conversations(path)
    assert [(m.role, m.content) for m in row.messages] == PLAIN
    (row,) = Reader(answer_key="antwort").conversations(write(path, {"prompt": "q", "Antwort": "a"}))  # one of them is enough
    assert [(m.role, m.content) for m in row.messages] == PLAIN
    reader = Reader(question_key="frage")
    reader.examples(write(path, {"question": "q", "answer": "a"}))
    with pytest.raises(UserError, match="the keys question, answer: none with the names that --question_key"):
        reader.check()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'[{"question": "q", "answer": "a"}]'),
        ("a.txt.json", b'{\n "question": "q",\n "answer": "a"\n}\n'),
        ("a.json", '{"question": "q", "answer": "a"}'.encode("utf-16")),
        ("a.csv", b"\xef\xbb\xbfQuestion, Answer\nq,a\n"),
        ("b.csv", b"question;answer\nq;a\n"),
        ("c.csv", b"answer\tquestion\r\na\tq\r\n"),
        ("d.csv", "question,answer\nq,a\n".encode("utf-16")),
        ("e.csv", b'Question, Answer\nq, "a"\n'),
    ],
)
def test_formats_by_content(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert contents(tmp_path / name) == [PLAIN]


def test_encoding_of_questions(tmp_path: Path) -> None:
    (tmp_path / "qa.csv").write_bytes("question,answer\nOnde fica São Tomé?,na África\n".encode("latin-1"))
    (row,) = Reader(encoding="latin-1").conversations(tmp_path / "qa.csv")
    assert row.answer == "na África"
    write(tmp_path / "qa.jsonl", {"question": "q", "answer": "a"})
    for name in ("qa.csv", "qa.jsonl"):
        with pytest.raises(UserError, match="--encoding=no-such: no such encoding"):
            Reader(encoding="no-such").conversations(tmp_path / name)
    (tmp_path / "qa.jsonl").write_text('{"question": "q", "answer": "a"}\n', encoding="utf-16-le")
    with pytest.raises(UserError, match=r"qa\.jsonl:1: every second byte is 0.*--encoding utf-16-le"):
        read_conversations(tmp_path / "qa.jsonl")


def test_preferences_as_public_files_have_them(tmp_path: Path) -> None:
    question = {"role": "user", "content": "q"}
    good, bad = ([question, {"role": "assistant", "content": text}] for text in ("good", "bad"))
    hh = {name: f"\n\nHuman: q\n\nAssistant: {name}" for name in ("good", "bad")}
    rows = [
        {"prompt": "q", "chosen": good, "rejected": bad},  # UltraFeedback
        {"chosen": good, "rejected": bad},
        {"chosen": hh["good"], "rejected": hh["bad"]},  # HH-RLHF
        {"conversations": [{"from": "human", "value": "q"}], "chosen": good[1], "rejected": bad[1]},  # LLaMA-Factory
        {"system": "s", "prompt": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "i", "chosen": "good", "rejected": "bad"},
    ]
    found = read_examples(write(tmp_path / "p.jsonl", *rows))
    assert [(row.chosen.content, row.rejected.content) for row in found] == [("good", "bad")] * 6
    assert [[m.content for m in row.messages] for row in found] == [["q"]] * 4 + [["s", "q"], ["q\n\ni"]]
    report = Report()
    same = read_examples(write(tmp_path / "p.jsonl", {"prompt": "q", "chosen": "a", "rejected": "a"}))
    assert select(same, report, set()) == []
    assert report.counts == {"dropped, chosen and rejected are the same": 1}


def test_choices_as_arc_has_them_and_answers_that_mean_two_things(tmp_path: Path) -> None:
    labelled = {"text": ["3", "4", "2"], "label": ["1", "2", "3"]}
    rows = [
        {"question": "q", "choices": labelled, "answerKey": "3", "id": "x"},
        {
            "question": {"stem": "q", "choices": [{"text": t, "label": n} for t, n in zip("xyz", "ABC", strict=True)]},
            "answerKey": "B",
        },
        {"question": "q", "choices": ["x", "y"], "answer": "b"},
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["B", "A"]}, "answerKey": "a"},
    ]
    assert [row.right() for row in read_choices(write(tmp_path / "c.jsonl", *rows))] == [2, 1, 1, 1]
    for choices, answer in ((["3", "4", "2", "1"], "2"), (["B", "x"], "B")):
        row = {"question": "q", "choices": choices, "answer": answer}
        with pytest.raises(UserError, match=rf"answer '{answer}' is ambiguous"):
            read_choices(write(tmp_path / "c.jsonl", row))


def data(capsys: pytest.CaptureFixture[str], *names: str, **options: object) -> tuple[int, int, str]:
    """The numbers of training and validation examples that finetune.py has, and what it prints."""
    config = FinetuneOptions(init_from="base", out_dir="out", data=names, **options)
    reader = Reader(config.encoding, config.skip_bad)
    found = read_data(config, reader, ByteTokenizer(), 64, 1337, [])
    return len(found.training), len(found.validation), capsys.readouterr().err


def test_folders_and_patterns_of_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more").mkdir()
    write(tmp_path / "a.jsonl", *({"question": str(i), "answer": "a"} for i in range(30)))
    write(tmp_path / "more" / "b.json.txt", *({"question": str(i), "answer": "b"} for i in range(30)))
    (tmp_path / "README.md").write_text("# Questions, and answers\n")
    training, validation, err = data(capsys, f"{tmp_path}:2")
    assert (training + validation, validation > 0) == (60, True)
    assert f"passed over, no rows but text: 1 ({tmp_path}/README.md)" in err
    assert data(capsys, f"{tmp_path}/more/*:0.5", val_fraction=0.0)[0] == 30
    with pytest.raises(UserError, match=r"no questions in .*no rows but text: 1 \(.*README\.md\)"):
        data(capsys, f"{tmp_path}/*.md")


def test_few_questions_and_nothing_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "qa.jsonl", *({"question": q, "answer": "a"} for q in ("q", "r", "long" * 30)))
    training, validation, err = data(capsys, str(path), val_fraction=0.0)
    assert training == validation == 2
    assert "2 conversations to train on, none held out (val_loss is of the training data)" in err
    assert err.splitlines()[-1] == f"dropped, longer than the context of 64 tokens: 1 ({path}:3)"  # once
    one = write(tmp_path / "one.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(UserError, match="the only one is trained on; --val_fraction 0"):
        data(capsys, str(one))
    assert data(capsys, str(one), preview=1)[:2] == (1, 0)


def test_pairs_that_teach_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q", "chosen": "a" * 70 + "b", "rejected": "a" * 70}]
    path = write(tmp_path / "p.jsonl", *pairs, {"prompt": "q", "chosen": "a", "rejected": "b"})
    training, _, err = data(capsys, str(path), val_fraction=0.0, too_long="truncate")
    assert training == 1
    assert f"dropped, chosen and rejected are the same: 1 ({path}:1)" in err
    assert f"dropped, chosen and rejected are the same within the context: 1 ({path}:2)" in err
    with pytest.raises(UserError, match=r"p\.jsonl:1: chosen and rejected are the same; nothing is left to train on"):
        data(capsys, str(write(path, *pairs)), too_long="truncate")

"""papagaio/batches/questions.py: files of every kind read, wrong rows named by file and line."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papagaio.batches.conversations import Conversation
from papagaio.batches.questions import (
    hold_out,
    parse_source,
    read_choices,
    read_conversations,
    read_examples,
    select,
)
from papagaio.errors import UserError
from papagaio.report import Report

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
        (turns("user", "robot"), "role"),
        ({"question": "q", "answer": "a", "weight": 0}, "weight: .*greater than 0"),
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


def test_sources_have_weights(tmp_path: Path) -> None:
    path, odd = write(tmp_path / "qa.jsonl", ""), write(tmp_path / "odd:3", "")
    assert parse_source(str(path)) == (path, 1)
    assert parse_source(f"{path}:0.5") == (path, 0.5)
    assert parse_source(str(odd)) == (odd, 1)
    assert parse_source(f"{odd}:2") == (odd, 2)
    for word, message in (
        (f"{path}:0", "positive"),
        (f"{path}:-1", "positive"),
        (f"{path}:nan", "positive"),
        ("no:2", "no such"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_source(word)


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
    assert report.first(Path("qa.jsonl")) == "qa.jsonl:q : dropped, empty answer"
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
        (plain | {"rejected": "good"}, "are the same"),
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
        ([], "question, choices and answer are needed"),
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

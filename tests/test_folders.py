"""Folders, patterns and files as people have them: what is read, what is passed over, and that each is said."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest

from data import prepare as prepare_module
from papagaio.corpus import encoding as encoding_module
from papagaio.corpus import reading
from papagaio.corpus import text as text_module
from papagaio.corpus.dataset import Dataset
from papagaio.corpus.folders import find_files
from papagaio.corpus.options import PrepareOptions, ReadingOptions
from papagaio.corpus.reading import list_spans, read
from papagaio.corpus.text import detect_encoding
from papagaio.errors import UserError
from papagaio.report import Report

ROOT = Path(__file__).parents[1]
PROSE = "Um papagaio verde falou: olá, à noite. " * 20


def found(*names: object, exclude: Sequence[str] = ()) -> tuple[list[str], dict[str, int]]:
    """The names of the files found, and the counts of what was passed over."""
    report = Report()
    files = find_files([str(name) for name in names], report, exclude)
    return [Path(file).name for file in files], {key.removeprefix("passed over, "): n for key, n in report.counts.items()}


def texts(*names: object, **options: object) -> list[str]:
    config = ReadingOptions(**options)
    spans = list_spans([str(name) for name in names], config)
    return ["".join(fragment.text for fragment in read(span, config)) for span in spans]


def prepare(*arguments: object, status: int = 0) -> str:
    command = [sys.executable, "data/prepare.py", *map(str, arguments), "--tokenizer", "byte", "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="backslashreplace", check=False)
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with everything in it."""
    home = tmp_path / "home"
    (home / "deep" / "er").mkdir(parents=True)
    for name in ("a.txt", "deep/b.md", "deep/er/c.py"):
        (home / name).write_text(PROSE + name)
    for name, data in {
        "photo.png": b"\x89PNG\0",
        "paper.pdf": b"%PDF-1.7",
        "page.html": b"<html>",
        "all.zip": b"PK\x03\x04",
        "scan.txt": b"%PDF-1.4 under a wrong name",
        "core": b"\0\1\2" * 50,
        "settings.json": b'{\n "theme": "dark"\n}',
        "table.csv": b"n,m\n1,2\n",
        ".hidden": b"x",
    }.items():
        (home / name).write_bytes(data)
    (home / "gone").symlink_to("nowhere")
    os.mkfifo(home / "pipe")
    (home / "loop").symlink_to(home)
    (home / "deep" / "again").symlink_to(home / "deep" / "er")
    os.link(home / "a.txt", home / "z.txt")
    return home


def test_a_home_folder(home: Path) -> None:
    names, passed = found(home)
    assert names == ["a.txt", "b.md", "c.py", "settings.json", "table.csv"]  # er is read once, by its own name
    assert passed == {
        "images": 1,
        "PDF": 2,
        "web pages": 1,
        "archives": 1,
        "binary files": 1,
        "hidden": 1,
        "links to nothing": 1,
        "pipes, sockets and devices": 1,
        "links to a directory that is read already": 2,
        "another name of a file that is read already": 1,
    }
    assert found(home / "**" / "*") == (names, passed)
    assert found(home, exclude=("*.py", "deep/b*"))[0] == ["a.txt", "settings.json", "table.csv"]
    said = prepare("--input", home, "--out", home.parent / "data")
    for line in (
        "passed over, PDF: 2 (",
        'passed over, JSON or CSV without the key "text"',
        "took 1 .txt file, 1 .md file, 1 .py file",
    ):
        assert line in said
    left_out = Dataset(home.parent / "data").manifest["left_out"]
    assert sum(left_out.values()) == sum(passed.values()) + 2


def test_links_to_directories_are_followed_and_loops_end(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for i in range(20):
        (outside / f"{i:02}.txt").write_text(PROSE + str(i))
    (outside / "loop").symlink_to(outside)
    (outside / "second").symlink_to(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(outside)
    for name in (tmp_path / "in", f"{tmp_path}/in/**/*.txt"):
        assert found(name)[0] == [f"{i:02}.txt" for i in range(20)]


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["README.md", "dataset_infos.json", "train-0.parquet", "validation-0.parquet", "test-0.parquet"], ["train-0.parquet"]),
        (["data/train.jsonl", "data/val.jsonl", "LICENSE"], ["train.jsonl"]),
        (["train.txt", "valid.txt", "test.txt"], ["train.txt"]),
        (["validation/0.jsonl", "train/0.jsonl"], ["0.jsonl"]),
        (["tests/test_x.py", "README.md", "x.py"], ["README.md", "test_x.py", "x.py"]),  # no data: all of it is text
        (["evaluation.md", "value.txt"], ["evaluation.md", "value.txt"]),
    ],
)
def test_no_other_split_is_taken_unasked(files: list[str], taken: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    names, passed = found(tmp_path)
    assert names == taken
    assert sum(passed.values()) == len(files) - len(taken)
    for name in files:  # who names a file gets it
        assert found(tmp_path / name) == ([Path(name).name], {})


def test_compressed_tables_and_text_are_recognised_by_content(tmp_path: Path) -> None:
    rows = [{"text": "first"}, {"text": "second"}, {"text": None}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name, data in {
        "a.json.gz": gzip.compress(lines),
        "b.json": json.dumps(rows).encode(),
        "c.jsonl": json.dumps(rows, indent=1).encode(),
        "d.txt.xz": lzma.compress(lines),
        "e.ndjson.bz2": bz2.compress(lines),
        "f.csv": b"id;Text;text\n1;x;first\n2;y;second\n3;z;\n",
        "g.json": "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert texts(tmp_path / name) == ["firstsecond"], name
    for name, data in {
        "h.txt.bz2": bz2.compress(PROSE.encode()),
        "i.txt": PROSE.encode(),
        "j.txt": b"{braces} and [brackets]",
    }.items():
        (tmp_path / name).write_bytes(data)
        assert texts(tmp_path / name) == [PROSE if name != "j.txt" else "{braces} and [brackets]"]
    assert texts(tmp_path / "b.json", format="text") == [json.dumps(rows)]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pdf", b"%PDF", "PDF files are not read; extract its text first"),
        ("a.docx", b"PK\x03\x04", "office documents are not read; save it as text first"),
        ("a.html", b"<p>", "read it with its markup by --format text"),
        ("a.txt", b"PK\x03\x04", "archives are not read; unpack it first"),
        ("a.png", b"\x89PNG", "images are not read"),
        ("a.txt", bytes(range(256)), "binary files are not read"),
        ("a.csv", b"x,y\n1,2\n", 'no text under the key "text"; --text_key names another; it has x, y'),
        ("a.json", b'{"x": 1}', 'no text under the key "text"'),
        ("a.jsonl", b'{"text": ["a", "b"]}', 'under the key "text" is a list, not text'),
        ("a.txt.bz2", b"BZh9 no", "cut short or damaged"),
        ("a.txt.xz", b"\xfd7zXZ\0 no", "cut short or damaged"),
    ],
)
def test_what_a_named_file_is_instead_of_text(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        texts(tmp_path / name)
    assert message in str(caught.value)
    assert "--errors replace" not in str(caught.value)


def test_keys_inside_keys(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"translation": {"en": "parrot", "pt": "papagaio"}}, {"translation": {"en": "macaw", "pt": None}}]
    rows.append({"translation": None})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"translation.en": "dotted", "translation": {"en": "inner"}}\n')
    for name in ("a.jsonl", "a.parquet"):
        assert texts(tmp_path / name, text_key="translation.en") == ["parrotmacaw"]
        assert texts(tmp_path / name, text_key="translation.pt") == ["papagaio"]
        with pytest.raises(UserError, match="translation"):
            texts(tmp_path / name, text_key="translation.fr")
    assert texts(tmp_path / "b.jsonl", text_key="translation.en") == ["dotted"]


def test_encodings_are_found_for_each_file(tmp_path: Path) -> None:
    late = "x" * 2**20 + PROSE  # the first character that is not ASCII comes late
    for name, encoding, text in (
        ("a.txt", "utf-8", PROSE),
        ("b.txt", "latin-1", PROSE),
        ("c.txt", "utf-16", PROSE),
        ("d.txt", "latin-1", late),
    ):
        (tmp_path / name).write_bytes(text.encode(encoding))
    assert texts(tmp_path, encoding="auto") == [PROSE, PROSE, PROSE, late]
    assert detect_encoding(str(tmp_path / "a.txt")) == "utf-8"
    (tmp_path / "q.csv").write_bytes(f'text\n"{PROSE}"\n'.encode("latin-1"))
    assert texts(tmp_path / "q.csv", encoding="auto") == [PROSE]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "It costs \u00a35 \u2013 \u201cnot much\u201d, he said; that\u2019s \u20ac6 in the caf\u00e9."),
        ("cp1252", "Das schöne Mädchen ging über die Straße und grüßte die Bäcker."),
        ("cp1252", "L'été dernier, nous étions très heureux à la forêt, près du château."),
        ("cp1250", "Zażółć gęślą jaźń, proszę pana o wiadomość."),
        ("cp1251", "Это русский текст, который написан для проверки кодировки."),
        ("koi8_r", "Это русский текст, который написан для проверки кодировки."),
        ("cp1253", "Αυτό είναι ένα ελληνικό κείμενο για δοκιμή."),
        ("cp932", "これは日本語のテキストです。文字コードを調べます。"),
        ("gb18030", "这是一个中文文本，用来检测编码。我们需要更多的字。"),
        ("cp1251", "n\n" * 2**20 + "Это русский текст, который написан для проверки кодировки."),
        ("utf-8", "naïve " * 200_000),  # a character on the border of two blocks
        ("latin-1", "n" * (2**20 - 2) + " été: nous étions très heureux à la forêt.\n"),  # the first é ends a block
    ],
)
def test_common_encodings_are_told_apart(encoding: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert "".join(texts(tmp_path / "a.txt", encoding="auto")) == text


def test_all_that_is_bad_is_in_one_message_and_skip_bad_leaves_it_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_bytes(PROSE.encode() if i < 3 else PROSE.encode("latin-1"))
    (folder / "x.jsonl").write_text(
        '{"text": "good"}\n{"text": 3}\n{"body": "no"}\nno json\n{"text": null}\n' + '{"text": "b"}\n' * 9
    )
    (folder / "damaged.txt.gz").write_bytes(gzip.compress(PROSE.encode())[:-9])
    said = prepare("--input", folder, "--out", tmp_path / "data", status=2)
    for part in (
        "not utf-8: 6 (",
        "5.txt:1",
        "not JSON",
        "x.jsonl:4",
        "is a number, not text",
        "cut short or damaged: 1",
        "--skip_bad",
    ):
        assert part in said
    assert said.count("error: ") == 1
    said = prepare("--input", folder, "--out", tmp_path / "data", "--skip_bad")
    assert "left out, not utf-8: 6 (" in said
    dataset = Dataset(tmp_path / "data")
    assert sum(dataset.manifest["left_out"].values()) == 6 + 3 + 1
    assert dataset.manifest["empty_documents"] == 1
    assert "left out, not utf-8: 6" in prepare_inspect(tmp_path / "data")
    said = prepare("--input", folder, "--out", tmp_path / "auto", "--encoding", "auto", "--skip_bad")
    assert "utf-8" not in said
    assert "read as cp1252: 6 (" in said


@pytest.mark.parametrize("shared", [False, True])
def test_skip_bad_leaves_out_the_bad_rows_alone(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one worker reads a file or many share it, each bad row is left out and its line named."""
    if shared:
        monkeypatch.setattr(reading, "LEAF_BYTES", 64)
        monkeypatch.setattr(text_module, "BLOCK_BYTES", 16)
    good = [json.dumps({"text": f"document {i}"}).encode() for i in range(40)]
    lines = [*good[:20], b'{"text": "\xe9"}', b'{"text": "a\0b"}', b"{", b'{"body": ""}', b'{"text": "\\ud800"}', *good[20:]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    records = [*(f"text {i}\nof two lines".encode() for i in range(9)), b"\xff bad", b"a NUL \0", b"the last"]
    (tmp_path / "b.txt").write_bytes(b"\n\n".join(records))
    config = ReadingOptions(skip_bad=True, split_documents="blank_line")
    bad = Report()
    found = ["".join(f.text for f in read(span, config, bad)) for span in list_spans([str(tmp_path / "a.jsonl")], config)]
    assert "".join(found) == "".join(f"document {i}" for i in range(40))
    places = {place.removeprefix(f"{tmp_path}/") for several in bad.places.values() for place in several}
    assert places == {f"a.jsonl:{line}" for line in range(21, 26)}
    bad = Report()
    found = ["".join(f.text for f in read(span, config, bad)) for span in list_spans([str(tmp_path / "b.txt")], config)]
    assert "".join(found) == "".join(f"text {i}\nof two lines" for i in range(9)) + "the last"
    places = [place.removeprefix(f"{tmp_path}/") for several in bad.places.values() for place in several]
    assert places == ["b.txt:28", "b.txt:30"]


def test_a_file_that_is_damaged_is_read_up_to_there(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {i} {os.urandom(200).hex()}"}) + "\n" for i in range(9000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-2000])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "c.csv").write_bytes(b"id,text\n1,one\n2\n3,three\n4,fo\xffr\n")
    config = ReadingOptions(skip_bad=True)
    bad = Report()
    found = [f.text for span in list_spans([str(tmp_path)], config, bad) for f in read(span, config, bad)]
    assert 1000 < len(found) < 9000
    assert found[1000].startswith("document 1000 ")
    reasons = {"left out, cut short or damaged": 1, "left out, not a whole .parquet file": 1, "left out, not UTF-8": 1}
    assert bad.counts == reasons
    (tmp_path / "c.csv").write_bytes(b"id,text\n1,one\n2\n3,three\n")
    bad = Report()
    (span,) = list_spans([str(tmp_path / "c.csv")], config)
    assert [f.text for f in read(span, config, bad)] == ["one", "three"]
    assert bad.lines() == [f"left out, 2 columns are needed, as in the first line: 1 ({tmp_path}/c.csv:3)"]


def test_what_was_left_out_is_known_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of a piece is kept with it: a run that is continued does not forget what the first run left out."""
    (tmp_path / "a.jsonl").write_text('{"text": "one of two"}\nno json\n' + f'{{"text": "{PROSE}"}}\n' * 3)
    config = PrepareOptions(
        input=(str(tmp_path / "a.jsonl"),), out=tmp_path / "out", tokenizer="byte", skip_bad=True, workers=1, val_fraction=0.4
    )
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "assemble", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_module.main(config)
    encoded = Mock()
    monkeypatch.setattr(encoding_module, "encode_task", encoded)
    prepare_module.main(config)
    assert not encoded.called
    assert Dataset(tmp_path / "out").manifest["left_out"] == {"left out, not JSON": 1}


def prepare_inspect(data: Path) -> str:
    command = [sys.executable, "data/prepare.py", "--inspect", str(data)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_many_replaced_characters_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(PROSE.encode("latin-1") * 10)
    said = prepare("--input", tmp_path / "a.txt", "--out", tmp_path / "data", "--errors", "replace")
    assert "could not be decoded and are U+FFFD" in said
    assert "could not be decoded and are U+FFFD" in prepare_inspect(tmp_path / "data")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    Path(os.fsdecode(name)).write_text(PROSE * 9)
    prepare("--input", tmp_path / os.fsdecode(b"caf\xe9.txt"), "--out", tmp_path / "data")
    assert Dataset(tmp_path / "data").manifest["sources"] == ["caf\\xe9.txt"]
    for name, data in ((b"\xe9.txt", b"\xff"), (b"\xe8.jsonl", b"{}"), (b"\xe7.json", b"[1"), (b"\xe6.parquet", b"PAR1")):
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
        Path(path).write_bytes(data)
        said = prepare("--input", path, "--out", tmp_path / "bad", status=2)
        assert f"\\x{name[0]:x}{os.path.splitext(path)[1]}" in said
        assert "Traceback" not in said

"""Reading corpora: every format gives the same documents, workers that share a file lose and double nothing."""

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import example, given, settings
from hypothesis import strategies as st

from papagaio.corpus import reading, tables
from papagaio.corpus import text as textfiles
from papagaio.corpus.options import ReadingOptions
from papagaio.corpus.reading import list_spans, read
from papagaio.errors import UserError

TEXTS = [f"document {i}, naïve 🦜\n\n" * (1 + i % 3) for i in range(40)]


@contextmanager
def small_blocks() -> Iterator[None]:
    """Limits so low that a few hundred bytes are a large file."""
    limits = [(reading, "LEAF_BYTES", 64), (textfiles, "BLOCK_BYTES", 16), (textfiles, "SEPARATOR_BYTES", 32)]
    limits += [(textfiles, "LONG_RECORD", 48), (tables, "LONG_RECORD", 48)]
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in limits:
            patch.setattr(module, name, value)
        yield


def texts_of(*inputs: object, **options: object) -> list[str]:
    """The documents of all spans, in order."""
    config = ReadingOptions(**options)
    found: list[str] = []
    inside = False
    for span in list_spans(tuple(map(str, inputs)), config):
        for text, first, last in read(span, config):
            assert first != inside
            found = [*found, text] if first else [*found[:-1], found[-1] + text]
            inside = not last
    assert not inside
    return found


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    # two frames, one after the other, as parallel compressors write them
    raw = plain.read_bytes()
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(raw[:500]) + zstd.compress(raw[500:]))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "d.parquet", row_group_size=7)
    os.makedirs(tmp_path / "e" / "deeper")
    for i, text in enumerate(TEXTS):
        (tmp_path / "e" / ("deeper" if i > 20 else ".") / f"{i:02}.md").write_text(text)
        (tmp_path / f"f{i:02}.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "e" / ".hidden").write_bytes(b"\xff")
    (tmp_path / "g.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "f*.txt.gz"):
        assert texts_of(tmp_path / name) == TEXTS, name
    in_order = [text for _, text in sorted((f"deeper/{i:02}" if i > 20 else f"{i:02}", text) for i, text in enumerate(TEXTS))]
    assert texts_of(tmp_path / "e") == in_order
    trimmed = [text.strip("\n") for text in TEXTS]
    assert texts_of(tmp_path / "g.txt", split_documents="<|endoftext|>") == trimmed
    assert texts_of(tmp_path / "a.jsonl", tmp_path / "d.parquet") == TEXTS * 2
    assert texts_of(tmp_path / "g.txt") == [(tmp_path / "g.txt").read_text()]


def test_text_key_format_and_encoding(tmp_path: Path) -> None:
    assert texts_of(write_jsonl(tmp_path / "a.jsonl", ["x", "y"], "body"), text_key="body") == ["x", "y"]
    os.rename(tmp_path / "a.jsonl", tmp_path / "a.log")
    assert texts_of(tmp_path / "a.log", text_key="body", format="jsonl") == ["x", "y"]
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "content": ["x", None]}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", text_key="content") == ["x", ""]
    text = "olá 🦜\r\n" * 30
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        (tmp_path / "b.txt").write_bytes(text.encode(encoding))
        assert texts_of(tmp_path / "b.txt", encoding="utf-8" if encoding == "utf-8-sig" else encoding) == [text]
    (tmp_path / "c.txt").write_bytes(b"ol\xe1\0")
    assert texts_of(tmp_path / "c.txt", encoding="latin-1", errors="replace") == ["olá\ufffd"]
    assert texts_of(tmp_path / "c.txt", errors="replace") == ["ol\ufffd\ufffd"]
    (tmp_path / "d.jsonl").write_text('{"text": "a\\ud800b\\u0000"}')
    assert texts_of(tmp_path / "d.jsonl", errors="replace") == ["a\ufffdb\ufffd"]


words = st.lists(st.sampled_from(["parrot", "naïve", "🦜", "", " ", "\n", "x" * 90, ".", "\t", "\r\n"]), max_size=40).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(words, min_size=1, max_size=12))
@example(["a" * 63, "b"])
@example(["a", "\n" * 200, "b"])
@pytest.mark.parametrize("split", ["blank_line", "<|endoftext|>", "none", "jsonl"])
def test_spans_share_a_file_without_loss(tmp_path_factory: pytest.TempPathFactory, split: str, texts: list[str]) -> None:
    """What many workers read of one file is what one reads who reads it all."""
    path = tmp_path_factory.mktemp("spans") / ("a.jsonl" if split == "jsonl" else "a.txt")
    between = {"blank_line": "\n \t\n", "<|endoftext|>": "<|endoftext|>", "none": "", "jsonl": "\n"}[split]
    records = [json.dumps({"text": text}, ensure_ascii=False) for text in texts] if split == "jsonl" else texts
    path.write_bytes(between.join(records).encode())
    options = {"split_documents": "none" if split == "jsonl" else split}
    with small_blocks():
        shared = texts_of(path, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "LEAF_BYTES", 2**30)
        assert shared == texts_of(path, **options)
    if split == "none":
        assert shared == [path.read_bytes().decode()]
    if split == "jsonl":
        assert shared == texts
    if split == "<|endoftext|>":  # nothing follows a separator at the very end
        assert shared == [text.strip("\r\n") for text in (texts if texts[-1] else texts[:-1])]


def test_a_record_of_many_spans_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a", "x" * 5000, "b", "y" * 2000]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    searched: list[int] = []
    blocks_of = textfiles.blocks_of
    monkeypatch.setattr(textfiles, "blocks_of", lambda path, start, stop: searched.append(stop) or blocks_of(path, start, stop))
    with small_blocks():
        assert texts_of(path) == texts
    assert searched.count(-1) <= 6  # searches for a boundary; the file has more than a hundred spans
    write_jsonl(path, ["c", "z" * 4000, *texts])  # another file with the same name
    with small_blocks():
        assert texts_of(path) == ["c", "z" * 4000, *texts]


def test_blank_lines_part_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n\nfirst\nstill first\r\n\r\n  second\n \t\n\n\nthird\n\n")
    assert [t for t in texts_of(tmp_path / "a.txt", split_documents="blank_line") if t] == [
        "first\nstill first",
        "  second",
        "third",
    ]


def test_a_line_of_json_may_be_long_but_not_endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'a "quoted" 🦜, a \\ and a line\nbreak' * 9
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n' + json.dumps({"id": [1, {"text": "no"}], "text": text}) + "\n")
    with small_blocks():
        assert texts_of(tmp_path / "a.jsonl") == ["short", text]
        monkeypatch.setattr(tables, "LONGEST_LINE", 100)
        with pytest.raises(UserError, match=r"a\.jsonl:2: a line of more than 100 characters; make several documents of it"):
            texts_of(tmp_path / "a.jsonl")


def test_a_document_of_many_blocks_stays_whole(tmp_path: Path) -> None:
    long = "a line that is long, and a 🦜 in it\n" * 50
    write_jsonl(tmp_path / "a.jsonl", ["short", long, "short too"])
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(long.encode()))
    with small_blocks():
        assert texts_of(tmp_path / "a.jsonl") == ["short", long, "short too"]
        assert texts_of(tmp_path / "b.txt.gz") == [long]


def truncated_parquet(path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    return path.read_bytes()[:-20]


LINES = b'{"text": "good"}\n' * 3516
BAD = [
    ("latin.txt", b"abc\ndef\xe9 g", {}, r"latin\.txt:2: not utf-8 at byte 7; --encoding names another"),
    ("wide.txt", "text".encode("utf-16"), {}, r"wide\.txt:1: begins like UTF-16"),
    ("nul.txt", b"a\nb\nc\0d", {}, r"nul\.txt:3: a NUL byte"),
    ("broken.jsonl", LINES + b'{"text": "b"\n', {}, r"broken\.jsonl:3517: not JSON"),
    ("broken.jsonl.gz", gzip.compress(LINES + b"{]\n"), {}, r"broken\.jsonl\.gz:3517: not JSON"),
    ("latin.jsonl", LINES + b'{"text": "\xe9"}\n', {}, r"latin\.jsonl:3517: not utf-8"),
    ("key.jsonl", LINES + b'{"body": "a"}\n', {}, r'key\.jsonl:3517: no text under the key "text"; --text_key'),
    ("number.jsonl", b'{"text": 3}\n', {}, r'number\.jsonl:1: under the key "text" is a number, not text'),
    ("list.jsonl", b"\n[1]\n", {}, r"list\.jsonl:2: no text under"),
    ("half.jsonl", LINES + b'{"text": "\\ud800"}\n', {}, r"half\.jsonl:3517: half a surrogate pair"),
    ("zero.jsonl", b'{"text": "\\u0000"}\n', {}, r"zero\.jsonl:1: a NUL character"),
    ("cut.jsonl.gz", gzip.compress(os.urandom(999))[:-30], {}, r"cut\.jsonl\.gz: cut short or damaged"),
    ("fake.txt.gz", b"this is not gzip", {}, r"fake\.txt\.gz: cut short or damaged"),
    ("cut.txt.zst", zstd.compress(os.urandom(999))[:-30], {}, r"cut\.txt\.zst: cut short or damaged"),
    ("fake.txt.zst", b"this is not zstd", {}, r"fake\.txt\.zst: cut short or damaged"),
    ("cut.parquet", truncated_parquet, {}, r"cut\.parquet: not a whole \.parquet file"),
    ("a.txt", b"text", {"encoding": "klingon"}, r"--encoding=klingon: no such encoding"),
    ("a.txt", b"text", {"split_documents": "--x--"}, r"begins as it ends"),
    ("a.txt", b"text", {"split_documents": ""}, r"cannot be empty"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD)
def test_bad_input_is_named_with_its_line(tmp_path: Path, name: str, content: object, options: dict, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content(path) if callable(content) else content)
    with pytest.raises(UserError, match=message):
        texts_of(path, **options)
    if name.endswith(".jsonl"):  # and by whichever worker reads that line
        with small_blocks(), pytest.raises(UserError, match=message):
            texts_of(path, **options)


def test_parquet_without_text_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": [1], "t": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text' among n, t"):
        texts_of(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'n' holds int64, not text"):
        texts_of(tmp_path / "a.parquet", text_key="n")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, message in (
        ("missing.txt", "missing.txt: no such file"),
        ("*.md", r"\*.md: no file has a name like that"),
        ("empty", "empty: a directory without files"),
        ("links", r"links: no file to read \(passed over, links to nothing: 1 \(.*gone.txt"),
        ("pipe.txt", "pipe.txt: cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            texts_of(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read"):
        texts_of(tmp_path / "a.txt")

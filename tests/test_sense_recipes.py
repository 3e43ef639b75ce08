"""data/digits.py and data/speech.py: folders of one's own, both ways; and a model that draws, in a terminal and in a pipe."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Script

from papagaio.generation.drawing import codebooks_near
from papagaio.senses import CODED, Array, PictureCodebook, SoundCodebook, load_codebook, open_picture, write_file

soundfile = pytest.importorskip("soundfile")
RATE = 8000
SETTINGS = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=64", "--sample_tokens=0", "--dtype=float32"]


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def halves() -> dict[str, Array]:
    """A picture that is white on the left, and one that is white above."""
    left, above = np.zeros((8, 8, 1), np.float32), np.zeros((8, 8, 1), np.float32)
    left[:, :4], above[:4] = 1, 1
    return {"left": left, "above": above}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two kinds, twenty of each, with captions; and a file that has none."""
    folder = tmp_path_factory.mktemp("pictures")
    pack = PictureCodebook(height=8, width=8, patch=8, vectors=[]).packed
    lines = []
    for number in range(20):
        for name, picture in halves().items():
            write_file(folder / f"{name}{number}.png", pack(picture))
            lines.append(json.dumps({"file_name": f"{name}{number}.png", "text": name}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    (folder / "notes.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def made(folder: Path, script: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the folder and, beside it, a chat model that has learned it."""
    out = tmp_path_factory.mktemp("senses") / "set"
    data = ["--out", out, "--folder", folder, "--size=8", "--patch=4", "--codes=9"]
    question = ["--init_from", out / "base", "--data", out / "qa_train.jsonl", "--keep_duplicates"]
    for argv in (
        ["data/digits.py", *data],
        ["data/prepare.py", "--input", out / "corpus.jsonl", "--out", out / "data", "--tokenizer=char", "--keep_duplicates"],
        ["train.py", "--data", out / "data", "--out_dir", out / "base", "--max_steps=60", *SETTINGS],
        ["finetune.py", *question, "--out_dir", out / "chat", "--max_steps=100", "--batch_size=8", *SETTINGS[-2:]],
    ):
        done = script(*argv)
        assert done.returncode == 0, done.stderr
        if argv[0] == "data/digits.py":
            assert "files without a caption, which are left out: 1 (notes.txt)" in done.stderr
    return out


def test_documents_and_questions_of_a_folder(made: Path) -> None:
    book = load_codebook(made / "codebook.json")
    assert len(book.vectors) == 2, "patches are black or white"
    known, *documents = [row["text"] for row in rows(made / "corpus.jsonl")]
    assert set(known) >= {*book.characters, *"What is this?\n"}
    train = rows(made / "qa_train.jsonl")
    held = [*rows(made / "qa_dev.jsonl"), *rows(made / "qa_test.jsonl")]
    assert len(train) == len(documents)
    assert len(train) + len(held) == 40
    assert not {row["source"] for row in train} & {row["source"] for row in held}
    texts = {name: book.text(picture) for name, picture in halves().items()}
    for row in [*train, *held]:
        name, codes = (row["answer"], row["question"]) if row["kind"] == "name" else (row["question"], row["answer"])
        assert texts[re.search("left|above", name)[0]] == CODED.search(codes)[0]
    assert {row["kind"] for row in train} == {"name", "make"}
    assert {row["kind"] for row in held} == {"name"}


def in_a_terminal(*argv: object) -> str:
    """What a script prints if standard output is a terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, *map(str, argv)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=follower, stderr=subprocess.PIPE, env=os.environ | {"TERM": "xterm"}
    ) as process:
        os.close(follower)
        found = b""
        while True:
            try:
                found += os.read(leader, 4096)
            except OSError:  # the terminal is closed
                break
        assert process.wait() == 0, process.stderr.read()
    os.close(leader)
    return found.decode().replace("\r\n", "\n")


def test_the_model_names_and_draws(made: Path, script: Script, tmp_path: Path) -> None:
    (book,) = codebooks_near(made / "chat")
    done = script("chat.py", "--checkpoint", made / "chat", "--questions", made / "make.jsonl")
    (tmp_path / "drawn.jsonl").write_text(done.stdout)
    for row in rows(tmp_path / "drawn.jsonl"):
        assert row["answer"] == book.text(halves()[row["caption"]]), "codes as characters in JSON"
    decode = ["--decode", tmp_path / "drawn.jsonl", "--codebook", made / "codebook.json", "--out", tmp_path / "sheet.png"]
    done = script("data/digits.py", *decode)
    assert done.returncode == 0, done.stderr
    sheet = open_picture(tmp_path / "sheet.png", 1)
    zoom = sheet.shape[1] // (2 * 9 + 1)
    above, left = ((sheet[zoom // 2 :: zoom, zoom // 2 :: zoom] > 0.5)[1:9, at : at + 8] for at in (1, 10))
    np.testing.assert_array_equal(above, halves()["above"] > 0.5)
    np.testing.assert_array_equal(left, halves()["left"] > 0.5)
    write_file(tmp_path / "left.png", book.packed(halves()["left"]))
    codes = script("data/digits.py", "--encode", tmp_path / "left.png", "--codebook", made / "codebook.json").stdout.strip()
    named = script("chat.py", "--checkpoint", made / "chat", "--ask", f"What is this?\n{codes}")
    assert named.stdout == "left\n"


def test_a_terminal_gets_blocks_and_a_pipe_gets_codes(made: Path, script: Script) -> None:
    (book,) = codebooks_near(made / "chat")
    ask = ["chat.py", "--checkpoint", made / "chat", "--ask", "Make this: above"]
    assert script(*ask).stdout == book.text(halves()["above"]) + "\n"
    shown = in_a_terminal(*ask)
    assert not CODED.search(shown)
    white, black = (f"\x1b[38;5;{grey};48;5;{grey}m▀" for grey in (255, 232))
    assert [line.count(white) for line in shown.split("\n") if "▀" in line] == [16] * 4 + [0] * 4
    assert shown.count(black) == 16 * 4
    coloured = in_a_terminal(
        "sample.py", "--checkpoint", made / "chat", "--prompt", f"{book.opening}\ue000", "--max_new_tokens=3"
    )
    assert not CODED.search(coloured)
    assert "▀" in coloured


def test_what_the_model_is_given_on_standard_input_is_decoded(made: Path, script: Script, tmp_path: Path) -> None:
    (book,) = codebooks_near(made / "chat")
    text = f"Here:\n{book.text(halves()['left'])[:3]} and no more\n"
    decode = ["--decode", "-", "--codebook", made / "codebook.json", "--out", tmp_path / "one.png"]
    done = script("data/digits.py", *decode, stdin=text)
    assert done.returncode == 0
    assert "-:2: 2 codes, and a picture has 4: the rest is black" in done.stderr
    assert (tmp_path / "one.png").exists()


@pytest.mark.parametrize(
    ("script_name", "line", "more", "message"),
    [
        ("digits", {"file_name": "none.png", "text": "a"}, [], "metadata.jsonl:1: {folder}/none.png: "),
        ("digits", {"file_name": "metadata.jsonl", "text": "a"}, [], "no picture that can be read"),
        ("digits", {"file": "a.png"}, [], "metadata.jsonl:1: a line is an object with file_name and text"),
        ("digits", {"file_name": "a", "text": " "}, [], "metadata.jsonl:1: a caption has characters"),
        ("digits", {"file_name": "a", "text": "\ue000"}, [], "metadata.jsonl:1: a caption has characters"),
        ("digits", None, [], "metadata.jsonl: no such file"),
        ("digits", None, ["--size=9", "--patch=2"], "size 9 is not divisible by patch 2"),
        ("speech", {"file_name": "stereo.wav", "text": "a"}, [f"--rate={RATE}"], "stereo.wav: 2 channels, and one is needed"),
        ("speech", {"file_name": "stereo.wav", "text": "a"}, [], "stereo.wav: 8,000 samples a second, and 22,050 are needed"),
        ("speech", {"file_name": "empty.wav", "text": "a"}, [f"--rate={RATE}"], "empty.wav: empty, without a sample"),
    ],
)
def test_a_folder_with_a_mistake(
    script_name: str, line: dict[str, str] | None, more: list[str], message: str, script: Script, tmp_path: Path
) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    soundfile.write(folder / "stereo.wav", np.full((RATE, 2), 0.1), RATE)
    soundfile.write(folder / "empty.wav", np.zeros(0), RATE)
    if line:
        (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    done = script(f"data/{script_name}.py", "--folder", folder, "--out", out, *more)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message.format(folder=folder) in last
    assert not out.exists()


def test_sounds_of_ones_own_both_ways(script: Script, made: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "sounds", tmp_path / "out"
    folder.mkdir()
    lines = []
    for number in range(30):
        pitch = 300 * (1 + number % 2)
        tone = 0.4 * np.sin(2 * np.pi * pitch * np.arange(RATE // 4) / RATE)
        soundfile.write(folder / f"{number}.wav", tone, RATE)
        lines.append(json.dumps({"file_name": f"{number}.wav", "text": ["low", "high"][number % 2]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    done = script("data/speech.py", "--folder", folder, "--out", out, f"--rate={RATE}", "--codes=8")
    assert done.returncode == 0, done.stderr
    book = load_codebook(out / "codebook.json")
    assert isinstance(book, SoundCodebook)
    codes = script("data/speech.py", "--encode", folder / "0.wav", folder / "1.wav", "--codebook", out / "codebook.json").stdout
    (tmp_path / "codes.txt").write_text(codes)
    decode = ["--decode", tmp_path / "codes.txt", "--codebook", out / "codebook.json"]
    done = script("data/speech.py", *decode, "--out", tmp_path / "wavs")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "wavs").iterdir()) == ["001.png", "001.wav", "002.png", "002.wav"]
    low, high = (np.abs(np.fft.rfft(book.read(tmp_path / "wavs" / f"00{i}.wav"))).argmax() for i in (1, 2))
    assert high / low == pytest.approx(2, rel=0.2)
    done = script("data/speech.py", *decode, "--out", tmp_path / "wavs")
    assert (done.returncode, "is there already" in done.stderr) == (2, True)
    done = script("data/digits.py", *decode, "--out", tmp_path / "sheet.png")
    assert (done.returncode, "the codebook is of sounds" in done.stderr) == (2, True)
    done = script("data/digits.py", *decode[:2], "--codebook", made / "codebook.json", "--out", tmp_path / "sheet.png")
    assert done.returncode == 2
    assert "codes.txt:1: the codes are of another codebook" in done.stderr
    assert not (tmp_path / "sheet.png").exists()


def test_without_espeak_one_line_says_so(script: Script, tmp_path: Path) -> None:
    done = script("data/speech.py", "--out", tmp_path / "out", env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.startswith("error: espeak-ng is not installed: apt-get install espeak-ng")
    assert len(done.stderr.splitlines()) == 1


def test_numbers_are_spelled() -> None:
    from data.speech import spelled

    assert [spelled(number, "en") for number in (0, 13, 20, 42, 99)] == ["zero", "thirteen", "twenty", "forty-two", "ninety-nine"]
    assert [spelled(number, "pt") for number in (1, 16, 30, 42)] == ["um", "dezesseis", "trinta", "quarenta e dois"]
    assert len({spelled(number, language) for number in range(100) for language in ("en", "pt")}) == 199, "zero is in both"


def test_no_voice_of_a_test_is_trained_on() -> None:
    from data.speech import DEV_VOICES, TEST_VOICES, TRAIN_VOICES

    assert len({*TRAIN_VOICES, *DEV_VOICES, *TEST_VOICES}) == len(TRAIN_VOICES) + len(DEV_VOICES) + len(TEST_VOICES)

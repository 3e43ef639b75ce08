"""Pictures and sounds as characters, and back (papagaio/senses.py, papagaio/generation/drawing.py)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from papagaio.errors import UserError
from papagaio.generation.drawing import Drawing, codebooks_near
from papagaio.senses import (
    Array,
    PictureCodebook,
    SoundCodebook,
    decode,
    encode,
    learn,
    load_codebook,
    open_picture,
    save_codebook,
    write_file,
)
from papagaio.tokenizer import CharTokenizer

RATE = 8000


def pictures() -> list[Array]:
    """Twenty pictures of 4 x 6 pixels with two levels of grey."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 2, (4, 6, 1)).astype(np.float32) for _ in range(20)]


@pytest.fixture(scope="module")
def book() -> PictureCodebook:
    """Every patch of two pixels by two that there is has a code of its own."""
    return learn(PictureCodebook(height=4, width=6, patch=2, vectors=[]), pictures(), 16, 0)


def tone(frequency: float, seconds: float = 0.5) -> Array:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(RATE * seconds)) / RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def sounds() -> SoundCodebook:
    empty = SoundCodebook(rate=RATE, window=512, hop=128, bands=20, frames=2, vectors=[])
    return learn(empty, [tone(frequency) for frequency in (300, 600, 1200, 2400)], 16, 0)


def test_each_code_is_a_character_and_a_token(book: PictureCodebook) -> None:
    text = book.text(pictures()[3])
    assert len(text) == 1 + 6
    assert all(0xE000 <= ord(code) < 0xE010 for code in text[1:])
    tokenizer = CharTokenizer(book.characters)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == 7


def test_a_picture_comes_back_from_its_codes(book: PictureCodebook, tmp_path: Path) -> None:
    for number, picture in enumerate(pictures()):
        write_file(tmp_path / f"{number}.png", book.packed(picture))
        text = encode(tmp_path / f"{number}.png", book)
        assert text == book.text(picture)
        decode(f"It is {text}.", book, tmp_path / "again.png")
        np.testing.assert_allclose(open_picture(tmp_path / "again.png", 1), picture, atol=0.01)


def test_colours_come_back_too() -> None:
    picture = np.eye(3, dtype=np.float32)[np.arange(16).reshape(4, 4) % 3]  # red, green and blue
    book = learn(PictureCodebook(height=4, width=4, channels=3, patch=1, vectors=[]), [picture], 3, 0)
    np.testing.assert_allclose(book.join(book.found(book.text(picture))), picture, atol=0.001)


def test_codes_rise_with_brightness(book: PictureCodebook) -> None:
    black, white = np.zeros((4, 6, 1), np.float32), np.ones((4, 6, 1), np.float32)
    assert book.text(black)[1:] == "\ue000" * 6
    assert book.text(white)[1:] == chr(0xE000 + len(book.vectors) - 1) * 6


def test_a_tone_comes_back_with_its_pitch(sounds: SoundCodebook, tmp_path: Path) -> None:
    for frequency in (300, 1200):
        write_file(tmp_path / "tone.wav", sounds.packed(tone(frequency)))
        decode(encode(tmp_path / "tone.wav", sounds), sounds, tmp_path / "again.wav")
        found = sounds.read(tmp_path / "again.wav")
        assert len(found) == pytest.approx(RATE / 2, abs=2 * 128 * 2)
        loudest = np.abs(np.fft.rfft(found)).argmax() * RATE / len(found)
        assert loudest == pytest.approx(frequency, rel=0.15)


def test_a_codebook_is_a_file_that_shows_its_damage(book: PictureCodebook, sounds: SoundCodebook, tmp_path: Path) -> None:
    path = tmp_path / "codebook.json"
    for each in (book, sounds):
        save_codebook(each, path)
        again = load_codebook(path)
        assert again == each
        assert again.opening == each.opening
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"bands": 20', '"bands": 21'), encoding="utf-8")
    with pytest.raises(UserError, match="changed or cut short"):
        load_codebook(path)
    path.write_text('{"kind": "smell"}', encoding="utf-8")
    with pytest.raises(UserError, match="not a codebook"):
        load_codebook(path)
    with pytest.raises(UserError, match="No such file"):
        load_codebook(tmp_path / "none.json")


def test_the_opening_names_the_codebook(book: PictureCodebook) -> None:
    other = book.model_copy(update={"vectors": book.vectors[:-1]})
    assert PictureCodebook(**other.model_dump()).opening != book.opening
    with pytest.raises(UserError, match="another codebook"):
        book.found(chr(ord(book.opening) + 1) + "\ue001")
    with pytest.raises(UserError, match="code 16 of another codebook: this one has 16"):
        book.found(book.opening + "\ue010")
    with pytest.raises(UserError, match="no codes"):
        book.found(f"nothing{book.opening}")


def test_what_is_no_picture_of_this_size_is_refused(book: PictureCodebook, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    for content in (b"", b"GIF89a", b"hello"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(f"{path}: ")):
            encode(path, book)
    with pytest.raises(UserError, match="No such file"):
        encode(tmp_path / "none.png", book)
    write_file(path, book.packed(np.zeros((6, 4, 1), np.float32)))
    with pytest.raises(UserError, match="4 x 6 pixels; the codebook is of pictures of 6 x 4"):
        encode(path, book)


def test_what_is_no_sound_of_this_rate_is_refused(sounds: SoundCodebook, tmp_path: Path) -> None:
    import soundfile

    path = tmp_path / "sound.wav"
    for content, rate, message in [
        (tone(300), 44100, "44,100 samples a second, and 8,000 are needed"),
        (np.stack([tone(300)] * 2, 1), RATE, "2 channels"),
        (np.zeros(0), RATE, "empty"),
        (np.zeros(99), RATE, "silence"),
    ]:
        soundfile.write(path, content, rate)
        with pytest.raises(UserError, match=message):
            encode(path, sounds)
    path.write_bytes(b"RIFF")
    with pytest.raises(UserError, match="no sound that can be read"):
        encode(path, sounds)


def test_a_picture_cut_short_is_shown_as_far_as_it_goes(book: PictureCodebook) -> None:
    white = book.text(np.ones((4, 6, 1), np.float32))
    shown = book.join(book.found(white[:4]))
    assert shown[:2].min() > 0.99
    assert shown[2:].max() == 0
    assert book.remark(6) == ""
    assert "3 codes, and a picture has 6: the rest is black" in book.remark(3)
    assert "left out" in book.remark(7)


@pytest.fixture
def run(book: PictureCodebook, tmp_path: Path) -> Path:
    """A run beside the codebook of its dataset."""
    save_codebook(book, tmp_path / "codebook.json")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-9"
    checkpoint.mkdir(parents=True)
    return checkpoint


def test_a_codebook_is_found_from_a_run_and_from_its_checkpoints(run: Path, book: PictureCodebook) -> None:
    assert codebooks_near(run) == codebooks_near(run.parents[1]) == [book]
    assert codebooks_near(run / "too" / "deep") == []


def test_a_terminal_shows_a_picture_when_it_is_complete(run: Path, book: PictureCodebook) -> None:
    text = book.text(np.concatenate([np.ones((2, 6, 1)), np.zeros((2, 6, 1))]).astype(np.float32))
    drawing = Drawing(run, colour=False)
    pieces = [drawing.push(character) for character in f"a{text}b"]
    assert pieces[0] == "a"
    assert pieces[1:7] == [""] * 6, "held back"
    assert pieces[7] == "\n" + ("█" * 12 + "\n") * 2 + (" " * 12 + "\n") * 2
    assert pieces[8] == "b"
    assert drawing.close() == ""
    assert "\x1b[38;5;255;48;5;255m▀" in Drawing(run, colour=True).push(text)


def test_a_terminal_shows_what_was_cut_short_and_says_so(run: Path, book: PictureCodebook) -> None:
    drawing = Drawing(run, colour=False)
    assert drawing.push(book.text(pictures()[0])[:4]) == ""
    assert "(3 codes, and a picture has 6: the rest is black)" in drawing.close()
    assert drawing.push("\U000f0123\ue001") == ""
    assert drawing.close() == "[1 codes: their codebook.json is not beside the model]"


def test_a_sound_is_a_row_of_bars(sounds: SoundCodebook) -> None:
    ordered = sounds.table  # from quiet to loud
    shown = sounds.drawn(ordered, colour=False)
    seconds = len(ordered) * 2 * 128 / RATE
    bars = re.fullmatch(f"♪ ([▁▂▃▄▅▆▇█]+) {seconds:.1f} s", shown)[1]
    assert len(bars) == len(ordered)
    assert bars[0] == "▁"
    assert bars[-1] == "█"
    assert list(bars) == sorted(bars)


@pytest.mark.parametrize("text", ["plain", "an apple \uf8ff", "an icon \U000f0001 alone", "\uf8ff\U000f0001"])
def test_text_without_codes_passes_as_it_is(text: str, tmp_path: Path) -> None:
    for drawing in (Drawing(tmp_path, True), Drawing(None, True)):
        assert "".join(drawing.push(character) for character in text) + drawing.close() == text
        assert drawing.marked(text) == text


def test_without_a_terminal_codes_stay_codes(book: PictureCodebook) -> None:
    text = book.text(pictures()[0])
    assert Drawing(None, False).push(text) == text


def test_json_of_a_codebook_is_readable(book: PictureCodebook, tmp_path: Path) -> None:
    save_codebook(book, tmp_path / "codebook.json")
    content = json.loads((tmp_path / "codebook.json").read_text(encoding="utf-8"))
    assert content["kind"] == "picture"
    assert len(content["vectors"]) == 16
    assert content["vectors"][0].split() == ["0", "0", "0", "0"]

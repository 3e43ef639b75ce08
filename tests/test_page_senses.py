"""The page and the server with pictures and sounds: codes are drawn and played, never shown as characters without a glyph."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("httpx")
pytest.importorskip("soundfile")
pytest.importorskip("playwright.sync_api")
from test_page import CHROMIUM, ask, browser, expect, opened, violations  # noqa: F401
from test_serve import Running, Start, start  # noqa: F401

from papagaio.senses import Codebook, PictureCodebook, SoundCodebook, learn, save_codebook

PICTURE = np.eye(8, dtype=np.float32)[..., None]
RATE = 8000
SOUND = (0.5 * np.sin(np.arange(RATE // 8))).astype(np.float32)


@pytest.fixture(scope="module")
def books() -> list[Codebook]:
    pictures = PictureCodebook(height=8, width=8, patch=4, vectors=[])
    sounds = SoundCodebook(rate=RATE, window=512, hop=128, bands=20, frames=2, vectors=[])
    return [learn(pictures, [PICTURE], 2, 0), learn(sounds, [SOUND], 4, 0)]


@pytest.fixture(scope="module")
def server(world: Path, start: Start, books: list[Codebook], tmp_path_factory: pytest.TempPathFactory) -> Running:  # noqa: F811
    """A chat model with two codebooks in the directory of its run."""
    home = tmp_path_factory.mktemp("senses") / "chat"
    shutil.copytree(world / "chat", home)
    for number, book in enumerate(books):
        save_codebook(book, home / f"codebook{number}.json")
    return start(home)


def decode(server: Running, text: str) -> Any:
    return server.http.post("/decode", json={"model": "chat", "text": text})


def test_the_server_makes_files_of_codes(server: Running, books: list[Codebook]) -> None:
    import soundfile
    from PIL import Image

    pictures, sounds = books
    answer = decode(server, f"Look: {pictures.text(PICTURE)}!")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-remark"] == ""
    found = np.asarray(Image.open(io.BytesIO(answer.content)), np.float32) / 255
    np.testing.assert_allclose(found, PICTURE[..., 0], atol=0.01)
    assert "a picture has 4: the rest is black" in decode(server, pictures.text(PICTURE)[:-1]).headers["x-remark"]
    answer = decode(server, sounds.text(SOUND))
    assert answer.headers["content-type"] == "audio/wav"
    found, rate = soundfile.read(io.BytesIO(answer.content))
    assert (rate, len(found)) == (RATE, pytest.approx(len(SOUND), abs=512))
    assert decode(server, "no codes").status_code == 404
    assert decode(server, pictures.opening).status_code == 400
    assert decode(server, pictures.opening + "\ue100").status_code == 400
    assert server.http.get("/v1/models").json()["data"][0]["codes"] is True


@pytest.mark.skipif(CHROMIUM is None, reason="needs the system's chromium")
def test_the_page_draws_and_plays(browser: Any, server: Running, books: list[Codebook]) -> None:  # noqa: F811
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for page in opened(browser, server, bypass_csp=False):
        ask(page, f"Which digit is this?\n{books[0].text(PICTURE)}")
        picture = page.locator("article.user figure img")
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [8, 8]
        expect(page.locator("article.user .text")).to_contain_text("Which digit is this?\n[picture or sound]")
        page.get_by_role("button", name="New conversation").click()
        ask(page, f"What was said? {books[1].text(SOUND)}")
        sound = page.locator("article.user figure audio")
        expect(sound).to_be_visible()
        loaded = "audio => new Promise(done => audio.duration ? done() : audio.addEventListener('loadedmetadata', () => done()))"
        sound.evaluate(loaded)
        assert sound.evaluate("audio => audio.duration") == pytest.approx(0.125, abs=0.06)
        assert not any("\ue000" <= character <= "\uf8ff" for character in page.locator("body").inner_text())
    for page in opened(browser, server, bypass_csp=True):
        ask(page, f"{books[0].text(PICTURE)}{books[1].text(SOUND)}")
        expect(page.locator("figure > *")).to_have_count(2)
        assert violations(axe, page) == []

"""The page in a real browser: Chromium, headless, driven by Playwright. Skips where the system has none."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("httpx")
sync_api = pytest.importorskip("playwright.sync_api")
from test_serve import QUESTIONS, Running, Start, start  # noqa: E402, F401

expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the system's chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=root)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(world: Path, start: Start) -> Running:  # noqa: F811
    return start(world / "chat", f"--feedback={world / 'page.jsonl'}")


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    yield from opened(browser, server)


def opened(browser: Any, server: Running, **options: Any) -> Iterator[Any]:
    """A page of a browser that knows nothing yet. No error may be on its console, and nothing may come from elsewhere."""
    context = browser.new_context(**options)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((server.url, "blob:")) else problems.append(request.url))
    page.goto(server.url)
    expect(page.locator("#model")).to_contain_text("context of 64 tokens")
    yield page
    context.close()
    assert problems == []


def ask(page: Any, text: str) -> None:
    page.get_by_label("Your question").fill(text)
    page.keyboard.press("Enter")
    finished(page)


def finished(page: Any) -> None:
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#log")).not_to_have_attribute("aria-busy", "true")


def answers(page: Any) -> list[str]:
    return page.locator("article.assistant .text .hidden-text").all_text_contents()


def setting(page: Any, name: str, value: str) -> None:
    page.locator(f"#{name}").fill(value)


def test_send_and_reload_and_it_is_still_there(page: Any, server: Running) -> None:
    setting(page, "temperature", "0")
    ask(page, QUESTIONS[0])
    assert answers(page) == [server.ask(QUESTIONS[0]).choices[0].message.content]
    assert "".join(page.locator(".token").all_text_contents()) == answers(page)[0]
    ask(page, QUESTIONS[1])
    before = answers(page)
    page.reload()
    expect(page.locator("article.assistant")).to_have_count(2)
    assert answers(page) == before
    assert page.locator("#temperature").input_value() == "0"


def test_several_conversations_new_and_delete(page: Any) -> None:
    ask(page, QUESTIONS[0])
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    ask(page, QUESTIONS[1])
    expect(page.locator("#conversations li")).to_have_count(2)
    page.locator("#conversations button", has_text=QUESTIONS[0]).click()
    expect(page.locator("article.user .text")).to_have_text(QUESTIONS[0])
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#conversations li")).to_have_count(1)
    expect(page.locator("article.user .text")).to_have_text(QUESTIONS[1])


def test_an_answer_streams_and_can_be_stopped(page: Any) -> None:
    """The stream stays open after two tokens, so that it is stopped in the middle."""
    token = {"token": "re", "bytes": [114, 101], "id": 1, "logprob": -0.5, "top_logprobs": []}
    event = {"choices": [{"delta": {"content": "re"}, "logprobs": {"content": [token]}, "finish_reason": None}], "usage": None}
    page.add_init_script(
        """const real = window.fetch;
        window.fetch = (path, options) => path !== "v1/chat/completions" ? real(path, options) : Promise.resolve(new Response(
            new ReadableStream({ start(out) {
                for (let i = 0; i < 2; i++) out.enqueue(new TextEncoder().encode('data: EVENT\\n\\n'));
                options.signal.addEventListener("abort", () => out.error(options.signal.reason));
            } })));""".replace("EVENT", json.dumps(event))
    )
    page.reload()
    expect(page.locator("#model")).to_contain_text("context")
    page.get_by_label("Your question").fill("x")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".token")).to_have_count(2)
    expect(page.locator("#log")).to_have_attribute("aria-busy", "true")
    page.get_by_role("button", name="Stop").click()
    finished(page)
    expect(page.locator("#status")).to_contain_text("Stopped.")
    assert answers(page) == ["rere"]
    page.get_by_label("Your question").fill("y")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    finished(page)
    assert answers(page) == ["rere", "rere"]


def test_retry_and_edit(page: Any) -> None:
    setting(page, "temperature", "2")
    ask(page, "zxq")
    seen = set()
    for _ in range(6):
        seen.add(answers(page)[0] if answers(page) else "")
        page.get_by_role("button", name="Retry").click()
        finished(page)
    assert len(seen) > 1
    ask(page, QUESTIONS[2])
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edited question").fill(QUESTIONS[3])
    page.keyboard.press("Enter")
    finished(page)
    expect(page.locator("article.user .text")).to_have_text([QUESTIONS[3]])
    expect(page.locator("article.assistant")).to_have_count(1)


def test_a_click_on_a_token_shows_what_else_was_probable_and_continues_from_there(page: Any) -> None:
    setting(page, "temperature", "0")
    ask(page, QUESTIONS[4])
    first = page.locator(".token").first
    expect(first).to_have_attribute(
        "aria-label", page.locator(".token").first.text_content() + ", " + first.get_attribute("title")
    )
    first.click()
    choices = page.locator("#alternatives button")
    expect(choices).to_have_count(10)
    assert [float(bar.evaluate("bar => bar.value")) for bar in page.locator("#alternatives meter").all()] == sorted(
        (float(bar.evaluate("bar => bar.value")) for bar in page.locator("#alternatives meter").all()), reverse=True
    )
    other = choices.nth(1).locator("code").text_content()
    choices.nth(1).click()
    finished(page)
    expect(page.locator(".token").first).to_have_text(other)
    assert answers(page)[0].startswith(other)


def test_ratings_and_preferences_are_kept_for_training(page: Any, world: Path) -> None:
    setting(page, "temperature", "2")
    ask(page, "zxq")
    page.get_by_role("button", name="Good").click()
    expect(page.get_by_role("button", name="Good")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Bad").click()
    expect(page.get_by_role("button", name="Bad")).to_have_attribute("aria-pressed", "true")
    rows = [json.loads(line) for line in (world / "page.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [True, False]
    assert rows[0]["messages"][0] == {"role": "user", "content": "zxq"}
    for _ in range(9):
        page.get_by_role("button", name="Compare").click()
        finished(page)
        if page.get_by_role("button", name="Answer 2 is better").count():
            break
    better = page.locator(".pair .text").nth(1).text_content()
    page.get_by_role("button", name="Answer 2 is better").click()
    expect(page.locator("#status")).to_contain_text("Kept for training.")
    (row,) = [json.loads(line) for line in (world / "page.preferences.jsonl").read_text().splitlines()]
    assert row["chosen"] == better != row["rejected"]
    expect(page.locator("article.assistant .hidden-text")).to_have_text(better)


def test_a_conversation_is_exported_as_a_json_line(page: Any, tmp_path: Path) -> None:
    from papagaio.batches.questions import read_examples

    page.locator("#system").fill("Be brief.")
    page.locator("#system").blur()
    ask(page, QUESTIONS[5])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "x.jsonl")
    (row,) = read_examples(tmp_path / "x.jsonl")
    assert [message.role for message in row.messages] == ["system", "user", "assistant"]
    assert row.answer == answers(page)[0]


def test_script_tags_are_text(page: Any) -> None:
    bad = "<script>document.title='bad'</script><img src=x onerror=\"document.title='bad'\">"
    event = {"choices": [{"delta": {"content": bad}, "logprobs": None, "finish_reason": "stop"}], "usage": None}
    body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, bad)
    expect(page.locator("article .text")).to_have_text([bad, bad])
    assert page.locator("main script, main img").count() == 0
    page.reload()
    expect(page.locator("article .text")).to_have_text([bad, bad])
    assert "papagaio" in page.title()


def test_by_keyboard_alone(page: Any) -> None:
    setting(page, "temperature", "0")
    page.locator("#question").focus()
    page.keyboard.type(QUESTIONS[6])
    page.keyboard.press("Enter")
    finished(page)
    for _ in range(20):  # back to the first token
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.classList.contains('token')"):
            break
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.index") == "1"
    page.keyboard.press("Enter")
    expect(page.locator("#inspector")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#inspector")).to_be_hidden()
    assert page.evaluate("document.activeElement.dataset.index") == "1"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#inspector")).to_be_hidden()
    finished(page)
    expect(page.locator("article.assistant")).to_have_count(1)


def test_an_error_of_the_server_is_shown_and_the_question_can_be_sent_again(page: Any) -> None:
    body = 'data: {"error": {"message": "no room", "code": null}}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "x")
    expect(page.locator("#status")).to_have_text("Error: no room")
    page.unroute("**/v1/chat/completions")
    ask(page, QUESTIONS[0])
    expect(page.locator("article.user")).to_have_count(1)


def test_the_notebook_of_a_base_model(browser: Any, world: Path, start: Start) -> None:  # noqa: F811
    server = start(world / "base")
    for page in opened(browser, server):
        setting(page, "temperature", "0")
        setting(page, "max_tokens", "6")
        page.get_by_label("Text to continue").fill("The flag")
        page.get_by_role("button", name="Continue", exact=True).click()
        finished(page)
        expected = server.client.completions.create(model="base", prompt="The flag", temperature=0, max_tokens=6).choices[0].text
        assert answers(page) == [expected]
        page.get_by_role("button", name="Continue", exact=True).first.click()
        finished(page)
        assert answers(page)[0].startswith(expected)
        assert len(answers(page)[0]) > len(expected)


def test_a_key_is_asked_for(browser: Any, world: Path, start: Start) -> None:  # noqa: F811
    server = start(world / "chat", env={"PAPAGAIO_API_KEY": "sesame"})
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#status")).to_contain_text("asks for an API key")
    page.get_by_label("API key").fill("sesame")
    page.get_by_label("API key").blur()
    expect(page.locator("#model")).to_contain_text("context")
    ask(page, QUESTIONS[0])
    assert len(answers(page)) == 1
    context.close()


OTHERS = [pytest.param(*values, marks=pytest.mark.slow) for values in ((360, "light"), (1200, "dark"))]


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark"), *OTHERS])
def test_axe_finds_no_violations(browser: Any, server: Running, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 700}, "bypass_csp": True}
    for page in opened(browser, server, **options):
        setting_text = page.locator("#temperature")
        setting_text.evaluate("box => { box.value = 2; box.dispatchEvent(new Event('input')); }")
        ask(page, QUESTIONS[0])
        assert violations(axe, page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.locator(".token").first.click()
        assert violations(axe, page) == []
        page.keyboard.press("Escape")
        if width < 800:
            page.get_by_role("button", name="Menu").click()
            expect(page.locator("#side")).to_be_visible()
            assert violations(axe, page) == []


def violations(axe: Any, page: Any) -> list[str]:
    found = axe.run(page).response["violations"]
    return [f"{each['id']}: {node['html']}: {node['failureSummary']}" for each in found for node in each["nodes"]]

"""The live page in a browser: against a server without a model, and where ``base_url`` says."""

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from support.mock_stats import FakeEngine

sync_api = pytest.importorskip("playwright.sync_api")
mock_server = pytest.importorskip("support.mock_server")  # needs fastapi and uvicorn

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
KEY = "a-key"
expect = sync_api.expect
WIDE, NARROW = {"width": 1300, "height": 850}, {"width": 380, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def mock() -> Any:
    return mock_server.build_app(FakeEngine())


@pytest.fixture
def mock_url(mock: Any) -> Iterator[str]:
    with mock_server.served(mock) as url:
        yield url


@pytest.fixture
def base_url(request: pytest.FixtureRequest) -> str:
    """A server's address; MOE_INFINITY_PAGE_URL names a real one, without a key."""
    return os.environ.get("MOE_INFINITY_PAGE_URL") or str(request.getfixturevalue("mock_url"))


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens the page at an address; at the end nothing may have gone wrong or elsewhere."""
    troubles: list[str] = []
    contexts = []

    def open_at(url: str, viewport: dict[str, int] = WIDE, **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: _note(troubles, message))
        page.on(
            "request", lambda request: request.url.startswith(url) or troubles.append(request.url)
        )
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert troubles == []


def _note(troubles: list[str], message: Any) -> None:
    # The browser reports every HTTP status that is no success, and every lost connection.
    if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
        troubles.append(message.text)


def ask(page: Any, text: str) -> Any:
    """Types a message and sends it; the answer's article."""
    before = page.locator(".it").count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    return page.locator(".it").nth(before)


def done(answer: Any) -> None:
    expect(answer).not_to_have_class(re.compile("live"), timeout=60_000)


def pixels(page: Any) -> str:
    return str(page.evaluate("() => document.getElementById('heat').toDataURL()"))


def test_an_answer_streams_into_the_page(opened: Any, base_url: str) -> None:
    page = opened(base_url)
    answer = ask(page, "What is a mixture of experts?")
    expect(answer.locator(".text")).not_to_be_empty(timeout=60_000)
    done(answer)
    expect(answer.locator(".meta")).to_contain_text("tok/s")
    expect(answer.locator(".meta")).to_contain_text("first token")
    expect(page.locator("#status")).to_contain_text("Answer complete")
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator(".you")).to_have_text("YouWhat is a mixture of experts?")


def test_the_map_moves_with_the_tokens(opened: Any, base_url: str) -> None:
    page = opened(base_url)
    expect(page.locator("#legend")).to_contain_text("in RAM")
    before = pixels(page)
    done(ask(page, "Count to twenty."))
    expect(page.locator("#state")).to_contain_text("idle", timeout=10_000)
    assert pixels(page) != before
    expect(page.locator(".tile").first.locator(".path")).to_have_attribute("d", re.compile("M"))


def test_stop_ends_the_answer(opened: Any, base_url: str) -> None:
    page = opened(base_url)
    answer = ask(page, "Tell me a long story.")
    expect(answer.locator(".meta")).to_contain_text("tokens", timeout=60_000)
    page.click("#send")  # which says Stop by now
    done(answer)
    expect(answer.locator(".meta")).to_contain_text("stopped")
    expect(page.locator("#state")).to_contain_text("idle", timeout=10_000)


def test_the_keyboard_is_enough(opened: Any, base_url: str) -> None:
    page = opened(base_url)
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("A long story")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("of two lines")
    page.keyboard.press("Enter")
    expect(page.locator(".you")).to_contain_text("A long story\nof two lines", use_inner_text=True)
    answer = page.locator(".it")
    expect(answer.locator(".meta")).to_contain_text("tokens", timeout=60_000)
    page.keyboard.press("Escape")
    done(answer)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id") == "plot":
            break
    expect(page.locator("#cell")).to_contain_text("Layer 0, expert 0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#cell")).to_contain_text("Layer 1, expert 1")
    expect(page.locator("#tip")).to_be_visible()


def test_a_new_conversation_forgets(opened: Any, base_url: str) -> None:
    page = opened(base_url)
    done(ask(page, "Hello."))
    page.click("#new")
    expect(page.locator(".it")).to_have_count(0)
    expect(page.locator("#text")).to_be_focused()
    with page.expect_request("**/v1/chat/completions") as sent:
        done(ask(page, "Again."))
    assert [message["content"] for message in sent.value.post_data_json["messages"]] == ["Again."]


def test_what_was_said_is_sent_along_with_the_settings(opened: Any, base_url: str) -> None:
    page = opened(base_url)
    done(ask(page, "Hello."))
    page.fill("#temperature", "0")
    page.fill("#tokens", "9")
    with page.expect_request("**/v1/chat/completions") as sent:
        done(ask(page, "And now?"))
    body = sent.value.post_data_json
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0, 9, True)


@pytest.mark.parametrize("shape", [(8, 32), (48, 128), (94, 160)])
def test_a_narrow_screen_has_one_column(opened: Any, shape: tuple[int, int]) -> None:
    with mock_server.served(mock_server.build_app(FakeEngine(*shape, device=True))) as url:
        page = opened(url, NARROW)
        expect(page.locator("#legend")).to_contain_text("in VRAM")
        done(ask(page, "hello " * 30))
        width = "() => [document.documentElement.scrollWidth, innerWidth]"
        assert page.evaluate(width) == [NARROW["width"]] * 2
        canvas = page.locator("#heat").bounding_box()
        assert canvas["x"] + canvas["width"] <= NARROW["width"]


def test_a_models_text_is_never_markup(opened: Any, mock_url: str) -> None:
    page = opened(mock_url)
    answer = ask(page, "What is a mixture of experts?")
    done(answer)
    text = answer.locator(".text")
    expect(text).to_contain_text("<b>they need not be in memory</b>")
    expect(text.locator("b")).to_have_count(0)
    expect(text.locator("strong")).to_have_text("many small ones")
    code = mock_server.ANSWER.split("```python\n")[1].split("\n```")[0]
    assert text.locator("pre").text_content().strip() == code
    fold = answer.locator("details")
    assert fold.get_attribute("open") is None
    fold.locator("summary").press("Enter")
    expect(fold.locator("div")).to_contain_text("A direct answer with one example")


def test_a_prompts_progress_is_shown(opened: Any, mock_url: str, mock: Any) -> None:
    page = opened(mock_url)
    answer = ask(page, "hold")
    expect(answer.locator(".read")).to_contain_text("60 of 120 tokens, 20 kept from before")
    expect(page.locator("#state")).to_contain_text("reading the prompt, 60 of 120")
    mock.state.go.set()
    done(answer)
    expect(answer.locator(".read")).to_be_hidden()


def test_the_server_hears_of_a_stop(opened: Any, mock_url: str, mock: Any) -> None:
    page = opened(mock_url)
    answer = ask(page, "hold")
    expect(answer.locator(".read")).to_contain_text("60 of 120")
    page.keyboard.press("Escape")
    done(answer)
    expect(page.locator("#state")).to_contain_text("idle")
    assert mock.state.stopped == 1


def test_errors_are_told_and_may_be_tried_again(opened: Any, mock_url: str, mock: Any) -> None:
    page = opened(mock_url)
    answer = ask(page, "refuse")
    expect(answer.locator(".wrong")).to_contain_text("expected something else")
    answer = ask(page, "mid-error")
    expect(answer.locator(".wrong")).to_contain_text("the disk failed")
    expect(answer.locator(".text")).to_contain_text("A mixture of experts")
    with page.expect_request("**/v1/chat/completions") as sent:
        answer.get_by_role("button", name="Try again").click()
    assert len(sent.value.post_data_json["messages"]) == 1  # failed turns are left out
    expect(page.locator(".wrong")).to_have_count(2)


def test_a_key_is_asked_for_and_kept(opened: Any) -> None:
    with mock_server.served(mock_server.build_app(FakeEngine(), key=KEY)) as url:
        page = opened(url)
        page.press("#key", "Escape")
        expect(page.locator("#state")).to_contain_text("locked")
        page.press("#state", "Enter")
        page.fill("#key", "a wrong one")
        page.press("#key", "Enter")
        expect(page.locator("#lock-bad")).to_be_visible()
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        expect(page.locator("#lock")).to_be_hidden()
        done(ask(page, "Hello."))
        page.reload()
        expect(page.locator("#state")).to_contain_text("idle")
        expect(page.locator("#lock")).to_be_hidden()
        assert page.evaluate("() => Object.values(sessionStorage)") == [KEY]


def test_a_message_waits_for_the_key(opened: Any) -> None:
    with mock_server.served(mock_server.build_app(FakeEngine(), key=KEY)) as url:
        page = opened(url)
        page.press("#key", "Escape")
        answer = ask(page, "Hello.")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        done(answer)
        expect(answer.locator(".meta")).to_contain_text("tok/s")


def test_a_hidden_tab_asks_nothing(opened: Any, mock_url: str, mock: Any) -> None:
    page = opened(mock_url)
    ask(page, "hold")
    expect(page.locator("#state")).to_contain_text("reading the prompt, 60")
    page.evaluate("""() => {
      Object.defineProperty(document, 'hidden', {get: () => window.isAway, configurable: true})
      window.isAway = true
      document.dispatchEvent(new Event('visibilitychange'))
    }""")
    page.wait_for_timeout(500)  # what was under way
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1000)  # four times the interval
    assert asked == []
    with page.expect_request("**/v1/stats*"):
        page.evaluate(
            "() => { window.isAway = false; document.dispatchEvent(new Event('visibilitychange')) }"
        )
    mock.state.go.set()


def test_a_lost_server_is_told_of(opened: Any) -> None:
    with mock_server.served(mock_server.build_app(FakeEngine())) as url:
        page = opened(url)
        expect(page.locator("#state")).to_contain_text("idle")
    expect(page.locator("#state")).to_contain_text("no connection")
    expect(ask(page, "Hello.").locator(".wrong")).to_contain_text("connection")


def test_faults_and_loss_are_shown(opened: Any) -> None:
    engine = FakeEngine()
    engine.faults, engine.lossy = ["prefetch failed"], ["experts in 4 bits"]
    with mock_server.served(mock_server.build_app(engine)) as url:
        notes = opened(url).locator("#notes")
        expect(notes).to_contain_text("Not bit-exact: experts in 4 bits")
        expect(notes).to_contain_text("prefetch failed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_until_chosen(opened: Any, base_url: str, scheme: Any) -> None:
    page = opened(base_url, color_scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.evaluate("() => document.documentElement.dataset.theme") == scheme
    page.click("#theme")
    page.reload()
    assert page.evaluate("() => document.documentElement.dataset.theme") == other

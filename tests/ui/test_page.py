# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, against a real server: what a visitor sees, and what the server does when one leaves.

Needs Debian's chromium and playwright's Python package; nothing is downloaded. Screenshots go to pytest's temporary folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdllm import Model

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
gr = pytest.importorskip("gradio", reason="the page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="driving the page needs playwright")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def forwards(model: Model) -> Iterator[list[float]]:
    """The times of the model's forwards, each slowed down enough to be seen (and stopped)."""
    times: list[float] = []

    def seen(*_: object) -> None:
        times.append(time.monotonic())
        time.sleep(0.03)

    handle = model.network.register_forward_hook(seen)
    yield times
    handle.remove()


@pytest.fixture(scope="module")
def server(model: Model, forwards: list[float]) -> Iterator[str]:
    def load(name: str) -> Model:
        if name != "tiny-llada":
            raise FileNotFoundError(f"model {name!r} is not here")
        return model

    from fastdllm.ui.handlers import Models
    from fastdllm.ui.page import build, launch_options

    page = build(Models(load), "tiny-llada", slow_motion=0.0).queue(default_concurrency_limit=1)
    assert forwards == [], "building the page must not run a model"
    _, url, share = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
    assert share is None
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, server: str) -> Iterator[Callable[..., Any]]:
    """Open the page; at the end of the test nothing may have been written to the browser's error console."""
    contexts, problems = [], []

    def open_page(width: int = 1360, height: int = 900, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((server, "data:", "blob:")) else problems.append(r.url))
        page.goto(server)
        page.get_by_text("million parameters").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def ask(page: Any, text: str) -> None:
    page.locator("#message textarea").fill(text)
    page.locator("#ask").click()


def open_settings(page: Any, decoder: str) -> None:
    page.get_by_role("button", name="Cache and decoder").click()
    page.get_by_label("Decoder").first.click()
    page.get_by_role("option", name=decoder, exact=True).click()


def idle(page: Any) -> None:
    page.locator("#stop:disabled").wait_for()
    page.locator("#ask:enabled").wait_for()


def filled(page: Any, canvas: str = "#canvas") -> int:
    return page.locator(f"{canvas} .tok:not(.open)").count()


def test_the_command_serves_this_machine_only_and_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdllm.ui import page

    launched = {}
    monkeypatch.setattr(page.fastdllm, "load", lambda *_: pytest.fail("a model was loaded before anybody came"))
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: launched.update(options))
    assert page.main([], default_model="tiny-dream") == 0
    assert launched["server_name"] == "127.0.0.1" and launched["share"] is False
    assert page.main(["--host", "0.0.0.0", "--port", "8000", "--share"]) == 0
    assert launched["server_name"] == "0.0.0.0" and launched["server_port"] == 8000 and launched["share"] is True


def test_a_taken_port_is_a_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from fastdllm.ui import page

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert page.main(["--port", str(taken.getsockname()[1])]) == 1
    assert "port" in capsys.readouterr().err


@pytest.mark.browser
def test_a_visitor_asks_and_watches_the_tokens_come(visit: Callable[..., Any], question: str, tmp_path: Path) -> None:
    page = visit()
    open_settings(page, "quota")
    ask(page, question)
    counts = []
    while not page.locator("#canvas .rest").count() and len(counts) < 400:
        counts.append(filled(page))
        page.wait_for_timeout(40)
    idle(page)
    assert counts == sorted(counts) and len(set(counts)) > 5, "the tokens did not come one after another"
    assert "39" in page.locator("#chat").inner_text()
    assert page.locator('#canvas [data-figure="tokens"]').inner_text() == "39"
    assert page.locator("#curve polyline").count() == 1
    assert page.locator("#message textarea").input_value() == ""

    page.locator("#forward input[type=range]").fill("5")
    page.locator('#canvas [data-figure="forwards"]:text-is("5")').wait_for()
    assert filled(page) == 5

    colour = "el => getComputedStyle(el).backgroundColor"
    token = page.locator("#canvas .tok.c4, #canvas .tok.c3").first
    before = token.evaluate(colour)
    page.locator("#colour input[value=confidence]").click()
    assert token.evaluate(colour) != before and page.locator(".legend .conf").first.is_visible()
    page.screenshot(path=tmp_path / "desktop.png", full_page=True)
    assert (tmp_path / "desktop.png").stat().st_size > 20_000


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(
    visit: Callable[..., Any], question: str, tmp_path: Path, scheme: str
) -> None:
    page = visit(390, 844, color_scheme=scheme)
    ask(page, question)
    page.locator("#canvas .tok").first.wait_for()
    idle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(box["x"] + box["width"] <= 390 for box in (t.bounding_box() for t in page.locator("#canvas .tok").all()))
    ratios = page.locator("#canvas .tok:not(.open):not(.after)").evaluate_all(CONTRAST)
    assert ratios and min(ratios) >= 4.5, "a token's text is hard to read on its colour"
    page.screenshot(path=tmp_path / f"phone-{scheme}.png", full_page=True)


CONTRAST = """tokens => {
    const light = text => {
        const part = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
        const lin = part.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * lin[0] + 0.7152 * lin[1] + 0.0722 * lin[2];
    };
    return tokens.map(token => {
        const style = getComputedStyle(token), ink = getComputedStyle(token.querySelector('b')).color;
        const pair = [light(ink), light(style.backgroundColor)].sort((a, b) => b - a);
        return (pair[0] + 0.05) / (pair[1] + 0.05);
    });
}"""


@pytest.mark.browser
def test_two_settings_are_compared_on_one_prompt(visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare").click()
    page.locator("#canvas-1 .rest").wait_for()
    page.locator("#canvas-0 .rest").wait_for()
    page.locator("#stop-compare:disabled").wait_for()
    steps = [int(page.locator(f'#canvas-{side} [data-figure="forwards"]').inner_text()) for side in (0, 1)]
    assert steps[0] > steps[1] > 0, "one token at a time takes more forwards than the threshold"
    assert page.locator("#curve-compare polyline").count() == 2
    page.locator("#forward-compare input[type=range]").fill("1")
    page.locator('#canvas-0 [data-figure="forwards"]:text-is("1")').wait_for()
    page.screenshot(path=tmp_path / "compare.png", full_page=True)


@pytest.mark.browser
def test_stop_stops_the_computation(visit: Callable[..., Any], question: str, forwards: list[float]) -> None:
    page = visit()
    open_settings(page, "quota")
    ask(page, question)
    page.locator("#canvas .tok.now").first.wait_for()
    page.locator("#stop").click()
    page.get_by_text("this turn is not remembered").wait_for()
    idle(page)
    done = len(forwards)
    page.wait_for_timeout(600)
    assert len(forwards) == done
    assert page.locator("#canvas .tok.open").count() > 0


@pytest.mark.browser
def test_a_visitor_who_leaves_stops_the_computation_and_frees_the_queue(
    visit: Callable[..., Any], question: str, forwards: list[float]
) -> None:
    page = visit()
    open_settings(page, "quota")
    ask(page, question)
    page.locator("#canvas .tok.now").first.wait_for()
    page.context.close()
    assert_quiet(forwards)
    other = visit()
    ask(other, question)
    other.locator("#canvas .rest").wait_for()


def assert_quiet(forwards: list[float]) -> None:
    """No forward for two seconds, within two minutes."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if time.monotonic() - forwards[-1] > 2:
            return
        time.sleep(0.1)
    raise AssertionError("the model still works for a visitor who has left")


@pytest.mark.browser
def test_bad_input_is_answered_on_the_page(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    page.locator("#ask").click()
    page.get_by_role("alert").filter(has_text="message is empty").wait_for()
    ask(page, "z" * 100_000)
    page.get_by_role("alert").filter(has_text="message is too long").wait_for()
    ask(page, "<b>bold</b> 😀 \x07 <|mask|><|eos|>")
    page.locator("#canvas .tok").first.wait_for()
    idle(page)
    assert "<b>bold</b>" in page.locator("#chat").inner_text() and "<|mask|>" in page.locator("#chat").inner_text()
    box = page.get_by_label("Model", exact=True)
    box.fill("nowhere")
    box.press("Enter")
    page.get_by_role("alert").filter(has_text="model 'nowhere' is not here").first.wait_for()
    box.fill("tiny-llada")
    box.press("Enter")
    page.get_by_text("million parameters").wait_for()
    page.locator("#clear").click()
    page.get_by_text("Ask a question below").wait_for()
    ask(page, question)
    page.locator('#canvas [data-figure="tokens"]:text-is("39")').wait_for()

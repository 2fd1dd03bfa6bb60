# SPDX-License-Identifier: Apache-2.0
"""What the server does for visitors: two at once, one who stops or leaves, a lost connection, a key."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from fastdllm import DecodeConfig, Model
from tests.ui.browser.driving import ask, chat, idle, serve, setting

pytestmark = pytest.mark.browser


def test_a_broken_connection_is_told_in_a_sentence(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    page.evaluate("""() => {
        const body = () => new ReadableStream({ pull(to) { to.error(new TypeError("network error")); } });
        const real = window.fetch;
        window.fetch = async (path, options) => (path === "page/chat" ? new Response(body()) : real(path, options));
    }""")
    page.locator("#send").click()
    page.locator(".lane .note.problem").first.wait_for()
    assert "The connection broke" in page.locator(".lane .note.problem").first.inner_text()
    chat(page)
    ask(page, question)
    page.locator(".answer .note.problem").wait_for()
    assert "The connection broke" in page.locator(".answer .note.problem").inner_text()
    dead = page.locator(".answer :is(.scrub, .legend, .switch)").filter(visible=True)
    assert dead.count() == 0, "an answer that never began has nothing to play"


def test_two_visitors_are_answered_at_once(visit: Callable[..., Any], question: str, model: Model) -> None:
    """The first forward is held until both have asked; then some forwards serve both."""
    both_asked, rows = threading.Event(), []

    def held(_: object, inputs: tuple[Any, ...], *__: object) -> None:
        rows.append(len(inputs[0]))
        assert both_asked.wait(600)

    handle = model.network.register_forward_hook(held)
    try:
        pages = [visit(), visit()]
        for page in pages:
            chat(page)
            setting(page, "chat", "one")
            ask(page, question)
            page.locator("body.busy").wait_for()
        both_asked.set()
        for page in pages:
            page.locator(".answer .text:not([hidden])").wait_for()
            assert "39" in page.locator(".answer .text").inner_text()
    finally:
        both_asked.set()
        handle.remove()
    assert max(rows) == 2, "one visitor waited for the other's end"


@pytest.mark.usefixtures("in_time")
def test_stop_and_leaving_end_the_computation(visit: Callable[..., Any], question: str, forwards: list[float]) -> None:
    page = visit()
    page.locator("#send").click()
    page.locator("#canvas-a .tok.now").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    idle(page)
    assert_quiet(forwards)
    chat(page)
    setting(page, "chat", "one")
    ask(page, question)
    page.locator(".answer .tok.now").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("This turn is not remembered").wait_for()
    assert page.locator(".answer .tok.open").count() > 0
    ask(page, question)
    page.locator(".answer").nth(1).locator(".tok.now").first.wait_for()
    page.context.close()
    assert_quiet(forwards)


def assert_quiet(forwards: list[float]) -> None:
    """No forward for two seconds, within two minutes."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if time.monotonic() - forwards[-1] > 2:
            return
        time.sleep(0.1)
    raise AssertionError("the model still works for a visitor who has left")


def test_a_server_with_a_key_asks_for_it_once(visit: Callable[..., Any], browser: Any, model: Model) -> None:
    from fastdllm.serving.app import create_app
    from fastdllm.serving.service import Service

    url, end = serve(create_app(Service(model, DecodeConfig()), api_key="secret", wait_until_warm=True))
    try:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        for key in ("wrong", "secret"):
            page.locator("#key[open]").wait_for()
            page.locator("#key-value").fill(key)
            page.locator("#key-value").press("Enter")
            page.wait_for_timeout(300)
        page.locator("body[data-ready]").wait_for()
        page.reload()
        page.locator("body[data-ready]").wait_for()
        assert page.locator("#key[open]").count() == 0
        context.close()
    finally:
        end()

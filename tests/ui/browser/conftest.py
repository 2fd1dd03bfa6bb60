# SPDX-License-Identifier: Apache-2.0
"""A real browser and a real server. Needs Debian's chromium and playwright's Python package; nothing is downloaded."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastdllm import DecodeConfig, Model

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Forwards(list[float]):
    """The times of the model's forwards. seconds: that each waits, so that it can be seen. A test that acts while an answer
    runs takes more, so that a slow browser is in time."""

    seconds = 0.02
    ACTING = 0.5


@pytest.fixture(scope="package")
def forwards(model: Model) -> Iterator[Forwards]:
    times = Forwards()

    def seen(*_: object) -> None:
        times.append(time.monotonic())
        time.sleep(times.seconds)

    handle = model.network.register_forward_hook(seen)
    yield times
    handle.remove()


@pytest.fixture
def in_time(forwards: Forwards, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forwards are slow until it is called: the test has acted."""
    monkeypatch.setattr(forwards, "seconds", forwards.ACTING)
    return monkeypatch.undo


@pytest.fixture(scope="package")
def server(model: Model, forwards: Forwards) -> Iterator[str]:
    import fastdllm
    from fastdllm.serving.app import create_app
    from fastdllm.serving.service import Service
    from tests.ui.browser.driving import serve

    own = Service(model, DecodeConfig(), rows=8)
    others = [Service(fastdllm.load("tiny-sudoku", device="cpu"), DecodeConfig(), rows=8, beside=own)]
    url, end = serve(create_app(own, others=others, wait_until_warm=True))
    yield url
    end()


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    from tests.ui.browser.driving import playwright

    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, server: str) -> Iterator[Callable[..., Any]]:
    """Open the page. At the end of the test nothing may have been written to the browser's error console, and nothing
    asked of anybody but the server."""
    contexts, problems = [], []

    def open_page(width: int = 1440, height: int = 900, address: str = server, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("http://127.0.0.1", "blob:")) else problems.append(r.url))
        page.goto(address)
        page.locator("body[data-ready]").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    # A refused request is an answer here, but browsers write it down.
    assert [text for text in problems if "status of 4" not in text] == []

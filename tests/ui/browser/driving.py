# SPDX-License-Identifier: Apache-2.0
"""What a visitor does on the page, for the tests that drive a browser."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the page needs fastdllm[serve]")
uvicorn = pytest.importorskip("uvicorn", reason="the page needs fastdllm[serve]")
playwright = pytest.importorskip("playwright.sync_api", reason="driving the page needs playwright")

SIZES = {"desktop": (1440, 900), "phone": (390, 844)}


def serve(app: Any) -> tuple[str, Callable[[], None]]:
    """Run an application in a thread: its address, and what ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)

    def end() -> None:
        server.should_exit = True
        thread.join()

    return f"http://127.0.0.1:{port}", end


def chat(page: Any) -> None:
    page.locator("#tab-chat").click()


def ask(page: Any, text: str) -> None:
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def idle(page: Any) -> None:
    page.locator("body:not(.busy)").wait_for()


def until(page: Any, condition: str) -> None:
    """Wait for a condition, also while the page is loaded anew; `wait_for_function` is what the page's policy forbids."""
    for _ in range(600):
        with suppress(playwright.Error):
            if page.evaluate(condition):
                return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {condition}")


def tokens(page: Any) -> None:
    page.locator(".answer [data-mode=tokens]").last.click()


def setting(page: Any, side: str, name: str) -> None:
    page.locator("#open-settings").click()
    page.locator(f"#set-{side} select").first.select_option(name)
    page.keyboard.press("Escape")

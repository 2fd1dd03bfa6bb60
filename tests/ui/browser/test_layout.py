# SPDX-License-Identifier: Apache-2.0
"""Windows of every size, long questions and scrolling: nothing is cut, covered or moved away."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tests.ui.browser.driving import SIZES, ask, chat, setting, tokens, until

pytestmark = pytest.mark.browser


def test_a_long_question_is_folded_and_its_answer_in_sight(visit: Callable[..., Any]) -> None:
    page = visit()
    chat(page)
    text = "\n".join(f"line {number}" for number in range(600))
    ask(page, text)
    page.locator(".answer .note.problem").wait_for()
    assert page.locator(".asked").bounding_box()["height"] < 500
    place = page.locator(".answer .note.problem").bounding_box()
    assert 0 < place["y"] < 900, "what comes of a question is seen"
    page.get_by_text("Show all").click()
    assert page.locator(".bubble").inner_text().endswith("line 599")


def test_who_scrolls_up_stays_there(visit: Callable[..., Any], question: str, in_time: Callable[[], None]) -> None:
    page = visit(1000, 500)
    chat(page)
    ask(page, question)
    page.locator(".answer .text:not([hidden])").wait_for()
    setting(page, "chat", "one")
    ask(page, question)
    page.locator(".answer").last.locator(".tok.now").first.wait_for()
    page.locator("main").hover()
    page.mouse.wheel(0, -150)
    until(page, "(m => m.scrollTop < m.scrollHeight - m.clientHeight - 50)(document.querySelector('main'))")
    page.wait_for_timeout(300)  # a smooth scroll comes to its end
    top = page.evaluate("document.querySelector('main').scrollTop")
    in_time()
    page.locator(".answer").last.locator(".tok:not(.open)").nth(12).wait_for()
    assert page.evaluate("document.querySelector('main').scrollTop") == top


@pytest.mark.parametrize(("width", "height"), [(844, 390), (1024, 400), (320, 568), (800, 600)])
def test_a_small_window_scrolls_and_nothing_overlaps(visit: Callable[..., Any], width: int, height: int) -> None:
    page = visit(width, height)
    assert page.evaluate("document.querySelector('main').scrollTop") == 0
    lanes = page.locator(".lane")
    for lane in (lanes.first, lanes.last):
        parts = [part.bounding_box() for part in lane.locator(":scope > *:visible").all()]
        for above, below in pairwise(parts):
            assert above["y"] + above["height"] <= below["y"] + 1
        own = lane.bounding_box()
        assert parts[-1]["y"] + parts[-1]["height"] <= own["y"] + own["height"]
        assert lane.locator(".canvas").bounding_box()["height"] > 40
    assert page.locator("#race-bar").bounding_box()["y"] >= lanes.last.bounding_box()["y"] + 40
    assert page.locator("#model").bounding_box()["width"] > 60
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".figure").evaluate_all("all => all.every((f) => f.scrollWidth <= f.clientWidth + 1)")


def test_nothing_is_cut_on_the_side_of_a_phone(visit: Callable[..., Any], question: str, server: str) -> None:
    page = visit(*SIZES["phone"], address=f"{server}#v=chat&w=3%3Apencils")
    ask(page, question)
    page.locator(".answer .text:not([hidden])").wait_for()
    tokens(page)
    page.locator(".asked").hover()
    page.get_by_label("Edit and ask again").click()
    for opened in ("", "settings"):
        if opened:
            page.locator("#open-settings").click()
        wide = page.locator("body *:not(.examples *)").evaluate_all(
            "all => all.filter(e => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 0.5)"
            ".map(e => e.outerHTML)"
        )
        assert wide == []

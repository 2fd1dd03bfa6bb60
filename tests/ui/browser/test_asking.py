# SPDX-License-Identifier: Apache-2.0
"""What a visitor types: the box, words at positions, problems and notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.ui.browser.driving import ask, chat, idle, setting, tokens

pytestmark = pytest.mark.browser


def test_enter_sends_and_shift_enter_breaks_the_line(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    chat(page)
    box = page.locator("#message")
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    assert box.input_value() == "one\ntwo" and page.locator(".asked").count() == 0
    box.fill(question)
    box.press("Enter")
    page.locator(".answer .text:not([hidden])").wait_for()
    assert box.input_value() == "" and page.locator(".asked").inner_text() == question
    assert "23 + 16 = 39" in page.locator(".answer .text").inner_text()


def test_what_is_typed_while_an_answer_runs_stays(
    visit: Callable[..., Any], question: str, in_time: Callable[[], None]
) -> None:
    page = visit()
    chat(page)
    setting(page, "chat", "one")
    ask(page, question)
    page.locator(".answer .tok.now").first.wait_for()
    box = page.locator("#message")
    box.press_sequentially("my next question")
    box.press("Enter")
    assert page.locator("body.busy").count() == 1 and page.locator(".asked").count() == 1
    in_time()
    idle(page)
    page.locator(".answer .text:not([hidden])").wait_for()
    assert box.input_value() == "my next question"
    page.locator(".chip").first.click()  # an example is asked without the box
    page.locator(".asked").nth(1).wait_for()
    idle(page)
    assert box.input_value() == "my next question"
    page.locator("#tab-compare").click()
    page.locator("#open-settings").click()
    page.keyboard.press("Escape")
    assert box.input_value() == "my next question"


def test_one_mistake_is_told_once(visit: Callable[..., Any], server: str) -> None:
    page = visit(address=f"{server}#w=nothing")
    page.locator("#send").click()
    page.locator(".lane .note.problem").first.wait_for()
    idle(page)
    told = [text for text in page.locator(".lane .note").all_inner_texts() if text]
    assert len(told) == 1 and "not of the form" in told[0]


def test_a_notice_is_told_once_in_a_conversation(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    chat(page)
    for number in range(3):
        ask(page, question)
        page.locator(".answer .text:not([hidden])").nth(number).wait_for()
        idle(page)
    assert page.get_by_text("each one starts a new conversation").count() == 1


def test_words_are_previewed_and_stand(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    chat(page)
    page.locator("#open-settings").click()
    page.locator("#words").fill("0:Well, 20:pencils")
    page.locator(".preview .tok.fixed").nth(1).wait_for()
    assert page.locator(".preview .tok").all_inner_texts()[20] == "pencils"
    fixed = page.locator(".preview .tok.fixed").all_inner_texts()
    assert fixed[-1] == "pencils" and "".join(fixed[:-1]) == "Well"
    page.locator("#words").fill("nothing")
    page.get_by_text("not of the form").wait_for()
    page.locator("#words").fill("0:Well, 20:pencils")
    page.keyboard.press("Escape")
    ask(page, question)
    page.locator(".answer .text:not([hidden])").wait_for()
    assert page.locator(".answer .text").inner_text().startswith("Well")
    tokens(page)
    assert page.locator(".answer .tok.fixed").all_inner_texts() == fixed


def test_problems_are_sentences_and_keep_the_question(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    page.locator("#preset-b").select_option("custom")
    page.locator("#set-b").get_by_label("threshold", exact=True).fill("7")
    page.locator("#set-b").get_by_label("threshold", exact=True).press("Tab")
    page.keyboard.press("Escape")
    page.locator("#send").click()
    page.locator(".lane-b .note.problem").wait_for()
    assert "threshold=7.0 must lie in [0, 1]" in page.locator(".lane-b .note").inner_text()
    idle(page)
    chat(page)
    ask(page, "z" * 9_000)
    page.locator(".answer .note.problem").wait_for()
    assert "too long" in page.locator(".answer .note.problem").inner_text()
    page.get_by_text("Show all 9,000 characters").click()
    assert page.locator(".bubble").inner_text() == "z" * 9_000
    page.locator("#send").click()
    page.get_by_text("Write a question first.").wait_for()

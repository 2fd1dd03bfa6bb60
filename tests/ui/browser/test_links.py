# SPDX-License-Identifier: Apache-2.0
"""What an address holds: a race with its settings, what is chosen, and a conversation that survives a reload."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.ui.browser.driving import ask, chat, setting, tokens, until

pytestmark = pytest.mark.browser


def test_a_link_brings_a_race_with_its_settings(visit: Callable[..., Any], server: str) -> None:
    side = json.dumps({"name": "custom", "decoder": "threshold", "threshold": "0.7", "cache": "prefix"})
    page = visit(address=f"{server}#q=Tom+has+5+apples.&a=%7B%22name%22%3A%22paper%22%7D&b={side}&n=32&nonsense=1&t=x")
    assert page.locator("#preset-a").input_value() == "paper" and page.locator("#preset-b").input_value() == "custom"
    assert "Tom has 5 apples." in page.locator("#question").inner_text()
    page.locator("#open-settings").click()
    assert page.locator("#set-b").get_by_label("threshold", exact=True).input_value() == "0.7"


LINKS = [
    ("n=-3", {"tokens": 1}),
    ("n=2.7", {"tokens": 3}),
    ("t=-1", {"temperature": 0}),
    ("t=1e308", {"temperature": 10}),
    ("s=-5", {"seed": 0}),
    ("s=1e99", {"seed": 2**31 - 1}),
    ('a={"name":"quickest"}', {"a": {"name": "one"}}),
    ('a={"name":"custom","decoder":"nothing"}', {"a": {"name": "one"}}),
    ('a={"name":"custom","decoder":{"x":1}}', {"a": {"name": "one"}}),
    ('b={"name":"custom","cache":"nothing"}', {"b": {"name": "balanced"}}),
    ("a=[1]", {"a": {"name": "one"}}),
    ("m=nobody", {"model": "tiny-llada"}),
    ("v=nowhere", {"view": "compare"}),
    ("%E0%A4%A", {"view": "compare"}),
]


def test_what_makes_no_sense_in_a_link_is_passed_over(visit: Callable[..., Any], server: str) -> None:
    page = visit()
    for fragment, expected in LINKS:
        page.evaluate("localStorage.clear(); sessionStorage.clear()")
        page.goto("about:blank")  # else only the part behind # would change
        page.goto(f"{server}#{fragment}")
        page.locator("body[data-ready]").wait_for()
        state = page.evaluate("import('/state.js').then((m) => m.state)")
        assert state.items() >= expected.items(), fragment


def test_the_address_keeps_what_is_chosen_and_another_link_is_followed(visit: Callable[..., Any]) -> None:
    page = visit()
    page.locator("#model").select_option("tiny-sudoku")
    page.locator("#preset-a").select_option("paper")
    until(page, "location.hash.includes('paper')")
    page.reload()
    page.locator("body[data-ready]").wait_for()
    assert page.locator("#model").input_value() == "tiny-sudoku" and page.locator("#preset-a").input_value() == "paper"
    page.evaluate("location.hash = '#v=chat&q=Hello'")
    until(page, "document.querySelector('#message').value === 'Hello'")
    assert page.locator("#model").input_value() == "tiny-llada"


def test_a_conversation_survives_a_reload(visit: Callable[..., Any], question: str, in_time: Callable[[], None]) -> None:
    page = visit()
    chat(page)
    ask(page, question)
    page.locator(".answer .text:not([hidden])").wait_for()
    tokens(page)
    shown = page.locator(".answer").first.locator(".tok, .sums, .about")
    before = shown.all_inner_texts()
    setting(page, "chat", "one")
    ask(page, question)
    page.locator(".answer").last.locator(".tok.now").first.wait_for()
    page.reload()
    in_time()
    page.locator("body[data-ready]").wait_for()
    assert page.locator(".asked").all_inner_texts() == [question] * 2 and page.locator("body.busy").count() == 0
    assert shown.all_inner_texts() == before and len(before) > 40
    assert "left before the answer was complete" in page.locator(".answer").last.inner_text()
    page.locator(".answer .scrub").first.fill("1")
    assert page.locator(".answer .moment").first.inner_text().startswith("Forward 1 of")
    page.get_by_label("New chat").click()
    page.reload()
    page.locator("body[data-ready]").wait_for()
    assert page.locator(".asked").count() == 0


def test_other_options_may_hold_commas(visit: Callable[..., Any]) -> None:
    page = visit()
    sent = "async (more) => (await import('/state.js')).sent({ name: 'custom', more })"
    expected = {"name": "custom", "stop_ids": "1,2", "seed": "3"}
    assert page.evaluate(sent, "stop_ids=1,2, seed=3") == expected
    assert page.evaluate(sent, " seed = 3 , stop_ids = 1,2,") == expected

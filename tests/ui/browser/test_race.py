# SPDX-License-Identifier: Apache-2.0
"""The Compare tab: what a race shows, what its verdict says, and when it says none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ui.browser.driving import SIZES, ask, idle, setting

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        ("desktop", "light"),
        ("phone", "dark"),  # places depend on the size, contrasts on the scheme
        pytest.param("desktop", "dark", marks=pytest.mark.slow),
        pytest.param("phone", "light", marks=pytest.mark.slow),
    ],
)
def test_a_race_is_seen_without_scrolling_and_has_a_verdict(
    visit: Callable[..., Any], tmp_path: Path, size: str, scheme: str
) -> None:
    width, height = SIZES[size]
    page = visit(width, height, color_scheme=scheme)
    assert page.locator("header").bounding_box()["height"] <= 80
    page.locator("#send").click()
    page.locator("#verdict.said").wait_for()
    said = page.locator("#verdict").inner_text()
    found = re.fullmatch(r"B: ([\d.]+) times faster, ([\d.]+) times fewer forwards, same answer", said)
    assert found, said
    for name in ("#verdict", "#canvas-a", "#canvas-b", "#send", "#message"):
        place = page.locator(name).bounding_box()
        assert place["height"] > 20 and place["width"] > 60, name
        assert place["x"] >= 0 and place["x"] + place["width"] <= width, f"{name} is cut on the side"
        assert place["y"] >= 0 and place["y"] + place["height"] <= height, f"{name} is below the fold"
    # The verdict is made of the counts that stand below it.
    value = {
        (side, name): float(page.locator(f".lane-{side} [data-figure={name}]").inner_text())
        for side in "ab"
        for name in ("seconds", "forwards", "tokens")
    }
    assert float(found[2]) == pytest.approx(value["a", "forwards"] / value["b", "forwards"], rel=0.06)
    assert float(found[1]) == pytest.approx(value["a", "seconds"] / value["b", "seconds"], rel=0.3)
    assert value["a", "tokens"] == value["b", "tokens"] == 39
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#settings").is_hidden(), "the forms are folded"
    for lane in "ab":
        assert page.locator(f"#canvas-{lane} .tok.end").count() == 1
        assert page.locator(f"#canvas-{lane} .tok.end").inner_text() == "end, +24"
    page.wait_for_timeout(400)  # the last tokens have arrived
    ratios = page.locator(".canvas .tok:not(.open)").evaluate_all(CONTRAST)
    assert ratios and min(ratios) >= 4.5, "a token's text is hard to read on its colour"
    page.screenshot(path=tmp_path / f"race-{size}-{scheme}.png")


CONTRAST = """tokens => {
    const light = text => {
        const part = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
        const lin = part.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * lin[0] + 0.7152 * lin[1] + 0.0722 * lin[2];
    };
    const ground = element => {
        const colour = getComputedStyle(element).backgroundColor;
        return /, 0\\)$|transparent/.test(colour) ? ground(element.parentElement) : colour;
    };
    return tokens.filter(token => token.textContent).map(token => {
        const pair = [light(getComputedStyle(token).color), light(ground(token))].sort((a, b) => b - a);
        return (pair[0] + 0.05) / (pair[1] + 0.05);
    });
}"""


def test_a_verdict_goes_with_its_race(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    ask(page, question)
    page.locator("#verdict.said").wait_for()
    assert page.locator(".lane.won").count() == 1 and page.locator("#verdict").get_attribute("data-tip")
    setting(page, "a", "fast")
    assert page.locator("#verdict").inner_text() == "Two settings, one prompt. Press Race."
    assert page.locator(".lane.won").count() == 0 and page.locator("#verdict").get_attribute("data-tip") is None


def test_a_verdict_names_no_ratio_of_one(visit: Callable[..., Any]) -> None:
    page = visit()
    say = """async ([a, b]) => {
        const { verdict } = await import("/answer.js");
        const side = (forwards, seconds) => ({ forwards, seconds: () => seconds, text: "x", shared: false });
        return verdict(side(...a), side(...b)).text;
    }"""
    assert page.evaluate(say, [[100, 2.0], [101, 1.99]]) == "B: about as fast, about as many forwards, same answer"
    assert page.evaluate(say, [[7, 1.0], [7, 1.0]]) == "B: about as fast, as many forwards, same answer"
    assert page.evaluate(say, [[64, 2.0], [2, 0.2]]) == "B: 10 times faster, 32 times fewer forwards, same answer"
    assert page.evaluate(say, [[10, 0.2], [5, 2.0]]) == "A: 10 times faster, 2 times more forwards, same answer"


def test_nobody_wins_with_an_empty_answer(visit: Callable[..., Any]) -> None:
    page = visit()
    ask(page, "hi")
    page.get_by_text("Both answers are empty").wait_for()
    assert page.locator(".lane.won").count() == 0
    assert "questions like the examples only" in page.locator(".lane-a .note").inner_text()


@pytest.mark.parametrize("size", SIZES)
def test_before_the_first_forward_nothing_is_said_to_run(visit: Callable[..., Any], size: str) -> None:
    page = visit(*SIZES[size])
    page.locator("#model").select_option("tiny-sudoku")
    for board in page.locator(".lane .canvas").all():
        page.wait_for_function("box => box.scrollHeight <= box.clientHeight", arg=board.element_handle())  # it is seen whole
    page.route("**/page/chat", lambda route: None)  # an answer that does not begin
    page.locator("#send").click()
    page.get_by_text("Making this setting ready").first.wait_for()
    assert page.locator("#verdict").inner_text() == "Getting ready"
    assert page.locator("#canvas-a .grid .cell.given").count() == 5


def test_a_race_that_does_not_begin_says_why_at_once(visit: Callable[..., Any]) -> None:
    page = visit()
    ask(page, "hi")
    page.get_by_text("Both answers are empty").wait_for()
    ask(page, "too long " * 600)
    page.locator(".lane .note.problem").wait_for()
    idle(page)
    assert set(page.locator(".figure dd").all_inner_texts()) == {"0"}, "figures of another race are gone"
    assert [text for text in page.locator(".lane .note:not(.problem)").all_inner_texts() if text] == []
    reason = page.locator(".lane .note.problem")
    assert page.locator("#verdict").inner_text() == "No race" and "too long" in reason.inner_text()
    track = page.locator(".lane .track").first.bounding_box()
    assert reason.bounding_box()["y"] - track["y"] < 40, "the reason stands at the top"

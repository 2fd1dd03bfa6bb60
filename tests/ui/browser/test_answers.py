# SPDX-License-Identifier: Apache-2.0
"""The states of an answer: scrubbed, played again, copied, saved, edited, cut, empty or behind its end."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastdllm.trace import Trace
from tests.ui.browser.driving import ask, chat, idle, setting, tokens

pytestmark = pytest.mark.browser


def test_the_bar_of_an_answer_shows_its_forward_whole(visit: Callable[..., Any], question: str) -> None:
    page = visit(360, 800)
    chat(page)
    setting(page, "chat", "one")
    ask(page, question)
    page.locator(".answer .text:not([hidden])").wait_for()
    tokens(page)
    for width in (360, 800, 1600):
        page.set_viewport_size({"width": width, "height": 800})
        parts = [page.locator(f".answer .bar {part}").bounding_box() for part in (".play", ".scrub", ".moment", ".pace")]
        assert all(left["x"] + left["width"] <= right["x"] for left, right in pairwise(parts)), width
        assert parts[1]["width"] >= 30 and parts[-1]["x"] + parts[-1]["width"] <= width
        assert page.locator(".answer .moment").evaluate("label => label.scrollWidth <= label.clientWidth"), width


def test_scrubbed_states_tell_the_truth_and_colours_stay(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    chat(page)
    setting(page, "chat", "one")
    ask(page, question)
    colours: dict[str, set[str]] = {}
    totals: set[int] = set()
    while page.locator("body.busy").count():
        for moment in page.locator(".answer .moment").all_inner_texts():
            totals |= {int(total) for total in re.findall(r" of (\d+)", moment)}
        for tip, kind in page.locator(".answer .tok:not(.open, .end)").evaluate_all(
            "all => all.map(t => [t.dataset.tip, t.className.replace(/ (now|word)/g, '')])"
        ):
            colours.setdefault(tip, set()).add(kind)
        page.wait_for_timeout(60)
    assert len(colours) > 10 and all(len(kinds) == 1 for kinds in colours.values()), "a token's colour has changed"
    page.locator(".answer .text:not([hidden])").wait_for()
    tokens(page)
    scrub = page.locator(".answer .scrub")
    last = int(scrub.get_attribute("max"))
    assert totals <= {last}, "a number of forwards was named that was not the last one"
    for step in (0, 1, 20, 33, last):
        scrub.fill(str(step))
        assert page.locator(".answer .moment").inner_text() == f"Forward {step} of {last}"
        written = page.locator(".answer .tok:not(.open, .end)").count()
        folded = page.locator(".answer .tok.end").all_inner_texts()
        ends = sum(1 + int((re.findall(r"\+(\d+)", text) or ["0"])[0]) for text in folded)
        assert written + ends == step, "as many tokens are shown as forwards have written"
        never = page.locator(".answer .tok.end").evaluate_all("all => all.some(t => /never decoded/.test(t.dataset.tip))")
        assert never == (step == last), "only a finished answer has positions that were never decoded"
    before = page.locator(".answer .tok.c4, .answer .tok.c3").first
    plain = before.evaluate("t => getComputedStyle(t).backgroundColor")
    page.locator("#open-settings").click()
    page.locator("#colour").select_option("sure")
    assert before.evaluate("t => getComputedStyle(t).backgroundColor") != plain
    assert "confidence" in before.get_attribute("data-tip")


def test_an_answer_can_be_played_again_copied_saved_edited_and_asked_again(
    visit: Callable[..., Any], question: str, tmp_path: Path
) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    chat(page)
    ask(page, question)
    page.locator(".answer .text:not([hidden])").wait_for()
    page.get_by_label("Copy the answer").click()
    assert page.evaluate("navigator.clipboard.readText()").strip().endswith("#### 39")
    with page.expect_download() as saved:
        page.locator(".answer").get_by_label("Download its history").click()
    saved.value.save_as(tmp_path / "trace.json")
    trace = Trace.load(tmp_path / "trace.json")
    assert trace.finished and trace.tokens() == 39 and trace.model == "tiny-llada"
    tokens(page)
    play = page.locator(".answer .play")
    play.click()
    page.locator(".answer .play[aria-label='Play the answer again']").wait_for()
    page.get_by_label("Ask again, with other draws").click()
    idle(page)
    page.locator(".asked").first.hover()
    page.get_by_label("Edit and ask again").click()
    page.get_by_label("Edit the question").fill(question.replace("23", "33"))
    page.get_by_role("button", name="Ask again", exact=True).click()
    idle(page)
    assert page.locator(".asked").count() == 1 and "33" in page.locator(".asked").inner_text()
    page.get_by_label("Copy a link").click()
    link = page.evaluate("navigator.clipboard.readText()")
    other = visit(address=link)
    assert other.locator("#message").input_value() == question.replace("23", "33")
    assert other.locator("#tab-chat[aria-selected=true]").count() == 1


def test_the_same_answer_again_is_explained(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    chat(page)
    ask(page, question)
    page.locator(".answer .text:not([hidden])").wait_for()
    page.get_by_label("Ask again, with other draws").click()
    page.get_by_text("at temperature 0 nothing is drawn").wait_for()


def test_text_from_right_to_left_runs_so(visit: Callable[..., Any]) -> None:
    page = visit()
    page.locator("#message").fill("שלום עולם 12")
    direction = "element => getComputedStyle(element).direction"
    assert page.locator("#message").evaluate(direction) == "rtl"
    chat(page)
    ask(page, "שלום עולם 12")
    assert page.locator(".bubble").evaluate(direction) == "rtl"
    assert page.evaluate("""async () => {
        const { markdown } = await import("/markdown.js");
        document.querySelector("#messages").append(markdown("שלום\\n\\nhello"));
        return [...document.querySelectorAll("#messages > p")].map((p) => getComputedStyle(p).direction);
    }""") == ["rtl", "ltr"]


def test_what_stands_behind_the_end_is_folded_around_gaps(visit: Callable[..., Any]) -> None:
    """An end token, an open position, two more end tokens: while the answer runs, and when it is over."""
    page = visit()
    shown = page.evaluate("""async () => {
        const [{ Trace }, { draw }] = await Promise.all([import("/trace.js"), import("/canvas.js")]);
        const trace = new Trace({ length: 8, mask_id: 9, stop_ids: [0], fixed: {}, texts: {} });
        trace.add({ start: 0, stop: 6, seconds: 1, ids: [1, 0, null, 0, 0, null], tokens: ["a", "", "", "", "", ""],
                    confidence: [1, 1, null, 1, 1, null], rows: 1 });
        const box = document.createElement("div");
        const look = () => {
            draw(box, trace, 1);
            return [...box.children].map((tile) => `${tile.className.split(" ")[1]}:${tile.textContent}`);
        };
        const running = look();
        trace.finished = true;
        return [running, look(), box.lastChild.dataset.tip];
    }""")
    assert shown[0] == ["s0:a", "end:end", "open:", "end:+2", "open:", "open:", "open:"]
    assert shown[1] == [shown[0][0], "end:end, +2"]
    assert "4 were never decoded" in shown[2]


def test_a_sudoku_is_a_grid_and_examples_follow_the_model(visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit()
    assert all("Sudoku" not in text for text in page.locator(".chip").all_inner_texts())
    page.locator("#model").select_option("tiny-sudoku")
    assert all(text.startswith("Sudoku") for text in page.locator(".chip").all_inner_texts())
    page.locator("#send").click()
    page.locator("#verdict.said").wait_for()
    assert page.locator("#canvas-b .grid .cell").all_inner_texts() == list("1423324121344312")
    chat(page)
    page.locator(".chip").first.click()
    page.locator(".answer .text .grid").wait_for()
    assert page.locator(".answer .text .cell").all_inner_texts() == list("1423324121344312")
    assert page.locator(".asked .cell.given").count() == 5
    page.screenshot(path=tmp_path / "sudoku.png")


def test_markup_of_a_message_or_an_answer_is_text(visit: Callable[..., Any], server: str) -> None:
    page = visit()
    chat(page)
    ask(page, "<b>bold</b> <img src=x onerror=alert(1)> 😀 <|mask|><|eos|>")
    idle(page)
    assert "<b>bold</b>" in page.locator(".bubble").inner_text() and "<|mask|>" in page.locator(".bubble").inner_text()
    assert page.locator("main img, main b").count() == 0
    shown = page.evaluate("""async () => {
        const { markdown } = await import("/markdown.js");
        const box = document.createElement("div");
        box.append(markdown("# T <i>x</i>\\n\\n**b** `c<d>` *e* [l](https://a.b) [m](javascript:alert(1))\\n"
            + "- one\\n- two\\n\\n3. three\\n4. four\\n\\n"
            + "```py\\nif a < b:\\n  <s>\\n```\\n> q\\n\\n---\\n<script>1</script>"));
        return [box.innerHTML, [...box.querySelectorAll("*")].map(e => e.localName).join()];
    }""")
    assert shown[1] == "h2,p,strong,code,em,a,ul,li,li,ol,li,li,pre,code,blockquote,hr,p"
    assert "&lt;script&gt;" in shown[0] and 'href="javascript' not in shown[0] and 'start="3"' in shown[0]


def test_cut_and_empty_answers_say_so(visit: Callable[..., Any], question: str, server: str) -> None:
    page = visit(address=f"{server}#v=chat&n=12")
    ask(page, question)
    page.get_by_text("Cut at 12 tokens").wait_for()
    other = visit(address=f"{server}#v=chat")
    ask(other, "hi")
    other.get_by_text("An empty answer: the model ended it at once.").wait_for()

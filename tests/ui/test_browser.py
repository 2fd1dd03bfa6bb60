# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, against a real server: what a visitor sees and what the server does when one leaves.

Needs Debian's chromium and playwright's Python package; nothing is downloaded. Screenshots go to pytest's temporary folder.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastdllm import DecodeConfig, Model
from fastdllm.trace import Trace

pytest.importorskip("fastapi", reason="the page needs fastdllm[serve]")
uvicorn = pytest.importorskip("uvicorn", reason="the page needs fastdllm[serve]")
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
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def forwards(model: Model) -> Iterator[list[float]]:
    """The times of the model's forwards, each slowed down enough to be seen (and stopped)."""
    times: list[float] = []

    def seen(*_: object) -> None:
        times.append(time.monotonic())
        time.sleep(0.02)

    handle = model.network.register_forward_hook(seen)
    yield times
    handle.remove()


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


@pytest.fixture(scope="module")
def server(model: Model, forwards: list[float]) -> Iterator[str]:
    import fastdllm
    from fastdllm.serving.app import create_app
    from fastdllm.serving.service import Service

    own = Service(model, DecodeConfig(), rows=8)
    others = [Service(fastdllm.load("tiny-sudoku", device="cpu"), DecodeConfig(), rows=8, beside=own)]
    url, end = serve(create_app(own, others=others, wait_until_warm=True))
    yield url
    end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
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


@pytest.mark.browser
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


@pytest.mark.browser
def test_what_is_typed_while_an_answer_runs_stays(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    chat(page)
    setting(page, "chat", "one")
    ask(page, question)
    page.locator(".answer .tok.now").first.wait_for()
    box = page.locator("#message")
    box.press_sequentially("my next question")
    box.press("Enter")
    assert page.locator("body.busy").count() == 1 and page.locator(".asked").count() == 1
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


@pytest.mark.browser
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


@pytest.mark.browser
def test_a_verdict_goes_with_its_race(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    ask(page, question)
    page.locator("#verdict.said").wait_for()
    assert page.locator(".lane.won").count() == 1 and page.locator("#verdict").get_attribute("data-tip")
    setting(page, "a", "fast")
    assert page.locator("#verdict").inner_text() == "Two settings, one prompt. Press Race."
    assert page.locator(".lane.won").count() == 0 and page.locator("#verdict").get_attribute("data-tip") is None


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
def test_what_makes_no_sense_in_a_link_is_passed_over(visit: Callable[..., Any], server: str) -> None:
    page = visit()
    for fragment, expected in LINKS:
        page.evaluate("localStorage.clear(); sessionStorage.clear()")
        page.goto("about:blank")  # else only the part behind # would change
        page.goto(f"{server}#{fragment}")
        page.locator("body[data-ready]").wait_for()
        state = page.evaluate("import('/state.js').then((m) => m.state)")
        assert state.items() >= expected.items(), fragment


@pytest.mark.browser
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


@pytest.mark.browser
def test_a_conversation_survives_a_reload(visit: Callable[..., Any], question: str) -> None:
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


@pytest.mark.browser
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


@pytest.mark.browser
def test_one_mistake_is_told_once(visit: Callable[..., Any], server: str) -> None:
    page = visit(address=f"{server}#w=nothing")
    page.locator("#send").click()
    page.locator(".lane .note.problem").first.wait_for()
    idle(page)
    told = [text for text in page.locator(".lane .note").all_inner_texts() if text]
    assert len(told) == 1 and "not of the form" in told[0]


@pytest.mark.browser
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


@pytest.mark.browser
def test_who_scrolls_up_stays_there(visit: Callable[..., Any], question: str) -> None:
    page = visit(1000, 500)
    chat(page)
    ask(page, question)
    page.locator(".answer .text:not([hidden])").wait_for()
    setting(page, "chat", "one")
    ask(page, question)
    page.locator(".answer").last.locator(".tok.now").first.wait_for()
    page.locator("main").hover()
    page.mouse.wheel(0, -150)
    page.wait_for_timeout(300)
    top = page.evaluate("document.querySelector('main').scrollTop")
    end = page.evaluate("(m => m.scrollHeight - m.clientHeight)(document.querySelector('main'))")
    assert top < end - 50, "there was nothing to scroll"
    page.locator(".answer").last.locator(".tok:not(.open)").nth(12).wait_for()
    assert page.evaluate("document.querySelector('main').scrollTop") == top


@pytest.mark.browser
def test_the_same_answer_again_is_explained(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    chat(page)
    ask(page, question)
    page.locator(".answer .text:not([hidden])").wait_for()
    page.get_by_label("Ask again, with other draws").click()
    page.get_by_text("at temperature 0 nothing is drawn").wait_for()


@pytest.mark.browser
def test_a_notice_is_told_once_in_a_conversation(visit: Callable[..., Any], question: str) -> None:
    page = visit()
    chat(page)
    for number in range(3):
        ask(page, question)
        page.locator(".answer .text:not([hidden])").nth(number).wait_for()
        idle(page)
    assert page.get_by_text("each one starts a new conversation").count() == 1


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
def test_nobody_wins_with_an_empty_answer(visit: Callable[..., Any]) -> None:
    page = visit()
    ask(page, "hi")
    page.get_by_text("Both answers are empty").wait_for()
    assert page.locator(".lane.won").count() == 0
    assert "questions like the examples only" in page.locator(".lane-a .note").inner_text()


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
def test_other_options_may_hold_commas(visit: Callable[..., Any]) -> None:
    page = visit()
    sent = "async (more) => (await import('/state.js')).sent({ name: 'custom', more })"
    expected = {"name": "custom", "stop_ids": "1,2", "seed": "3"}
    assert page.evaluate(sent, "stop_ids=1,2, seed=3") == expected
    assert page.evaluate(sent, " seed = 3 , stop_ids = 1,2,") == expected


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
def test_cut_and_empty_answers_say_so(visit: Callable[..., Any], question: str, server: str) -> None:
    page = visit(address=f"{server}#v=chat&n=12")
    ask(page, question)
    page.get_by_text("Cut at 12 tokens").wait_for()
    other = visit(address=f"{server}#v=chat")
    ask(other, "hi")
    other.get_by_text("An empty answer: the model ended it at once.").wait_for()


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


def test_the_command_checks_its_options_and_its_address(capsys: pytest.CaptureFixture) -> None:
    from fastdllm.ui import app

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert app.main(["--port", str(port)]) == 2
        assert f"port {port} of 127.0.0.1 is taken" in capsys.readouterr().err
        assert app.free_port("127.0.0.1", app.PORTS) in app.PORTS
    for host in ("192.0.2.1", "999.1.1.1", "nowhere.invalid", "2001:db8::1"):  # reserved: no machine's own
        assert app.main(["--host", host]) == 2
        message = capsys.readouterr().err
        assert f"--host {host} is no address of this machine" in message and "--port" not in message
    for options, expected in (
        (["--preset", "quickest"], "quickest"),
        (["--threshold", "2"], "threshold=2.0 must lie in"),
        (["--max-batch", "0"], "--max-batch 0 must be positive"),
        (["--quantize", "nothing"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as stopped:
            app.main(options)
        assert stopped.value.code == 2 and expected in capsys.readouterr().err
    assert app.main(["--model", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_address_is_told_when_it_can_be_reached() -> None:
    from fastdllm.ui import app

    port = app.free_port("127.0.0.1", app.PORTS)
    command = [sys.executable, "-m", "fastdllm.cli", "app", "--model", "tiny-sudoku", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2])
    try:
        assert process.stdout is not None
        said = next(line for line in process.stdout if "http://" in line)
        assert f"http://127.0.0.1:{port} " in said
        socket.create_connection(("127.0.0.1", port), timeout=600).close()
    finally:
        process.terminate()
        process.communicate()


def test_the_command_serves_its_models_to_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdllm.serving import command
    from fastdllm.ui import app

    ran: list[tuple[Any, str]] = []
    monkeypatch.setattr(command, "run", lambda served, host, *_: ran.append((served, host)) or 0)
    assert app.main(["--model", "tiny-sudoku", "--model", "tiny-llada", "--threshold", "0.8", "--cache", "prefix"]) == 0
    served, host = ran[0]
    services = served.state.page.services
    assert host == "127.0.0.1" and list(services) == ["tiny-sudoku", "tiny-llada"]
    assert all(service.config.threshold == 0.8 and service.config.cache == "prefix" for service in services.values())
    assert served.state.service is services["tiny-sudoku"]
    gate = next(layer for layer in served.user_middleware if layer.cls.__name__ == "Gate")
    assert gate.kwargs["hosts"] == ("127.0.0.1", "localhost", "[::1]")
    assert app.main([], default_model="tiny-dream") == 0
    assert next(iter(ran[1][0].state.page.services)) == "tiny-dream" and len(ran[1][0].state.page.services) == 4

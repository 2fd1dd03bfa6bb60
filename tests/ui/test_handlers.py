# SPDX-License-Identifier: Apache-2.0
"""The web page's handlers without a browser: every outcome is a frame, and nothing a visitor does raises."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import fastdllm
from fastdllm import DecodeConfig, Model
from fastdllm.presets import PRESETS
from fastdllm.trace import watch
from fastdllm.ui import handlers
from fastdllm.ui.canvas import confidence_colour, curve_svg, step_colour, tokens_html
from fastdllm.ui.constraints import parse_constraints
from fastdllm.ui.conversation import Conversation
from fastdllm.ui.handlers import Choice, Common, Frame, Models, Stop, ask, at_step, choose_model, compare, config_of

COMMON = Common("tiny-llada", gen_length=64.0, block_length=32.0, seed=0.0)
SLOW = Choice("none", "quota", steps=64.0)


@pytest.fixture
def models(model: Model) -> Models:
    return Models(lambda name: model if name == "tiny-llada" else fastdllm.load(name, device="cpu"))


def last(run: object) -> Frame:
    *_, frame = run
    return frame


def test_frames_come_from_the_running_loop(models: Models, question: str) -> None:
    run = ask(models, Stop(), Conversation(), question, COMMON, SLOW)
    first = next(run)
    assert first.running and first.trace.steps == [] and first.messages[0]["content"] == question
    filled = [sum(frame.trace.at().filled for frame in [first])]
    for number, frame in enumerate(run, start=1):
        if frame.running:
            assert len(frame.trace.steps) == number, "a frame for every forward, while the next has not happened"
            filled.append(frame.trace.at().filled)
    assert filled == list(range(len(filled))) and len(filled) > 20
    assert not frame.running and "39" in frame.messages[-1]["content"]


@pytest.mark.parametrize("name", ["tiny-dream", "tiny-fast-dllm-v2"])
def test_every_family_is_shown_as_it_decodes(question: str, name: str) -> None:
    models = Models(lambda name: fastdllm.load(name, device="cpu"))
    caches = choose_model(models, name)[1]
    for cache in caches[1:3]:
        frame = last(ask(models, Stop(), Conversation(), question, replace(COMMON, model=name), Choice(cache)))
        messages = [{"role": "user", "content": question}]
        out = fastdllm.generate(models.current, [messages], gen_length=64, block_length=32, cache=cache, threshold=0.9)
        assert frame.messages[-1]["content"] == out.texts[0] and "39" in out.texts[0], cache
        assert len(frame.trace.steps) == out.stats.forwards and frame.trace.tokens() == out.stats.tokens


def test_the_history_goes_out_and_comes_back(models: Models, question: str) -> None:
    talk = Conversation()
    first = last(ask(models, Stop(), talk, question, COMMON, Choice()))
    assert talk.messages == [], "the conversation that came in was changed"
    second = last(ask(models, Stop(), first.conversation, "And then?", COMMON, Choice()))
    # A shipped model knows single questions, so each one begins a conversation of its own.
    assert [m["role"] for m in second.messages] == ["user", "assistant"] and second.messages[0]["content"] == "And then?"
    assert first.messages[0]["content"] == question and second.trace.prompt_length < first.trace.prompt_length


def test_stop_ends_the_computation(models: Models, question: str) -> None:
    stop = Stop()
    run = ask(models, stop, Conversation(), question, COMMON, SLOW)
    for _ in range(4):
        frame = next(run)
    stop.requested = True
    rest = list(run)
    assert len(rest) == 1 and not rest[0].running and "Stopped after 3 forwards" in rest[0].notice
    assert len(frame.trace.steps) == 3 and rest[0].conversation.messages == []
    assert not last(ask(models, stop, Conversation(), question, COMMON, Choice())).notice, "stop outlived its answer"


def test_leaving_in_the_middle_closes_the_loop(models: Models, question: str) -> None:
    run = ask(models, Stop(), Conversation(), question, COMMON, SLOW)
    for _ in range(4):
        frame = next(run)
    run.close()
    assert len(frame.trace.steps) == 3 and list(run) == []


@pytest.mark.parametrize(
    ("message", "common", "choice", "expected"),
    [
        ("", COMMON, Choice(), "message is empty"),
        (None, COMMON, Choice(), "message is empty"),
        ("z" * 100_000, COMMON, Choice(), "message is too long"),
        ("a", replace(COMMON, model="nowhere"), Choice(), "nowhere"),
        ("a", replace(COMMON, model=None), Choice(), "no model is chosen"),
        ("a", replace(COMMON, gen_length=600), Choice(), "leaves no room"),
        ("a", replace(COMMON, gen_length=8.5), Choice(), "gen_length=8.5"),
        ("a", replace(COMMON, temperature=-1), Choice(), "temperature"),
        ("a", COMMON, Choice(cache="block"), "does not fit the family"),
        ("a", COMMON, Choice(threshold=2), "threshold=2"),
        ("a", COMMON, Choice(more="nonsense"), "must be name=value"),
        ("a", COMMON, Choice(more="treshold=1"), "did you mean"),
        ("a", replace(COMMON, constraints="apples"), Choice(), "not of the form"),
        ("a", replace(COMMON, constraints="99:apples"), Choice(), "does not fit an answer of 64"),
        ("a", replace(COMMON, constraints="3:a, 3:b"), Choice(), "overlaps"),
    ],
)
def test_bad_input_is_a_sentence_on_the_page(
    models: Models, message: str | None, common: Common, choice: Choice, expected: str
) -> None:
    frames = list(ask(models, Stop(), Conversation(), message, common, choice))
    assert len(frames) == 1 and not frames[0].running
    assert expected in frames[0].notice and 'role="alert"' in frames[0].notice
    assert frames[0].box == (message or ""), "the visitor's text is kept"
    duel = last(compare(models, Stop(), message, common, [choice, choice]))
    assert expected in duel.notice and not duel.running


@pytest.mark.parametrize("message", ["<|mask|><|eos|>", "😀 \x00\x07\x1b[31m", "\ud83d half", "<script>alert(1)</script>"])
def test_strange_messages_are_answered(models: Models, message: str) -> None:
    frame = last(ask(models, Stop(), Conversation(), message, COMMON, Choice()))
    assert frame.trace.finished and frame.conversation.messages
    assert "<script" not in frame.canvas + frame.notice


def test_a_failure_in_the_middle_is_shown_and_not_remembered(
    models: Models, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    def failing(*args: object, **options: object) -> object:
        yield next(watch(*args, **options))
        raise RuntimeError("<out of memory>")

    monkeypatch.setattr(handlers, "watch", failing)
    frame = last(ask(models, Stop(), Conversation(), question, COMMON, Choice()))
    assert "&lt;out of memory&gt;" in frame.notice and not frame.running and frame.conversation.messages == []
    assert "&lt;out of memory&gt;" in last(compare(models, Stop(), question, COMMON, [SLOW, Choice()])).notice


def test_comparison_runs_both_settings_on_the_same_prompt_with_their_own_clocks(models: Models, question: str) -> None:
    for duel in compare(models, Stop(), question, COMMON, [SLOW, Choice()]):
        behind, ahead = sorted(trace.seconds() for trace in duel.traces)
        longest = max((step.seconds for trace in duel.traces for step in trace.steps), default=0)
        both = not any(trace.finished for trace in duel.traces)
        assert not both or ahead - behind <= longest, "the run whose clock is behind has not been served"
    slow, fast = duel.traces
    assert slow.finished and fast.finished and not duel.running
    assert len(fast.steps) < len(slow.steps) and slow.prompt_length == fast.prompt_length
    assert "none cache, quota 64 steps" in duel.curve and duel.canvas(0) != duel.canvas(1)


def test_stop_ends_a_comparison(models: Models, question: str) -> None:
    stop = Stop()
    run = compare(models, stop, question, COMMON, [SLOW, SLOW])
    next(run), next(run)
    stop.requested = True
    rest = list(run)
    assert len(rest) == 1 and "Stopped" in rest[0].notice and sum(len(t.steps) for t in rest[0].traces) == 1


def test_a_model_is_loaded_once_and_a_failure_keeps_the_one_before(model: Model) -> None:
    loads = []

    def load(name: str) -> Model:
        loads.append(name)
        if name == "broken":
            raise OSError("disk on fire")
        return model

    models = Models(load)
    assert loads == []
    status, caches, length = choose_model(models, "tiny-llada")
    assert "million parameters" in status and "dual" in caches and "sub_block" not in caches and length == Common.gen_length
    assert "disk on fire" in choose_model(models, "broken")[0]
    assert models.get("tiny-llada") is model and loads == ["tiny-llada", "broken"]


def test_a_model_of_short_answers_brings_their_length() -> None:
    models = Models(lambda name: fastdllm.load(name, device="cpu"))
    length = choose_model(models, "tiny-sudoku")[2]
    common = replace(COMMON, model="tiny-sudoku", gen_length=length)
    frame = last(ask(models, Stop(), Conversation(), "___3 __4_ 21__ 4___", common, Choice()))
    assert frame.messages[-1]["content"] == "1423 3241 2134 4312"


def test_the_form_becomes_the_config_it_shows() -> None:
    common = Common("m", 96.0, 16.0, 0.5, 3.0)
    config = config_of(common, Choice("default", "quota", steps=48.0, more="confidence=margin, top_k=5"))
    assert config == DecodeConfig(
        gen_length=96, block_length=16, temperature=0.5, seed=3, decoder="quota", steps=48, confidence="margin", top_k=5
    )
    for preset in PRESETS:
        shared = {"gen_length": 96, "temperature": 0.5, "seed": 3}
        assert config_of(common, Choice("none", "quota", more=f"preset={preset}")) == DecodeConfig(preset=preset, **shared)
    assert config_of(common, Choice(decoder="factor", factor=1.5)).factor == 1.5


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_words_stand_where_they_were_asked_for(models: Models, model: Model, question: str, cache: str) -> None:
    common = replace(COMMON, constraints='0:Well, 20:pencils, 40:" <|mask|>"')
    frame = last(ask(models, Stop(), Conversation(), question, common, Choice(cache)))
    ids = frame.trace.at().ids
    for position, text in ((0, "Well"), (20, " pencils"), (40, " <|mask|>")):
        tokens = parse_constraints(model, f'{position}:"{text}"', 64)
        assert model.tokenizer.decode([tokens[p] for p in sorted(tokens)]) == text
        assert all(ids[p] == token for p, token in tokens.items())
    assert frame.messages[-1]["content"].startswith("Well") and " pencils" in frame.messages[-1]["content"]
    assert model.spec.mask_id not in frame.trace.answer()


def test_the_slider_shows_any_moment_and_never_fails(models: Models, question: str) -> None:
    trace = last(ask(models, Stop(), Conversation(), question, COMMON, SLOW)).trace
    for step in (0, 1, len(trace.steps), 10_000, -3, 2.0):
        shown = at_step(trace, step)
        clipped = max(0, min(int(step), len(trace.steps)))
        assert f'data-figure="forwards">{clipped}<' in shown
        assert len(re.findall(r'class="tok[^"]*open', shown)) == 32 * (1 + (len(trace.steps) > 32)) - trace.filled()[clipped]
    assert "appears here" in at_step(None, 3)


def test_colours_cover_their_ranges() -> None:
    assert [step_colour(step, 10) for step in range(1, 11)] == list(range(10)) and step_colour(1, 1) == 0
    assert [confidence_colour(c) for c in (0, 0.49, 0.5, 0.7, 0.9, 0.989, 0.99, 1)] == [0, 0, 1, 2, 3, 3, 4, 4]


def test_the_canvas_tells_what_it_colours(models: Models, question: str) -> None:
    trace = last(ask(models, Stop(), Conversation(), question, replace(COMMON, constraints="3:apples"), SLOW)).trace
    html = tokens_html(trace)
    assert html.count("given as a constraint") == len(trace.fixed) and "confidence 0." in html and ">end<" in html
    assert curve_svg([("a", trace), ("b", trace)]).count("<polyline") == 2

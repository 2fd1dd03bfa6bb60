# SPDX-License-Identifier: Apache-2.0
"""Answers and models of the terminal chat that do not come to their end: what is said, and what is kept."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

import fastdllm
from fastdllm import DecodeConfig, Model
from fastdllm.models import find_folder
from fastdllm.trace import Trace
from fastdllm.ui import terminal
from fastdllm.ui.screen import PlainScreen
from fastdllm.ui.session import Session

Chat = Callable[..., tuple[int, str]]


def test_an_interrupt_stops_the_answer_and_forgets_the_turn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def interrupted(*_: object) -> object:
        try:
            yield Trace("m", {}, 1, 4, 1, (2,))
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(terminal, "watch", interrupted)
    out = io.StringIO()
    session = Session(lambda _: model, DecodeConfig(gen_length=64), PlainScreen(out).say, model)
    terminal.answer(session, PlainScreen(out), "Why?")
    assert closed and session.conversation.messages == []
    assert "stopped" in out.getvalue()


@pytest.mark.parametrize("end", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_retry_that_does_not_end_keeps_the_earlier_answer(
    end: BaseException, model: Model, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ending(*_: object) -> object:
        yield Trace("m", {}, 1, 4, 1, (2,))
        raise end

    out, lines = io.StringIO(), iter([question, "/retry"])
    session = Session(lambda _: model, DecodeConfig(gen_length=64), PlainScreen(out).say, model)

    def read() -> str:
        text = next(lines, None)
        if text is None:
            raise EOFError
        if text == "/retry":
            monkeypatch.setattr(terminal, "watch", ending)
        return text

    monkeypatch.setattr(terminal.reader, "piped", lambda say: read)
    monkeypatch.setattr(terminal.sys, "stdin", io.StringIO())
    terminal.chat(session, PlainScreen(out))
    for turns in (session.conversation.messages, session.conversation.said):
        assert [turn["role"] for turn in turns] == ["user", "assistant"] and "#### 39" in turns[1]["content"]
    assert "the earlier answer is kept" in out.getvalue() or "out of memory" in out.getvalue()


def test_a_failing_answer_leaves_the_chat_alive(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> object:
        yield Trace("m", {}, 1, 4, 1, (2,))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(terminal, "watch", failing)
    out = io.StringIO()
    session = Session(lambda _: model, DecodeConfig(gen_length=64), PlainScreen(out).say, model)
    terminal.answer(session, PlainScreen(out), "Why?")
    assert "out of memory" in out.getvalue() and session.conversation.messages == []


def test_a_model_that_does_not_load_is_one_line_where_nobody_could_type_another(chat: Chat, question: str) -> None:
    code, out = chat("/model tiny-llada", question, arguments=("--model", "nowhere"))
    assert code == 2 and "tokens" not in out
    code, out = chat("/model nowhere", question)
    assert code == 0 and "could not load 'nowhere'" in out and "tokens/forward" in out, "the one before is kept"


def test_a_person_can_type_another_model(model: Model, monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    """Not where the model comes from a pipe: there, it is a mistake of the command line."""
    lines = iter([question, "/model tiny-llada", question])

    def read() -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr(fastdllm, "load", lambda name, **_: model if name == "tiny-llada" else find_folder(name))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, reconfigure=lambda **_: None, fileno=lambda: -1))
    for name, stand_in in (("quiet_keys", nullcontext), ("whole_pastes", nullcontext), ("typed", lambda: read)):
        monkeypatch.setattr(terminal.reader, name, stand_in)
    said = io.StringIO()
    monkeypatch.setattr(terminal, "make_screen", lambda: PlainScreen(said))
    assert terminal.main(["--model", "nowhere", "--max-new-tokens", "64"]) == 0
    out = said.getvalue()
    assert "could not load 'nowhere'" in out and "no model is loaded" in out and "tokens/forward" in out

# SPDX-License-Identifier: Apache-2.0
"""The terminal chat as a process of its own: on a terminal, with pasted lines, on inputs of every kind."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fastdllm import DecodeConfig, Model
from fastdllm.ui import terminal
from fastdllm.ui.screen import PlainScreen
from fastdllm.ui.session import Session

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}


def test_without_a_person_an_interrupt_ends_the_chat(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited for the next line of the pipe, which only the program at the other end could close."""

    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    screen = PlainScreen(io.StringIO())
    session = Session(lambda _: model, DecodeConfig(gen_length=64), screen.say, model, goes_on=False)
    monkeypatch.setattr(terminal, "watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        terminal.answer(session, screen, "Why?")
    command = [sys.executable, "-m", "fastdllm.cli", "chat"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=ENV, text=True, **streams) as process:
        while "/help lists" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=600) == 130
        assert process.stderr.read() == "fastdllm: interrupted\n"


def until(read: Callable[[], str], text: str, seconds: float = 600) -> str:
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, f"no {text!r} in {seen!r}"
        seen += read()
    return seen


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves_with_zero() -> None:
    ours, theirs = pty.openpty()
    # 384 one-token forwards without a cache give the interrupt something to stop.
    flags = ["--gen_length", "384", "--steps", "384", "--cache", "none", "--set", "stop_ids=9"]
    command = [sys.executable, str(ROOT / "llada" / "chat.py"), *flags]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=ENV, start_new_session=True)
    os.close(theirs)

    def read() -> str:
        return os.read(ours, 65536).decode("utf-8", "replace")

    try:
        until(read, "/help lists the commands")
        os.write(ours, b"How many apples are there?\n")
        until(read, "░")
        process.send_signal(signal.SIGINT)
        until(read, "this turn is not remembered")
        os.write(ours, b"/stats\n")
        until(read, "1 answer ")
        # Typed before the prompt is there, it would be lost.
        for _ in range(60):
            os.write(ours, b"\x04")
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
                break
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.slow
def test_lines_pasted_while_no_prompt_is_open_are_one_message(question: str) -> None:
    """A terminal marks a paste where it was asked to. Asked by the prompt only, it sends earlier lines singly."""
    pytest.importorskip("prompt_toolkit")
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "llada" / "chat.py")]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=ENV, start_new_session=True)
    os.close(theirs)
    shown = ""

    def read() -> str:
        nonlocal shown
        shown += (new := os.read(ours, 65536).decode("utf-8", "replace"))
        return new

    def paste(text: str) -> None:
        marked = shown.rpartition("\x1b[?2004")[2].startswith("h")
        os.write(ours, (f"\x1b[200~{text}\x1b[201~" if marked else text).encode())

    try:
        until(read, "loading tiny-llada")
        paste(question.replace(". ", ".\n") + "\n")
        until(read, "have together?")
        os.write(ours, b"\r")
        until(read, "tokens/forward")
        assert "empty answer" not in shown and "new conversation)" not in shown.partition("have together?")[2]
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.parametrize(
    "given", ["pipe", "closed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("file", "null"))]
)
def test_the_input_need_not_be_a_terminal(given: str, question: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "llada" / "chat.py")]
    (tmp_path / "in.txt").write_text(question + "\n")
    if given == "closed":
        command = ["bash", "-c", 'exec "$@" <&-', "bash", *command]
    with (tmp_path / "in.txt").open() as file:
        stdin = {"file": file, "null": subprocess.DEVNULL}.get(given)
        text = question + "\n" if given == "pipe" else None
        done = subprocess.run(command, env=ENV, stdin=stdin, input=text, capture_output=True, text=True, timeout=600)
    if given == "closed":
        assert done.returncode == 2 and "the input is closed" in done.stderr.splitlines()[-1]
        return
    assert done.returncode == 0, done.stderr
    assert ("39" in done.stdout) == (given != "null")

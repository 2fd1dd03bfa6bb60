# SPDX-License-Identifier: Apache-2.0
"""How the chat reads a message: of several lines where somebody pastes them, opens three quotes, or presses Alt-Enter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

QUOTES = '"""'  # around a message of several lines
Read = Callable[[], str]


def is_open(text: str) -> bool:
    """Whether a message begins with three quotes and has not come to the closing ones."""
    inner = text.lstrip()
    return inner.startswith(QUOTES) and QUOTES not in inner[len(QUOTES) :]


def unquoted(text: str) -> str:
    """The message without the three quotes around it."""
    inner = text.strip()
    if not inner.startswith(QUOTES):
        return text
    return inner[len(QUOTES) :].partition(QUOTES)[0].strip("\n")


def lines_until_closed(read: Read) -> str:
    """A line of `read`, or with three quotes all lines up to the closing ones or the end of the input."""
    text = read()
    while is_open(text):
        try:
            text += "\n" + read()
        except EOFError:
            break
    return unquoted(text)


def piped(echo: Callable[[str], None]) -> Read:
    """Messages of a file or a pipe, one a line, each shown so that the output reads as a conversation."""

    def line() -> str:
        text = sys.stdin.readline()
        if not text:
            raise EOFError
        return text.rstrip("\n")

    def read() -> str:
        text = lines_until_closed(line)
        echo(f"> {text if len(text) <= 500 else f'{text[:500]}... ({len(text)} characters)'}")
        return text

    return read


def typed() -> Read:
    """Messages of a person: with prompt_toolkit where it is there, else by lines."""
    try:
        return _editor()
    except ImportError:
        with suppress(ImportError):
            import readline  # noqa: F401  (editing, history, and lines above the terminal's 4096 characters)
        return lambda: lines_until_closed(lambda: input("> "))


def _editor() -> Read:
    """Enter sends, Alt-Enter breaks the line, a paste keeps its lines, the arrow keys walk through the history."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        message="> ", multiline=True, key_bindings=keys, prompt_continuation="  ", enable_open_in_editor=False
    )

    def read() -> str:
        try:
            return unquoted(session.prompt())
        finally:
            _mark_pastes(True)  # the prompt has ended it

    return read


@contextmanager
def whole_pastes() -> Iterator[None]:
    """Meanwhile the terminal marks where a paste begins and ends, also while no prompt is open: lines that are pasted while
    a model loads or answers are one message then. Without prompt_toolkit nobody reads the marks, and there are none."""
    if find_spec("prompt_toolkit") is None or not sys.stdin.isatty():
        yield
        return
    _mark_pastes(True)
    try:
        yield
    finally:
        _mark_pastes(False)


def _mark_pastes(on: bool) -> None:
    if sys.stdout.isatty():
        sys.stdout.write(f"\x1b[?2004{'h' if on else 'l'}")
        sys.stdout.flush()


@contextmanager
def quiet_keys() -> Iterator[None]:
    """Meanwhile the terminal does not show what is typed, which would tear what is being drawn; it is read afterwards."""
    try:
        import termios

        stream = sys.stdin.fileno()
        terminal = os.isatty(stream)
    except (ImportError, OSError, ValueError):  # no such terminals here, or an input without a file
        terminal = False
    if not terminal:
        yield
        return
    before: list[Any] = termios.tcgetattr(stream)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(stream, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(stream, termios.TCSADRAIN, before)

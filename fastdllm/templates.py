# SPDX-License-Identifier: Apache-2.0
"""Chat templates that end.

A template comes with a checkpoint. jinja2's sandbox keeps it from the machine; it does not keep it from computing for ever:
loops within loops, or macros that call themselves twice. So rendering is interrupted after a time, which stops anything that
Python executes step by step. One step can be endless by itself, a power of large integers; so the operator is refused.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateSyntaxError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SECONDS = 10.0  # for one rendering; a usual one takes a thousandth of one
LONGEST = 50_000_000  # characters of a rendered conversation: more is a template that runs away


class Interrupted(BaseException):
    """Raised within code that is out of time. No `Exception`, which that code may catch."""


def rendered(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    prompt: bool,
    open_end: bool = False,
) -> str:
    """What the tokenizer's template makes of a conversation. prompt: with the start of an answer; open_end: up to where the
    last message is left open.

    Raises whatever the template raises, and ValueError or TimeoutError for one that does not end or makes too much.
    """
    if has_powers(tokenizer.chat_template):
        raise ValueError("it computes powers (**), which may take for ever; chat templates need none")
    seconds = SECONDS
    try:
        with _interrupted_after(seconds):
            text: str = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
                continue_final_message=open_end,
            )
    except Interrupted:
        raise TimeoutError(f"it has not ended within {seconds:g} s") from None
    if len(text) > LONGEST:
        raise ValueError(f"it makes {len(text)} characters of a conversation; at most {LONGEST} are allowed")
    return text


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise `Interrupted` in this thread if it is still in this context then."""
    thread, lock, left = threading.get_ident(), threading.Lock(), threading.Event()

    def interrupt() -> None:
        with lock:
            if not left.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Interrupted))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            left.set()
        timer.cancel()


@lru_cache(maxsize=16)
def has_powers(template: Any) -> bool:
    """Whether `**` stands between two values in it, rather than before a macro's arguments."""
    before = ""
    try:
        for _, kind, text in Environment().lex(str(template)):
            if kind == "operator" and text == "**" and before not in ("(", ","):
                return True
            before = before if kind == "whitespace" else text
    except TemplateSyntaxError:
        pass  # jinja2 says so when it is rendered
    return False

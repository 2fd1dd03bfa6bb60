# SPDX-License-Identifier: Apache-2.0
"""Chat templates that end.

A template comes with a checkpoint. jinja2's sandbox keeps it from the machine; it does not keep it from computing for ever:
loops within loops, or macros that call themselves twice; nor from filling the memory, by a text that it doubles again and
again. So rendering is interrupted after a time, or when the process has grown by too much, which stops anything that Python
executes step by step. One step can be endless by itself, a power of large integers; so the operator is refused. One step can
also take any memory, a text times a large number; that is not prevented.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateSyntaxError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SECONDS = 10.0  # for one rendering; a usual one takes a thousandth of one
MEMORY = 2**30  # bytes by which the process may grow meanwhile
LOOK = 0.05  # seconds between two looks at them; a usual rendering is over before the first
AGAIN = 1.0  # seconds until an interruption that had no effect is sent again; to leave takes far less
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

    Raises whatever the template raises; TimeoutError, MemoryError or ValueError for one that does not end, that fills the
    memory or makes too much.
    """
    if has_powers(tokenizer.chat_template):
        raise ValueError("it computes powers (**), which may take for ever; chat templates need none")
    limit = _Limit(SECONDS, MEMORY)
    try:
        try:
            threading.Thread(target=limit.watch, daemon=True).start()
            text: str = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
                continue_final_message=open_end,
            )
        finally:
            limit.leave()
    except Interrupted:
        limit.leave()  # it may have come on the way out
        raise limit.reasons[0] from None
    if len(text) > LONGEST:
        raise ValueError(f"it makes {len(text)} characters of a conversation; at most {LONGEST} are allowed")
    return text


class _Limit:
    """What a thread may take from now on, until it leaves: a time, and so many bytes by which the process grows.

    A thread that takes more gets `Interrupted`; `reasons` says why. Python drops what is raised in a destructor, so it gets
    that again until it leaves.
    """

    def __init__(self, seconds: float, memory: int) -> None:
        self.seconds, self.memory = seconds, memory
        self.end, self.most = time.monotonic() + seconds, resident() + memory
        self.thread, self.lock, self.left = threading.get_ident(), threading.Lock(), threading.Event()
        self.reasons: list[Exception] = []

    def watch(self) -> None:
        """Runs in a thread of its own."""
        while not self.left.wait(min(LOOK, self.seconds)):
            grown = resident() > self.most
            if not grown and time.monotonic() < self.end:
                continue
            late = TimeoutError(f"it has not ended within {self.seconds:g} s")
            self.reasons.append(MemoryError(f"it takes more than {self.memory >> 20} MiB") if grown else late)
            while not self.left.is_set():
                with self.lock:
                    if not self.left.is_set():
                        _raise_in(self.thread, Interrupted)
                self.left.wait(AGAIN)
            return

    def leave(self) -> None:
        """After it nothing is raised."""
        while not self.left.is_set():
            try:
                with self.lock:
                    self.left.set()
            except Interrupted:
                pass
        _raise_in(self.thread, None)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise `error` in a thread as soon as it runs Python code; None takes back what was not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error))


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say (it does on Linux)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


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

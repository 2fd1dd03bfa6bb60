# SPDX-License-Identifier: Apache-2.0
"""How the chat writes: in place with `rich` on a terminal, as plain lines anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, TextIO

from fastdllm import registry
from fastdllm.text import AnswerText, text_of

if TYPE_CHECKING:
    from fastdllm.models import Model
    from fastdllm.trace import Trace

MASK = "░"
STYLES = {"old": "default", "new": "bold green", "mask": "bright_black"}
CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
# Characters that turn the writing direction can reorder what the terminal shows around them.
CONTROL_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")


def printable(text: str) -> str:
    """The text with control characters made visible: an answer or a message must not steer the terminal."""
    return text.translate(CONTROL_PICTURES)


def spans(model: Model, trace: Trace) -> list[tuple[str, str]]:
    """The answer so far as (style, text): "old", "new" (written in the last forward) or "mask".

    Neighbours of one style are decoded together, because a character may be several tokens. Blocks that are not begun yet
    are left out.
    """
    now, last = trace.at(), len(trace.steps)
    reached = trace.steps[-1].stop if trace.steps else 0
    ids = trace.answer()[:reached]

    def style(at: int) -> str:
        if ids[at] == trace.mask_id:
            return "mask"
        return "new" if now.written[at] == last and not trace.finished else "old"

    out = []
    for kind, group in groupby(range(len(ids)), style):
        run = [ids[at] for at in group]
        text = MASK * len(run) if kind == "mask" else model.tokenizer.decode(run, skip_special_tokens=True)
        out.append((kind, printable(text)))
    return out


def answer_text(model: Model, trace: Trace) -> str:
    """The answer without masks and special tokens."""
    ids = [token for token in trace.answer() if token != trace.mask_id]
    return model.tokenizer.decode(ids, skip_special_tokens=True)


class PlainScreen:
    """Lines of text: for files, pipes and terminals without `rich`. An answer grows by what will not change any more."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout

    def say(self, text: str, style: str = "") -> None:
        print(printable(text), file=self.out, flush=True)

    @contextmanager
    def answering(self, model: Model) -> Iterator[Any]:
        text: AnswerText | None = None
        written = 0

        def show(trace: Trace) -> None:
            nonlocal text, written
            if text is None:
                revocable = registry.find("decoders", trace.config.get("decoder") or "threshold").revocable()
                text = text_of(model, trace.length, trace.stop_ids, (), trace.fixed, revocable)
            piece = ""
            if trace.steps:
                last, ids = trace.steps[-1], trace.at().ids
                piece = text.step(last.start, ids[last.start : last.stop])
            if trace.finished:
                piece += text.finish()
            written += len(piece.strip())
            self.out.write(printable(piece))
            self.out.flush()

        try:
            yield show
        finally:
            if written:
                print(file=self.out, flush=True)


class RichScreen:
    """A terminal: the answer is redrawn after every forward, with its masks, and filled in place."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)

    def say(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self.console.print(Text(printable(text), style=style))

    @contextmanager
    def answering(self, model: Model) -> Iterator[Any]:
        from rich.live import Live
        from rich.text import Text

        def text(trace: Trace, shown: Sequence[str] = tuple(STYLES)) -> Text:
            return Text.assemble(*((part, STYLES[kind]) for kind, part in spans(model, trace) if kind in shown))

        def tail(full: Text) -> Text:
            # What has left the screen can't be redrawn, so a long answer shows its end until it is finished.
            lines = full.wrap(self.console, self.console.width)
            return Text("\n").join(lines[-max(1, self.console.height - 3) :])

        last: Trace | None = None
        with Live(console=self.console, auto_refresh=False, transient=True) as live:

            def show(trace: Trace) -> None:
                nonlocal last
                last = trace
                live.update(tail(text(trace)), refresh=True)

            try:
                yield show
            finally:
                live.update(Text(), refresh=True)
        # What stays holds no masks: those of a stopped answer will never be filled.
        final = text(last, ("old", "new")).plain if last is not None else ""
        if final.strip():
            self.console.print(Text(final))


def make_screen() -> PlainScreen | RichScreen:
    """The best this output can do."""
    if not sys.stdout.isatty():
        return PlainScreen()
    try:
        return RichScreen()
    except ImportError:
        return PlainScreen()

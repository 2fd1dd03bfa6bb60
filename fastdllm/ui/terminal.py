# SPDX-License-Identifier: Apache-2.0
"""Chat in the terminal, for all three families: `fastdllm chat`, `python -m llada.chat`, `python v2/run_chatbot.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing, suppress

import fastdllm
from fastdllm.trace import watch
from fastdllm.ui import options
from fastdllm.ui.screen import PlainScreen, RichScreen, answer_text, make_screen
from fastdllm.ui.session import Session, count, load_model, run_command, summary

GEN_LENGTH = 128  # as the published chat scripts


def parser(default_model: str, prog: str | None = None) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog=prog,
        description="Chat with a diffusion language model in the terminal and see its answers being filled in.",
        epilog="In the chat: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves. Questions can be piped in, "
        "one a line. Names with underscores are those of the published scripts.",
    )
    options.add_model_options(out, default_model)
    options.add_decode_options(out, GEN_LENGTH)
    out.add_argument("--system", default="", metavar="TEXT", help="instructions in front of the conversation")
    return out


def answer(session: Session, screen: PlainScreen | RichScreen, text: str) -> None:
    """One turn: send the message, show the answer grow, remember both. A stopped or failed turn is not remembered."""
    if session.model is None:
        session.say("no model is loaded; /model NAME loads one", style="red")
        return
    trace, stopped = None, False
    try:
        prompt = session.conversation.prompt(session.model, text, session.config.gen_length)
        for notice in set(prompt.notices) - session.told:
            session.say(f"({notice})", style="dim")
        session.told.update(prompt.notices)
        with screen.answering(session.model) as show, closing(watch(session.model, prompt.ids, session.config)) as steps:
            try:
                for trace in steps:
                    show(trace)
            except KeyboardInterrupt:
                stopped = True
    except KeyboardInterrupt:
        stopped = True
    except Exception as error:  # one answer may fail (memory, a bad option), the chat goes on
        session.say(str(error) or type(error).__name__, style="red")
        return
    if trace is not None:
        session.total.add(trace.stats())
    if stopped or trace is None:
        took = f" after {count(len(trace.steps), 'forward')}" if trace else ""
        session.say(f"(stopped{took}; this turn is not remembered)", style="dim")
        return
    text = answer_text(session.model, trace)
    if not text.strip():
        session.say("(an empty answer: the model ended it at once)", style="dim")
    session.conversation.add(prompt, text)
    session.say(summary(trace.stats()), style="dim")


def chat(session: Session, screen: PlainScreen | RichScreen) -> None:
    """Read lines until the end of the input or /exit."""
    interactive = sys.stdin.isatty()
    while not session.over:
        try:
            line = input("> ") if interactive else read_line(session)
        except EOFError:
            session.say("")
            break
        except KeyboardInterrupt:
            session.say("\n(Ctrl-D or /exit leaves)", style="dim")
            continue
        if line.startswith("/") and not line.startswith("//"):
            run_command(session, line.strip())
        elif line.strip():
            answer(session, screen, line[1:] if line.startswith("//") else line)
        elif interactive:
            session.say("(write a question, or /help)", style="dim")


def read_line(session: Session) -> str:
    """A line of piped input, shown so that the output reads as a conversation."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    shown = line.rstrip("\n")
    session.say(f"> {shown if len(shown) <= 500 else f'{shown[:500]}... ({len(shown)} characters)'}")
    return shown


def main(arguments: Sequence[str] | None = None, default_model: str = "tiny-llada", prog: str | None = None) -> int:
    """The command; returns the exit code: 0, 1 when no model could be loaded, 2 for bad options."""
    arguments_parser = parser(default_model, prog)
    args = arguments_parser.parse_args(arguments)
    try:
        config = options.config_of(args)
    except ValueError as error:
        arguments_parser.error(str(error))
    # Bytes that are no UTF-8 come in as replacement characters rather than as an error.
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (editing, history, and lines above the terminal's 4096 characters)
    screen = make_screen()
    session = Session(lambda name: fastdllm.load(name, args.device, args.dtype, args.revision), config, screen.say)
    session.conversation.system = args.system
    try:
        load_model(session, args.model)
    except KeyboardInterrupt:
        return 130
    if session.model is not None:
        try:
            options.check(session.model, session.config)
        except ValueError as error:
            arguments_parser.error(str(error))
        session.say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", style="dim")
    chat(session, screen)
    return 0 if session.model is not None else 1

# SPDX-License-Identifier: Apache-2.0
"""Chat in the terminal, for all families: `fastdllm chat`, `python -m llada.chat`, `python v2/run_chatbot.py`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import closing

from fastdllm import libraries, registry
from fastdllm.arguments import Parser
from fastdllm.loading import add_weight_options
from fastdllm.trace import watch
from fastdllm.ui import options, reader
from fastdllm.ui.screen import PlainScreen, RichScreen, answer_text, make_screen
from fastdllm.ui.session import Session, count, fitting, load_model, run_command, summary, take_model

GEN_LENGTH = 128  # as the published chat scripts
LEAVING = ("exit", "quit")  # a line of this word


def parser(default_model: str, prog: str | None = None) -> argparse.ArgumentParser:
    out = Parser(
        prog=prog,
        description="Chat with a diffusion language model in the terminal and see its answers being filled in.",
        epilog="In the chat: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves. Questions can be piped in, "
        "one a line. Names with underscores are those of the published scripts.",
    )
    options.add_model_options(out, default_model)
    add_weight_options(out)
    registry.add_import_option(out)
    options.add_decode_options(out, GEN_LENGTH)
    out.add_argument("--system", default="", metavar="TEXT", help="instructions in front of the conversation")
    out.add_argument(
        "--pace",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="wait so long after each forward, to watch it (default 0)",
    )
    return out


def seconds(text: str) -> float:
    """A pace; ValueError for what is none."""
    value = float(text)
    if not 0 <= value <= 60:
        raise argparse.ArgumentTypeError(f"pace={text} must lie in [0, 60] seconds")
    return value


def answer(session: Session, screen: PlainScreen | RichScreen, text: str) -> bool:
    """One turn: send the message, show the answer grow, remember both. Returns whether it is remembered: a stopped or failed
    turn is not."""
    if session.model is None:
        session.say("no model is loaded; /model NAME loads one", style="red")
        return False
    trace, stopped, session.asked = None, False, text
    try:
        config = session.settings(session.model)
        prompt = session.conversation.prompt(session.model, text, config.gen_length)
        for notice in prompt.notices:
            if notice not in session.told:
                session.say(f"({notice})", style="dim")
        session.told.update(prompt.notices)
        with (
            reader.quiet_keys(),
            screen.answering(session.model) as show,
            closing(watch(session.model, prompt.ids, config)) as steps,
        ):
            try:
                for trace in steps:
                    show(trace)
                    time.sleep(session.pace)
            except KeyboardInterrupt:
                stopped = True
    except KeyboardInterrupt:
        stopped = True
    except Exception as error:  # one answer may fail (memory, a bad option), the chat goes on
        session.say(str(error) or type(error).__name__, style="red")
        return False
    if stopped and not session.goes_on:
        raise KeyboardInterrupt
    if trace is not None:
        session.trace = trace
        session.total.add(trace.stats())
    if stopped or trace is None:
        took = f" after {count(len(trace.steps), 'forward')}" if trace else ""
        kept = "the earlier answer is kept" if session.put_back else "this turn is not remembered"
        session.say(f"(stopped{took}; {kept})", style="dim")
        return False
    text = answer_text(session.model, trace)
    session.conversation.add(prompt, text)
    if not text.strip():
        known = "; it knows questions like its example only" if options.about(session.model.name) else ""
        session.say(f"(an empty answer: the model ended it at once{known})", style="dim")
        return True
    if trace.finish_reason == "length":
        session.say(f"(cut at {count(trace.length, 'token')}; /set gen_length N allows more)", style="dim")
    if session.retries and text == session.answered and config.temperature == 0:
        session.say("(the same answer: at temperature 0 nothing is drawn; /set temperature 0.7 draws)", style="dim")
    session.say(summary(trace.stats()), style="dim")
    return True


def chat(session: Session, screen: PlainScreen | RichScreen) -> None:
    """Read messages until the end of the input or /exit."""
    interactive = sys.stdin.isatty()
    with reader.quiet_keys():  # until the prompt is there, what is typed waits
        read = reader.typed() if interactive else reader.piped(session.say)
    while not session.over:
        try:
            text = read()
        except EOFError:
            session.say("")
            break
        except KeyboardInterrupt:
            if not session.goes_on:
                raise
            session.say("(Ctrl-D or /exit leaves)", style="dim")
            continue
        if text.strip().lower() in LEAVING:
            break
        session.again = session.put_back = None
        if text.startswith("/") and not text.startswith("//"):
            with reader.quiet_keys():  # a model may take a while to load
                run_command(session, text.strip())
            if session.again is not None and not answer(session, screen, session.again) and session.put_back:
                session.put_back()
        elif text.strip():
            session.retries = 0
            answer(session, screen, text[1:] if text.startswith("//") else text)
        elif interactive:
            session.say("(write a question, or /help)", style="dim")


def main(arguments: Sequence[str] | None = None, default_model: str = "tiny-llada", prog: str | None = None) -> int:
    """The command; returns the exit code: 0, 1 when no model could be loaded, 2 for bad options."""
    arguments_parser, args = registry.parse(lambda: parser(default_model, prog), arguments)
    try:
        config = options.config_of(args)
    except ValueError as error:
        arguments_parser.error(str(error))
    if not libraries.has_tokenizers():
        print(libraries.hint(arguments_parser.prog, "transformers"), file=sys.stderr)
        return 1
    if sys.stdin is None:
        arguments_parser.error("the input is closed; the chat reads messages from it")
    warnings.filterwarnings("ignore", message=".* no effect: decoder=")  # the line of the settings says it
    # Bytes that are no UTF-8 come in as replacement characters rather than as an error.
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    screen = make_screen()
    session = Session(options.loader(args), config, screen.say, goes_on=sys.stdin.isatty(), pace=args.pace)
    session.conversation.system = args.system
    with reader.whole_pastes():
        return _talk(arguments_parser, args, session, screen)


def _talk(own: Parser, args: argparse.Namespace, session: Session, screen: PlainScreen | RichScreen) -> int:
    """Load the model and chat; returns the exit code."""
    try:
        # A person can type a model that is not there anew in the chat; an adapter comes from the command line only.
        again = sys.stdin.isatty() and not args.adapter
        with reader.quiet_keys():
            (load_model if again else take_model)(session, args.model)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output is gone, which is no mistake
        raise
    except (ValueError, OSError) as error:
        print(f"{own.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if session.model is not None:
        try:
            options.check(session.model, fitting(session.model, session.config))
        except ValueError as error:
            own.error(str(error))
        session.say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", style="dim")
    chat(session, screen)
    return 0 if session.model is not None else 1

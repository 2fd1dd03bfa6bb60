# SPDX-License-Identifier: Apache-2.0
"""The state of a terminal chat and its slash commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastdllm.build import resolve
from fastdllm.config import DecodeConfig, nearest
from fastdllm.models import Model
from fastdllm.stats import Stats
from fastdllm.ui import options
from fastdllm.ui.conversation import Conversation

Say = Callable[..., None]


@dataclass
class Session:
    """What one chat remembers. `load` turns a name into a model; `model` is None until that has worked once."""

    load: Callable[[str], Model]
    config: DecodeConfig
    say: Say
    model: Model | None = None
    conversation: Conversation = field(default_factory=Conversation)
    total: Stats = field(default_factory=Stats)
    told: set[str] = field(default_factory=set)
    over: bool = False


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def summary(stats: Stats) -> str:
    """What the line below an answer says."""
    return (
        f"{count(stats.tokens, 'token')} · {count(sum(stats.row_forwards), 'forward')} · "
        f"{stats.tokens_per_forward:.2f} tokens/forward · "
        f"{stats.tokens_per_second:.1f} tokens/s · {stats.seconds:.2f} s"
    )


def load_model(session: Session, name: str) -> None:
    """Load a model and begin anew; on failure say why and keep the one before."""
    try:
        model = session.load(name)
        if model.tokenizer is None:
            raise ValueError("the folder holds no tokenizer, so there is nothing to chat with")
    except Exception as error:  # whatever a folder or a hub may hold, the chat goes on
        session.say(f"could not load {name!r}: {error}", style="red")
        session.say("/model NAME loads another one", style="dim")
        return
    session.model = model
    session.conversation.messages.clear()
    session.say(options.describe_model(model), style="bold")
    if about := options.about(name):
        session.say(f"{name} is {about.note}")
        session.say(f"try: {about.sample}")
        if session.config.gen_length >= model.spec.max_length:
            session.config = session.config.replace(gen_length=about.gen_length)
    try:
        session.say(options.describe(model, session.config), style="dim")
    except ValueError as error:
        session.say(f"{error}; /set changes it", style="red")


def reset(session: Session, rest: str) -> None:
    """forget the conversation"""
    session.conversation.messages.clear()
    session.say("new conversation")


def system(session: Session, rest: str) -> None:
    """TEXT sets the instructions in front of the conversation; /system off removes them; alone shows them"""
    if rest:
        session.conversation.system = "" if rest == "off" else rest
    session.say(f"system: {session.conversation.system or '(none)'}")


def stats(session: Session, rest: str) -> None:
    """what all answers so far took"""
    session.say(f"{count(session.total.samples, 'answer')} · {summary(session.total)}")


def settings(session: Session, rest: str) -> None:
    """NAME VALUE changes a setting (/set threshold 0.8, /set cache none); alone shows them all"""
    name, _, value = rest.replace("=", " ").partition(" ")
    if not name:
        shown = resolve(session.model.spec, session.config) if session.model else session.config
        session.say("  ".join(f"{k}={v}" for k, v in shown.given().items()))
        return
    if not value.strip():
        session.say("usage: /set NAME VALUE, for example /set threshold 0.8", style="red")
        return
    given: Any = None if value.strip().lower() == "default" else value.strip()
    config = options.change(session.config, {name: given})
    if session.model is not None:
        options.check(session.model, config)
        session.say(options.describe(session.model, config))
    session.config = config


def model(session: Session, rest: str) -> None:
    """NAME loads another model: a shipped name, a folder or a hub id"""
    if rest:
        load_model(session, rest)
    else:
        session.say(options.describe_model(session.model) if session.model else "no model is loaded")


def show_help(session: Session, rest: str) -> None:
    """this list"""
    for name, command in COMMANDS.items():
        session.say(f"  /{name:<8} {command.__doc__}")
    session.say("  Ctrl-C stops an answer, Ctrl-D leaves. A message that begins with / is written //")


def leave(session: Session, rest: str) -> None:
    """leave the chat"""
    session.over = True


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "reset": reset,
    "system": system,
    "stats": stats,
    "set": settings,
    "model": model,
    "help": show_help,
    "exit": leave,
}


def run_command(session: Session, line: str) -> None:
    """Carry out `/name rest`; an unknown name or a bad value is an answer, never an error."""
    name, _, rest = line.removeprefix("/").partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        hint = nearest(name, COMMANDS, "/{}")
        session.say(f"unknown command /{name}; {hint}/help lists them", style="red")
        return
    try:
        command(session, rest.strip())
    except ValueError as error:
        session.say(str(error), style="red")

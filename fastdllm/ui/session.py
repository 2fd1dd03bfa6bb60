# SPDX-License-Identifier: Apache-2.0
"""The state of a terminal chat and its slash commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdllm import registry, whole
from fastdllm.build import resolve
from fastdllm.config import OPTIONS, DecodeConfig, nearest
from fastdllm.fields import shown
from fastdllm.models import Model
from fastdllm.prompt_cache import PromptCache
from fastdllm.registry import Kind
from fastdllm.stats import Stats
from fastdllm.trace import Trace
from fastdllm.ui import options
from fastdllm.ui.conversation import Conversation, clean

Say = Callable[..., None]


@dataclass
class Session:
    """What one chat remembers.

    load: turns a name into a model. config: what was asked for, whatever the model. model: None until loading has worked
    once. goes_on: whether an interruption stops an answer only; without a person at the keyboard it ends the chat. pace:
    seconds to wait after each forward. asked, trace: the last question and its answer's history. again: a question that a
    command wants asked once more; retries: how often that happened, which changes the draws; answered: what it was answered
    before; put_back: remembers that answer again, should there be no other. prompts: what the turns share of their prompts.
    """

    load: Callable[[str], Model]
    config: DecodeConfig
    say: Say
    model: Model | None = None
    conversation: Conversation = field(default_factory=Conversation)
    total: Stats = field(default_factory=Stats)
    told: set[str] = field(default_factory=set)
    over: bool = False
    goes_on: bool = True
    pace: float = 0.0
    asked: str | None = None
    trace: Trace | None = None
    again: str | None = None
    retries: int = 0
    answered: str | None = None
    put_back: Callable[[], None] | None = None
    prompts: PromptCache = field(default_factory=PromptCache)

    def settings(self, model: Model) -> DecodeConfig:
        """How this model decodes the next answer. Where finished blocks never change, those of earlier turns are kept."""
        config = fitting(model, self.config)
        if self.retries:
            config = config.replace(seed=config.seed + self.retries)
        final = registry.class_of(Kind.CACHES, resolve(model.spec, config).cache).final()
        return config.replace(prompt_cache=self.prompts) if final and config.prompt_cache is None else config


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def summary(stats: Stats) -> str:
    """What the line below an answer says."""
    return (
        f"{count(stats.tokens, 'token')} · {count(sum(stats.row_forwards), 'forward')} · "
        f"{stats.tokens_per_forward:.2f} tokens/forward · "
        f"{stats.tokens_per_second:.1f} tokens/s · {stats.seconds:.2f} s"
    )


def fitting(model: Model, config: DecodeConfig) -> DecodeConfig:
    """The settings for this model: an answer that would fill its whole context is made as long as its answers are."""
    if config.gen_length < model.spec.max_length:
        return config
    about = options.about(model.name)
    return config.replace(gen_length=about.gen_length if about else max(1, model.spec.max_length // 2))


def load_model(session: Session, name: str) -> None:
    """`take_model`; on failure say why and keep the one before."""
    try:
        take_model(session, name)
    except Exception as error:  # whatever a folder or a hub may hold, the chat goes on
        session.say(f"could not load {name!r}: {error}", style="red")
        session.say("/model NAME loads another one", style="dim")


def take_model(session: Session, name: str) -> None:
    """Load a model and begin anew; the settings stay as they were asked for. Raises what `fastdllm.load` raises."""
    session.say(f"loading {name} ...", style="dim")
    model = session.load(name)
    if model.tokenizer is None:
        raise ValueError("the folder holds no tokenizer, so there is nothing to chat with")
    session.model = model
    session.conversation.clear()
    session.told.clear()
    session.say(options.describe_model(model), style="bold")
    if about := options.about(name):
        session.say(f"{name} is {about.note}")
        session.say(f"try: {about.sample}")
    try:
        config = fitting(model, session.config)
        options.check(model, config)
        session.say(options.describe(model, config), style="dim")
    except ValueError as error:
        session.say(f"{error}; /set changes it", style="red")


def reset(session: Session, rest: str) -> None:
    """forget the conversation"""
    session.conversation.clear()
    session.say("new conversation")


def system(session: Session, rest: str) -> None:
    """TEXT sets the instructions in front of the conversation; /system off removes them, /system shows them"""
    if rest:
        session.conversation.system = "" if rest == "off" else rest
    session.say(f"system: {session.conversation.system or '(none)'}")


def stats(session: Session, rest: str) -> None:
    """what all answers so far took"""
    session.say(f"{count(session.total.samples, 'answer')} · {summary(session.total)}")


def settings(session: Session, rest: str) -> None:
    """NAME VALUE changes a setting (/set threshold 0.8, /set cache none); /set shows them all"""
    name, _, value = rest.replace("=", " ").partition(" ")
    if not name:
        config = resolve(session.model.spec, fitting(session.model, session.config)) if session.model else session.config
        session.say("  ".join(f"{k}={v}" for k, v in config.given().items()))
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


def retry(session: Session, rest: str) -> None:
    """ask the last question once more, with other draws and the settings as they are now"""
    if session.asked is None:
        session.say("nothing has been asked yet", style="red")
        return
    said = session.conversation.said
    session.answered = session.put_back = None
    if said and said[-2]["content"] == clean(session.asked):
        session.answered = said[-1]["content"]
        session.put_back = session.conversation.take_back()
    session.again, session.retries = session.asked, session.retries + 1


def save(session: Session, rest: str) -> None:
    """FILE writes all that was said since the last /reset: messages as JSON to a name that ends in .json, else Markdown"""
    if not rest:
        raise ValueError("usage: /save FILE, for example /save talk.md")
    if not session.conversation.said:
        raise ValueError("nothing has been answered yet")
    talk = [dict(message) for message in session.conversation.said]
    if session.conversation.system:
        talk.insert(0, {"role": "system", "content": session.conversation.system})
    if rest.endswith(".json"):
        text = json.dumps(talk, indent=1, ensure_ascii=False)
    else:
        text = "\n\n".join(f"**{message['role']}**\n\n{message['content'].strip()}" for message in talk)
    whole.write_text(Path(rest).expanduser(), text + "\n")
    session.say(f"{count(len(talk), 'message')} -> {rest}")


def trace(session: Session, rest: str) -> None:
    """FILE writes how the last answer came to be, for fastdllm.Trace.load and scripts/studies/plot_trace.py"""
    if not rest:
        raise ValueError("usage: /trace FILE, for example /trace answer.json")
    if session.trace is None:
        raise ValueError("nothing has been answered yet")
    session.trace.save(Path(rest).expanduser())
    session.say(f"{count(len(session.trace.steps), 'forward')} -> {rest}")


def pace(session: Session, rest: str) -> None:
    """SECONDS waits so long after each forward, to watch the answer fill; 0 runs freely"""
    try:
        value = float(rest or session.pace)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 60:
        raise ValueError(f"pace={rest} must lie in [0, 60] seconds")
    session.pace = value
    session.say(f"pace: {value:g} s after each forward")


def show_help(session: Session, rest: str) -> None:
    """this list; /help NAME explains one command"""
    if rest:
        name = rest.removeprefix("/")
        if name not in COMMANDS:
            raise ValueError(_unknown(name))
        session.say(f"/{name} {COMMANDS[name].__doc__}")
        return
    for name, command in COMMANDS.items():
        session.say(f"  /{name:<8} {command.__doc__}")
    session.say("  Ctrl-C stops an answer, Ctrl-D leaves. A message that begins with / is written //")
    session.say('  Several lines: paste them, break a line with Alt-Enter, or put them between """ and """')


def leave(session: Session, rest: str) -> None:
    """leave the chat"""
    session.over = True


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "reset": reset,
    "retry": retry,
    "system": system,
    "stats": stats,
    "save": save,
    "trace": trace,
    "pace": pace,
    "set": settings,
    "model": model,
    "help": show_help,
    "exit": leave,
    "quit": leave,
}


WITHOUT_MORE = ("reset", "retry", "stats")  # commands that nothing follows


def _unknown(name: str) -> str:
    near = f"did you mean /set {name} VALUE? " if name in OPTIONS else nearest(name, COMMANDS, "/{}")
    return f"unknown command /{name}; {near}/help lists them"


def run_command(session: Session, line: str) -> None:
    """Carry out `/name rest`; an unknown name or a bad value is an answer, never an error."""
    name, rest = [*line.removeprefix("/").split(maxsplit=1), "", ""][:2]
    command = COMMANDS.get(name)
    if command is None:
        session.say(_unknown(name), style="red")
        return
    if rest and name in WITHOUT_MORE:
        session.say(f"/{name} takes nothing after it; got {shown(rest)}", style="red")
        return
    try:
        command(session, rest.strip())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        session.say(f"{where}{error.strerror or error}", style="red")
    except ValueError as error:
        session.say(str(error), style="red")

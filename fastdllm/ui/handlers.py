# SPDX-License-Identifier: Apache-2.0
"""What the web page does, as plain functions and generators: no gradio here, so that tests can call them.

A handler never raises: whatever goes wrong is a sentence on the page. It keeps no state of a visitor; conversation and
trace go in and come out. The one shared object is `Stop`, which another event sets while an answer is running.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from html import escape
from threading import Lock
from typing import Any

import torch

import fastdllm
from fastdllm import registry
from fastdllm.config import DecodeConfig
from fastdllm.models import Model
from fastdllm.trace import Trace, watch
from fastdllm.ui import options
from fastdllm.ui.canvas import answer_html, curve_svg
from fastdllm.ui.constraints import parse_constraints
from fastdllm.ui.conversation import Conversation, clean
from fastdllm.ui.screen import answer_text, spans

Messages = list[dict[str, str]]
TICK = 0.02  # seconds between two looks at the stop flag during a pause


@dataclass
class Stop:
    """Set by the Stop button; the running handler looks at it after every forward."""

    requested: bool = False


@dataclass(frozen=True)
class Common:
    """The form's fields that both sides of a comparison share. pace: seconds to wait after each forward."""

    model: str
    gen_length: float = 128
    block_length: float = 32
    temperature: float = 0.0
    seed: float = 0
    constraints: str = ""
    pace: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The fields that a comparison sets twice. A field that the decoder does not have is not used."""

    cache: str = "default"
    decoder: str = "threshold"
    threshold: float = 0.9
    factor: float = 1.0
    steps: float = 128
    more: str = ""

    def label(self) -> str:
        if "preset" in (self.more or ""):
            return self.more
        known = registry.options("decoders", self.decoder)
        value = f" {getattr(self, self.decoder)}" if self.decoder in known else ""
        value = f" {self.steps:.0f} steps" if self.decoder == "quota" else value
        return f"{self.cache} cache, {self.decoder}{value}" + (f", {self.more}" if self.more else "")


@dataclass(frozen=True)
class Frame:
    """What the chat page shows at one moment."""

    messages: Messages
    conversation: Conversation
    trace: Trace | None = None
    notice: str = ""
    running: bool = False
    box: str = ""

    @property
    def canvas(self) -> str:
        return answer_html(self.trace)

    @property
    def curve(self) -> str:
        return curve_svg([("answer", self.trace)]) if self.trace else ""


@dataclass(frozen=True)
class Duel:
    """What the comparison shows at one moment: the traces begun, by side."""

    labels: tuple[str, ...]
    traces: tuple[Trace, ...] = ()
    notice: str = ""
    running: bool = False

    def canvas(self, side: int) -> str:
        return answer_html(self.traces[side] if self.traces else None)

    @property
    def curve(self) -> str:
        return curve_svg(list(zip(self.labels, self.traces, strict=True))) if self.traces else ""


@dataclass
class Models:
    """Loads a model when it is first asked for and keeps the last one; a failure leaves the one before in place."""

    load: Callable[[str], Model] = fastdllm.load
    current: Model | None = None
    name: str = ""
    lock: Any = field(default_factory=Lock, repr=False)

    def get(self, name: str) -> Model:
        name = (name or "").strip()
        if not name:
            raise ValueError("no model is chosen")
        with self.lock:
            if self.current is None or name != self.name:
                model = self.load(name)
                # The first forward of a process pays for what later ones find ready; the clocks must not show it.
                fastdllm.generate(model, torch.tensor([model.spec.pad_id]), gen_length=1)
                self.current, self.name = model, name
            return self.current


def problem(error: Exception) -> str:
    return f'<div class="problem" role="alert">{escape(str(error) or type(error).__name__)}</div>'


def notice(*texts: str) -> str:
    return "".join(f'<div class="notice">{escape(text)}</div>' for text in texts)


def config_of(common: Common, choice: Choice) -> DecodeConfig:
    """The form as a config, the text field "more options" last; ValueError names what is wrong."""
    given: dict[str, Any] = {
        "gen_length": common.gen_length,
        "temperature": common.temperature,
        "seed": common.seed,
    }
    more = {}
    for item in filter(str.strip, (choice.more or "").split(",")):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"more options: {item.strip()!r} must be name=value")
        more[name] = value
    if "preset" not in more:  # a preset stands for a decoder, a cache, their options and a block length
        given["block_length"] = common.block_length
        known = registry.options("decoders", choice.decoder)
        given |= {"cache": None if choice.cache == "default" else choice.cache, "decoder": choice.decoder}
        given |= {name: getattr(choice, name) for name in ("threshold", "factor") if name in known}
        given |= {"steps": choice.steps} if choice.decoder == "quota" else {}
    return options.change(DecodeConfig(**given), more)


def choose_model(models: Models, name: str) -> tuple[str, list[str], int]:
    """Load a model; returns a line about it (or about what went wrong), the caches that fit it and its answers' length."""
    try:
        model = models.get(name)
    except Exception as error:  # whatever a folder or a hub may hold, the page goes on
        return problem(error), ["default", *registry.names("caches")], Common.gen_length
    text = f"<b>{escape(options.describe_model(model))}</b>"
    about = options.about(name)
    if about:
        text += f"<br>{escape(about.note[0].upper() + about.note[1:])}."
    caches = registry.caches_for(bool(model.spec.block_causal), model.spec.causal_context)
    return f'<div class="status">{text}</div>', ["default", *caches], about.gen_length if about else Common.gen_length


def pause(seconds: float, stop: Stop) -> None:
    until = time.perf_counter() + seconds
    while not stop.requested and (left := until - time.perf_counter()) > 0:
        time.sleep(min(TICK, left))


def ask(
    models: Models, stop: Stop, conversation: Conversation, message: str, common: Common, choice: Choice
) -> Iterator[Frame]:
    """One turn of the chat, a frame after every forward. A stopped or failed turn is shown but not remembered."""
    stop.requested = False
    past, message = list(conversation.messages), clean(message or "")
    idle = Frame(past, conversation)
    try:
        config = config_of(common, choice)
        model = models.get(common.model)
        options.check(model, config)
        prompt = conversation.prompt(model, message, config.gen_length)
        constraints = parse_constraints(model, common.constraints or "", config.gen_length)
    except Exception as error:  # every bad input ends here, as a sentence above the message
        yield replace(idle, notice=problem(error), box=message)
        return
    asked = [*past, {"role": "user", "content": message}]
    frame, told = idle, notice(*prompt.notices)
    try:
        with closing(watch(model, prompt.ids, config, constraints=constraints)) as traces:
            for trace in traces:
                text = "".join(part for _, part in spans(model, trace)) or "░"
                frame = Frame([*asked, {"role": "assistant", "content": text}], conversation, trace, told, True)
                yield frame
                if stop.requested:
                    break
                pause(common.pace, stop)
    except Exception as error:  # an answer may fail (memory), the page goes on
        yield replace(frame, notice=problem(error), running=False, box=message)
        return
    if not trace.finished:
        told += notice(f"Stopped after {len(trace.steps)} forwards; this turn is not remembered.")
        yield replace(frame, notice=told, running=False)
        return
    after = replace(conversation, messages=list(past))
    after.add(prompt, answer_text(model, trace))
    yield Frame(after.messages, after, trace, told)


def compare(models: Models, stop: Stop, message: str, common: Common, choices: Sequence[Choice]) -> Iterator[Duel]:
    """The same prompt under each choice, a frame after every forward.

    The run whose own clock shows less gets the next forward, so both advance as they would side by side while each forward
    has the machine to itself.
    """
    stop.requested = False
    duel = Duel(tuple(f"{name}: {choice.label()}" for name, choice in zip("AB", choices, strict=True)))
    try:
        configs = [config_of(common, choice) for choice in choices]
        model = models.get(common.model)
        for config in configs:
            options.check(model, config)
        prompts = [Conversation().prompt(model, message or "", config.gen_length) for config in configs]
        fixed = parse_constraints(model, common.constraints or "", configs[0].gen_length)
        with ExitStack() as stack:
            runs = []
            for config, prompt in zip(configs, prompts, strict=True):
                runs.append(stack.enter_context(closing(watch(model, prompt.ids, config, constraints=fixed))))
            duel = replace(duel, traces=tuple(next(run) for run in runs), running=True)
            yield duel
            while not stop.requested and (open_runs := [n for n, t in enumerate(duel.traces) if not t.finished]):
                next(runs[min(open_runs, key=lambda n: duel.traces[n].seconds())])
                yield duel
                pause(common.pace / len(open_runs), stop)
    except Exception as error:  # bad input and failures alike are a sentence on the page
        yield replace(duel, notice=problem(error), running=False)
        return
    told = notice("Stopped.") if any(not trace.finished for trace in duel.traces) else ""
    yield replace(duel, notice=told, running=False)


def at_step(trace: Trace | None, step: float) -> str:
    """The canvas as it was after `step` forwards (clipped to what there is)."""
    return answer_html(trace, None if trace is None else max(0, min(int(step), len(trace.steps))))

# SPDX-License-Identifier: Apache-2.0
"""What the page at / asks for beyond OpenAI's endpoints: models and settings to choose from, and answers under any of them.

A run of the scheduler has one decoder and one cache. The page lets visitors choose, so it keeps a run for each setting that
was asked for of late, over the same weights. Visitors who chose the same share a batch; different runs take turns.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pydantic import Field

import fastdllm
from fastdllm import config as configs
from fastdllm import registry
from fastdllm.build import assemble, check_runner, resolve
from fastdllm.config import DecodeConfig
from fastdllm.memory import positions_that_fit
from fastdllm.registry import Kind
from fastdllm.serving.errors import ApiError, Closed, Expired, as_api_error
from fastdllm.serving.protocol import ChatBody, Strict
from fastdllm.serving.responses import Asked
from fastdllm.serving.service import Service
from fastdllm.serving.words import parse_constraints
from fastdllm.ui import options
from fastdllm.ui.conversation import Conversation, Prompt

if TYPE_CHECKING:
    from fastdllm.models.spec import ModelSpec

RUNS = 6  # settings that are kept ready, besides the server's own
ROWS = 4  # visitors in the batch of one of them
MESSAGES = 199  # of a conversation that are looked at: an odd number, so that the first is a question
LOOK = 0.25  # seconds between two looks at a visitor's place in the queue
OWN_FIELDS = ("temperature", "top_p", "top_k")  # numbers of a request that a setting may bring along too
NOT_SET = (None, "")
PER_RUN = ("seed", "gen_length")  # options that come with each request, whatever the run


@dataclass(frozen=True)
class Preset:
    """A setting to choose by name. line: what it does, for whoever has to choose."""

    name: str
    label: str
    line: str
    options: Mapping[str, Any]


PRESETS = (
    Preset("server", "Server's own", "As the server was started.", {}),
    Preset(
        "one",
        "One token a step",
        "A forward for every token, nothing kept between them: the baseline.",
        {"decoder": "quota", "cache": "none"},
    ),
    Preset(
        "exact",
        "Exact",
        "The tokens of one token a step in fewer forwards: a draft, checked in the next forward.",
        {"preset": "exact"},
    ),
    Preset(
        "paper",
        "Paper",
        "Fast-dLLM as published: every token of which the model is 90% sure.",
        {"preset": "paper"},
    ),
    Preset(
        "balanced",
        "Balanced",
        "Recommended: answers as good as the published setting's or better, in fewer forwards.",
        {"preset": "balanced"},
    ),
    Preset(
        "fast",
        "Fast",
        "Fewer forwards than balanced, and now and then a slip.",
        {"preset": "fast"},
    ),
)


class PageBody(ChatBody):
    """A chat request of the page. setting: options of `DecodeConfig`. words: constraints as a visitor writes them. side: of
    a comparison, whose two runs never share a forward."""

    setting: dict[str, str | int | float | bool | None] = Field(default_factory=dict, max_length=64)
    words: str = Field("", max_length=4096)
    side: int = Field(0, ge=0, le=1)


class WordsBody(Strict):
    """Words at token positions, to be shown where they will stand."""

    model: str
    words: str = Field(max_length=4096)
    length: int = Field(ge=1)


class Run:
    """A run over a service's model, from the moment when a visitor asks for it first.

    built: its service, once that is started. ready: the same, once it is warm. users: visitors who wait for it, or whom it
    answers. gone: is called with this run where it could not be made, when nothing is left of it.
    """

    def __init__(self, built: Future[Service], gone: Callable[[Run], None]) -> None:
        self.built, self.users, self._gone = built, 0, gone
        self.ready = asyncio.ensure_future(self._warm())
        # Those who waited may have left: an error that nobody hears of is no fault of the program.
        self.ready.add_done_callback(lambda ready: None if ready.cancelled() else ready.exception())

    @property
    def idle(self) -> bool:
        """Whether it may make room for another. Not while it is being built: visitors who leave at once would else queue
        any number of them."""
        return not self.users and self.built.done()

    async def _warm(self) -> Service:
        try:
            # Shielded, as what is building may not be cancelled: it closes another run first, which nobody else does.
            service = await asyncio.shield(asyncio.wrap_future(self.built))
            await service.warm_up()
        except BaseException:
            try:
                await asyncio.to_thread(self.close)
            finally:
                self._gone(self)
            raise
        return service

    def close(self) -> None:
        """Stop, however far it is; blocks. Nobody waits for the answers of a warm-up, so that they are not finished."""
        if self.built.exception() is not None:
            return
        service = self.built.result()
        if service.state == "loading":
            service.close(0.0)
        service.close()


class Page:
    """The services that the page uses: one for each model given at the start, and a few for other settings."""

    def __init__(self, services: Sequence[Service], runs: int = RUNS) -> None:
        self.services = {service.name: service for service in services}
        # By setting, the one that was not asked for longest first. All that happens to them is on the event loop's thread.
        self._runs, self._most = OrderedDict[Hashable, Run](), runs
        # One at a time: how large a run may be is measured by the memory that the others have left.
        self._builder = ThreadPoolExecutor(1, "building")

    def start(self) -> None:
        for service in self.services.values():
            service.start()

    async def warm_up(self) -> None:
        for service in self.services.values():
            await service.warm_up()

    def close(self) -> None:
        """Finish what was taken in and stop; blocks."""
        self._builder.shutdown()  # first, so that those that are being built are known
        for run in tuple(self._runs.values()):
            run.close()
        for service in self.services.values():
            service.close()

    # What there is to choose from.

    def info(self) -> dict[str, Any]:
        """Models, settings, decoders and their options."""
        return {
            "version": fastdllm.__version__,
            "models": [describe(service) for service in self.services.values()],
            "presets": [{"name": p.name, "label": p.label, "line": p.line} for p in PRESETS],
            "decoders": [component(Kind.DECODERS, name) for name in registry.names(Kind.DECODERS)],
            "caches": [component(Kind.CACHES, name) for name in registry.names(Kind.CACHES)],
        }

    def words(self, body: WordsBody) -> dict[str, Any]:
        """Where the words stand, token by token. Raises `ApiError` for what cannot be read or does not fit."""
        service = self._service(body.model)
        length = min(body.length, service.model.spec.max_length)
        fixed = _fixed(service, body.words, length)
        return {"tokens": [{"position": at, "text": service.spelling.text(fixed[at])} for at in sorted(fixed)]}

    def _service(self, name: str | None) -> Service:
        service = next(iter(self.services.values())) if name is None else self.services.get(name)
        if service is None:
            raise ApiError(404, f"the model {str(name)[:100]!r} is not served here", "model", "model_not_found")
        return service

    # Answers.

    async def chat(self, body: PageBody) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of `Service.chunks` after one with `begin`, which says what is needed to read them as a trace, and
        before one with `end`; while the request waits, chunks with its place. Raises `ApiError` before the first."""
        own = self._service(body.model)
        length = body.length or min(own.config.gen_length, own.model.spec.max_length // 2)
        try:
            config, numbers, key = await asyncio.to_thread(plan, own, body.setting, length, body.side)
        except ValueError as error:
            raise ApiError(400, str(error), "setting") from error
        # Before a run is lent: what cannot be answered shall open none, in the place of somebody else's.
        talk = await _encode(own, body, length)
        fixed = _fixed(own, body.words, length)
        async with self._lent(own, config, key) as service:
            constraints: dict[str, str | int] = {str(at): token for at, token in fixed.items()}
            asked_for = {
                name: numbers[name] for name in OWN_FIELDS if name in numbers and body.setting.get(name) not in NOT_SET
            }
            request = body.model_copy(
                update={"constraints": constraints, "max_tokens": length, "max_completion_tokens": None, **asked_for}
            )
            request.__pydantic_extra__ = {**(body.model_extra or {}), **numbers}
            asked = service.ask(request, [talk.ids], "messages", chat=True)
            yield {"begin": {**begin(service, body, asked), "notices": list(talk.notices), "dropped": talk.dropped}}
            async with aclosing(_with_place(service, asked)) as chunks:
                async for chunk in chunks:
                    yield chunk
            result = asked.choices[0].result
            yield {"end": {"positions": result.positions if result else 0}}

    @asynccontextmanager
    async def _lent(self, own: Service, config: DecodeConfig, key: Hashable | None) -> AsyncIterator[Service]:
        """The run for a setting, named as by `plan`. It is kept as long as it is lent, or waited for."""
        if key is None:
            yield own
            return
        run = self._runs.get(key) or self._open(own, config, key)
        self._runs.move_to_end(key)
        run.users += 1
        try:
            yield await asyncio.shield(run.ready)  # a visitor who leaves takes it from nobody
        finally:
            run.users -= 1

    def _open(self, own: Service, config: DecodeConfig, key: Hashable) -> Run:
        """A new run, in the place of the one that was not asked for longest. It is made on, whoever leaves meanwhile."""
        idle = None
        if len(self._runs) >= self._most:
            idle = next((known for known, run in self._runs.items() if run.idle), None)
            if idle is None:
                raise ApiError(429, f"{len(self._runs)} other settings are at work; one of them will be free soon",
                               "setting", "settings_busy", retry_after=2)  # fmt: skip
        try:
            built = self._builder.submit(in_place_of, None if idle is None else self._runs[idle], own, config)
        except RuntimeError as error:
            raise as_api_error(Closed("the server is shutting down")) from error
        if idle is not None:
            del self._runs[idle]

        def gone(failed: Run) -> None:
            if self._runs.get(key) is failed:
                del self._runs[key]

        run = self._runs[key] = Run(built, gone)
        return run


def plan(
    own: Service, setting: Mapping[str, Any], length: int, side: int
) -> tuple[DecodeConfig, dict[str, float], Hashable | None]:
    """(config of a run, numbers of the request, name of the run; None for the server's own). ValueError for a setting that
    does not fit the model."""
    config = config_of(own.config, own.model.spec, setting)
    check_runner(own.model, config)
    if "steps" in config.given():  # they are those of an answer of this length
        config = config.replace(gen_length=length)
    resolved, run = resolve(own.model.spec, config), assemble(own.model, config)
    # All of them, given or not: the run may have been opened for a setting with others.
    numbers = {name: float(value) for name, value in run.numbers.items()}
    key = _shape(resolved, run.numbers, "steps" in config.given())
    mine = _shape(resolve(own.model.spec, own.config), own.scheduler.run.numbers, False)
    return config, numbers, None if key == mine and not side else (own.name, side, key)


def config_of(own: DecodeConfig, spec: ModelSpec, setting: Mapping[str, Any]) -> DecodeConfig:
    """A visitor's setting as a config: the name of one of `PRESETS`, or "custom", and options over it; `own` is the
    server's. ValueError for what makes no sense."""
    given = {name: value for name, value in setting.items() if value not in NOT_SET}
    if forbidden := {"runner", "batch_size", "geometry"} & given.keys():
        raise ValueError(f"{min(forbidden)} is the server's choice")
    name = str(given.pop("name", "server"))
    if name == "server":
        return own.replace(**given)
    return DecodeConfig(**{**preset(name, spec), **given, "runner": own.given().get("runner")})


def _shape(config: DecodeConfig, numbers: Mapping[str, float], by_length: bool) -> str:
    """What two runs must share to be one: everything but what comes with each request."""
    left_out = {*numbers, *(() if by_length else (*PER_RUN, "steps"))}
    return json.dumps({k: v for k, v in config.given().items() if k not in left_out}, default=str, sort_keys=True)


def preset(name: str, spec: ModelSpec) -> dict[str, Any]:
    """The options of one of `PRESETS`, as far as the model's family takes them; of "custom" none."""
    known = {**{p.name: p.options for p in PRESETS}, "custom": {}}
    if name not in known:
        raise ValueError(f"setting {name[:40]!r} is unknown; allowed are {', '.join(known)}")
    given = dict(known[name])
    if given.get("cache") not in (None, *registry.caches_for(spec)):
        del given["cache"]
    return given


def in_place_of(old: Run | None, own: Service, config: DecodeConfig) -> Service:
    """Another run once the old one has given its memory back."""
    if old is not None:
        old.close()
    return beside(own, config)


def beside(own: Service, config: DecodeConfig) -> Service:
    """Another run over the same model, for a few visitors, and most often for one. Its canvas is there: whoever asks
    next how much memory is free must find it taken."""
    positions = positions_that_fit(own.model, ROWS)
    service = Service(own.model, config, name=own.name, positions=positions, rows=ROWS, usual=1,
                      max_queue=own.scheduler.max_queue, timeout=own.timeout, beside=own)  # fmt: skip
    try:
        service.start()
        service.scheduler.call(lambda: None).result()  # the loop takes calls as soon as it has a canvas
    except BaseException:
        service.close()  # nobody else knows of its threads
        raise
    return service


def _fixed(own: Service, words: str, length: int) -> dict[int, int]:
    try:
        return parse_constraints(own.model, words, length)
    except ValueError as error:
        raise ApiError(400, str(error), "words") from error


async def _encode(own: Service, body: PageBody, length: int) -> Prompt:
    """The conversation as ids, its oldest turns left out where they no longer fit."""
    messages = [message.plain() for message in body.messages]
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    if not messages or messages[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", "messages")
    own.check_size([system, messages[-1]["content"]], "messages")
    sizes = list(accumulate(len(message["content"]) for message in reversed(messages)))
    fitting = 2 * ((sum(size <= own.longest_text for size in sizes[:MESSAGES]) - 1) // 2)  # whole turns before the question
    talk = Conversation(messages[-1 - fitting : -1], system)
    try:
        return await own.tokenize(lambda: talk.prompt(own.model, messages[-1]["content"], length), "messages")
    except Expired as error:
        raise as_api_error(error) from error
    except Exception as error:  # a chat template may raise anything of its own
        raise ApiError(400, str(error)[:500] or type(error).__name__, "messages") from error


async def _with_place(service: Service, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of an answer; while nothing has been decoded, its place in the queue when that has changed."""
    chunks = service.chunks(asked)
    pending: asyncio.Future[dict[str, Any]] | None = None
    told = 0
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(chunks))
            if not (await asyncio.wait({pending}, timeout=LOOK))[0]:
                job = asked.choices[0].job
                place = service.scheduler.place(job) if job else 0
                if place != told:
                    told = place
                    yield {"waiting": {"place": place}}
                continue
            try:
                chunk = pending.result()
            except StopAsyncIteration:
                return
            finally:
                pending = None
            yield chunk
    finally:
        if pending is not None:
            pending.cancel()
            with suppress(BaseException):
                await pending
        await chunks.aclose()


def begin(service: Service, body: PageBody, asked: Asked) -> dict[str, Any]:
    """What the history of an answer says before its first forward; see `fastdllm.trace.Trace`."""
    choice, model = asked.choices[0], service.model
    given = {**service.config.given(), "gen_length": choice.request.length, "seed": choice.request.seed}
    given |= dict(choice.request.numbers)
    length = choice.request.length
    return {
        "model": service.name,
        "config": {k: list(v) if isinstance(v, tuple) else registry.name_of(v) if k in ("cache", "decoder") else v
                   for k, v in given.items() if v is not None},
        "prompt_length": len(choice.prompt),
        "length": length,
        "mask_id": model.spec.mask_id,
        "stop_ids": list(service.scheduler.run.stop_ids),
        "fixed": {str(at): token for at, token in choice.request.fixed.items()},
        "texts": {str(token): service.spelling.text(token) for token in choice.request.fixed.values()},
        "about": options.describe(model, service.config.replace(**_shown(service, choice.request.numbers, length))),
    }  # fmt: skip


def _shown(service: Service, numbers: Mapping[str, float], length: int) -> dict[str, Any]:
    """The request's own numbers, as far as the line about a setting names them."""
    known = registry.settable(Kind.DECODERS, resolve(service.model.spec, service.config).decoder)
    return {"gen_length": length, **{k: v for k, v in numbers.items() if k in known}}


def describe(service: Service) -> dict[str, Any]:
    """A model, as the page shows it."""
    model, about = service.model, options.about(service.name)
    most = model.spec.max_length
    started = service.config
    if "gen_length" in started.given():
        length = min(started.gen_length, most - 1)
    else:
        length = about.gen_length if about else min(started.gen_length, most // 2)
    return {
        "name": service.name,
        "line": options.describe_model(model),
        "note": f"{service.name} is {about.note}" if about else "",
        "setting": options.describe(model, started.replace(gen_length=length)),
        "gen_length": length,
        "temperature": started.temperature,
        "seed": started.seed,
        "max_length": most,
        "examples": [question for question, _ in (about.examples if about else options.EXAMPLES)],
        "words": about.words if about else options.EXAMPLE_WORDS,
        "caches": list(registry.caches_for(model.spec)),
        "block_length": resolve(model.spec, DecodeConfig()).block_length,
    }


def component(kind: Kind, name: str) -> dict[str, Any]:
    """A decoder or cache with its options, each as a field of a form."""
    fields = []
    for option in registry.settable(kind, name).values():
        default = option.default if isinstance(option.default, bool | int | float | str) else None
        line, choices = option.doc.replace("`", ""), list(option.bounds.allowed())
        own = {"name": option.name, "type": option.type_name, "default": default, "line": line, "choices": choices}
        fields.append(own)
    made = registry.class_of(kind, name)
    doc = (made.__doc__ or "").strip().split("\n\n")[0]
    if doc.startswith(f"{made.__name__}("):  # what dataclasses write where nobody wrote anything
        doc = ""
    steps = kind is Kind.DECODERS and configs.keeps_to_steps(name)
    return {"name": name, "line": " ".join(doc.replace("`", "").split()), "options": fields, "steps": steps}

# SPDX-License-Identifier: Apache-2.0
"""From a checked body to an answer: what the endpoints, batch files and the page share, without HTTP."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fastdllm.build import resolve
from fastdllm.config import DecodeConfig
from fastdllm.conversations import encode_literally
from fastdllm.decisions import decide
from fastdllm.engine import Request, check
from fastdllm.prompts import encode
from fastdllm.serving.errors import ApiError, Closed, Expired, as_api_error, as_fault
from fastdllm.serving.jobs import Event, Failed, Finished, Progress
from fastdllm.serving.listening import Listening
from fastdllm.serving.listing import TokenList
from fastdllm.serving.metrics import Metrics
from fastdllm.serving.protocol import Body, ChatBody, CompletionBody, DecideBody, numbers
from fastdllm.serving.readings import PromptReadings
from fastdllm.serving.responses import Asked, Choice, Echo, Piece, Responses
from fastdllm.serving.scheduler import Scheduler
from fastdllm.serving.tokens import Spelling
from fastdllm.serving.turns import Turns
from fastdllm.text import is_cut, text_of

if TYPE_CHECKING:
    from fastdllm.models import Model

T = TypeVar("T")
WARM_ROWS = 32  # answers that are decoded together before the first caller comes
SPREAD = 4  # a normaliser may shorten a text by this factor at most (composition of characters)


class Service:
    """A model that answers.

    name: what clients call it.
    timeout: seconds that a request may take at most.
    beside: another service on the device; their forwards alternate, and its counters count for both.
    """

    def __init__(
        self,
        model: Model,
        config: DecodeConfig,
        *,
        name: str | None = None,
        positions: int | None = None,
        rows: int | None = None,
        usual: int | None = None,
        max_queue: int = 256,
        timeout: float = 600.0,
        beside: Service | None = None,
    ) -> None:
        if model.tokenizer is None:
            raise ValueError(f"model {model.name!r} has no tokenizer; a server speaks text")
        self.model, self.config, self.name, self.timeout = model, config, name or model.name, timeout
        self.turns: Turns = beside.turns if beside else Turns()
        self.scheduler = Scheduler(
            model, config, positions=positions, rows=rows, usual=usual, max_queue=max_queue, turns=self.turns
        )
        self.metrics: Metrics = beside.metrics if beside else Metrics()
        if beside is None:
            self.metrics.watch(self.scheduler)
        self.spelling = Spelling(model)
        self.responses = Responses(self.name, self.spelling, model.spec.mask_id)
        self._readings = PromptReadings(model)
        self.state = "loading"
        self._tokenizer: Any = model.tokenizer
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")
        self._longest = max((len(token) for token in model.tokenizer.get_vocab()), default=1)
        self._fixed = {
            **config.given(),
            **resolve(model.spec, config).given(),
            "stop_ids": list(self.scheduler.run.stop_ids),
        }

    def start(self) -> Service:
        self.scheduler.start()
        return self

    async def warm_up(self) -> None:
        """Decode a few answers, so that the first callers do not wait for kernels and graphs; then `state` is "ready"."""
        for count in sorted({1, self._together()}):
            prompt = torch.full((min(32, self.model.spec.max_length // 2),), self.model.spec.pad_id)
            length = min(self.config.gen_length, 64, self.model.spec.max_length - len(prompt))
            # Of growing lengths, so that they end one after another: kernels are compiled for each size of a batch.
            choices = [self._choice(i, prompt, max(1, length * (i + 1) // count), i, {}, {}, []) for i in range(count)]
            async for _ in self._pieces(choices, False, time.monotonic() + 600):
                pass
        if self.state == "loading":
            self.state = "ready"

    def _together(self) -> int:
        """Answers to warm up with at once: where steps are captured, as many as a batch of usual size has."""
        most = min(WARM_ROWS, self.scheduler.rows, 1 + self.scheduler.max_queue)
        return most if self.model.device.type == "cuda" else 1

    def close(self, timeout: float | None = None) -> None:
        """Finish what was taken in and stop."""
        self.state = "draining"
        self.scheduler.close(timeout)
        self._tokenizing.shutdown(wait=False)

    @property
    def health(self) -> str:
        """ "ready", "loading", "draining", or "failed" when the device or the loop is lost."""
        return self.state if self.scheduler.alive or self.state == "draining" else "failed"

    def models(self) -> dict[str, Any]:
        card = {"id": self.name, "object": "model", "created": 0, "owned_by": "fastdllm"}
        return {"object": "list", "data": [{**card, "max_model_len": self.model.spec.max_length}]}

    # Requests.

    async def chat(self, body: ChatBody) -> Asked:
        """Check a chat request and encode it. Raises `ApiError`."""
        self._check_model(body.model)
        self._check_answers(body.n, "n")
        messages = [message.plain() for message in body.messages]
        self.check_size([message["content"] for message in messages], "messages")
        prompt = await self._encode([messages], "messages")
        return self.ask(body, prompt, "messages", chat=True, spelt=await self._spelt(body))

    async def completions(self, body: CompletionBody) -> Asked:
        """Check a completion request and encode it. Raises `ApiError`."""
        self._check_model(body.model)
        prompts = body.prompts
        if not prompts or any(not len(prompt) for prompt in prompts):
            raise ApiError(400, "prompt is empty; at least one token is needed", "prompt")
        self._check_answers(len(prompts) * body.n, "prompt" if len(prompts) > 1 else "n")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        self.check_size(texts, "prompt")
        for prompt in prompts:
            if not isinstance(prompt, str) and len(prompt) >= self.model.spec.max_length:
                raise self._too_long(len(prompt), 1, "prompt")
        given = prompts if texts else [self._ids(prompt) for prompt in prompts]
        encoded = await self._encode(given, "prompt")
        asked = self.ask(body, encoded, "prompt", chat=False, spelt=await self._spelt(body))
        if body.echo:
            await self._echo(asked, prompts)
        return asked

    async def decide(self, body: DecideBody) -> dict[str, Any]:
        """Answer typed questions. Raises `ApiError`."""
        self._check_model(body.model)
        if body.messages is not None:
            messages = [message.plain() for message in body.messages]
            self.check_size([message["content"] for message in messages], "messages")
            prompt: Any = (await self._encode([messages], "messages"))[0]
        else:
            text = isinstance(body.prompt, str)
            self.check_size([str(body.prompt)] if text else [], "prompt")
            prompt = (await self._encode([body.prompt if text else self._ids(body.prompt)], "prompt"))[0]
        questions = [question.model_dump(exclude_none=True) for question in body.questions]
        self.check_size([str(question) for question in questions], "questions")
        try:
            answers = await self._call(lambda: decide(self.model, prompt, questions), time.monotonic() + self.timeout)
        except ValueError as error:
            raise ApiError(400, str(error), "questions") from error
        return {
            "id": f"decide-{uuid.uuid4().hex}",
            "object": "decision",
            "created": int(time.time()),
            "model": self.name,
            "answers": {
                name: {
                    "type": answer.type,
                    "answer": answer.answer,
                    "probabilities": {str(option): p for option, p in answer.probabilities.items()},
                    **({} if answer.mean is None else {"mean": answer.mean}),
                }
                for name, answer in answers.items()
            },
            "usage": {"prompt_tokens": answers.prompt_tokens, "canvases": answers.canvases, "forwards": answers.forwards},
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404, f"the model {name[:100]!r} does not exist; here is {self.name!r}", "model", "model_not_found"
            )

    def _check_answers(self, count: int, param: str) -> None:
        """Refuse more answers than can ever be taken in before anything is made of them."""
        most = self.scheduler.rows + self.scheduler.max_queue
        if count > most:
            raise ApiError(400, f"{count} answers at once are more than this server ever takes, {most}", param)

    @property
    def longest_text(self) -> int:
        """Characters beyond which no text fits the model's context."""
        return self.model.spec.max_length * self._longest * SPREAD

    def check_size(self, texts: Sequence[str], param: str) -> None:
        """Refuse what cannot fit before it is tokenised, which takes long for megabytes."""
        if (characters := sum(map(len, texts))) > self.longest_text:
            room = self.model.spec.max_length
            raise ApiError(413, f"{characters:,} characters in {param} are more than a context of {room} tokens can hold",
                           param, "context_length_exceeded")  # fmt: skip

    def _too_long(self, prompt: int, length: int, param: str) -> ApiError:
        room = self.model.spec.max_length
        return ApiError(
            400,
            f"{param}: {prompt} tokens of prompt and {length} of answer exceed the model's context of {room}",
            param,
            "context_length_exceeded",
        )

    def _ids(self, ids: Any) -> Tensor:
        if any(not 0 <= token < self.model.spec.vocab for token in ids):
            raise ApiError(400, f"prompt has token ids outside 0..{self.model.spec.vocab - 1}", "prompt")
        return torch.tensor(ids, dtype=torch.long)

    async def _encode(self, prompts: Any, param: str) -> list[Tensor]:
        try:
            return await self.tokenize(lambda: encode(self.model, prompts), param)
        except (ApiError, Expired) as error:
            raise as_api_error(error) from error
        except Exception as error:  # a chat template may raise anything of its own
            raise ApiError(400, f"{param}: {str(error) or type(error).__name__}"[:500], param) from error

    async def tokenize(self, work: Callable[[], T], what: str) -> T:
        """`work` on the thread that the tokenizer belongs to; `Expired` when `what` takes too long."""
        try:
            working = asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        except RuntimeError as error:
            raise as_api_error(Closed("the server is shutting down")) from error
        return await _in_time(working, time.monotonic() + self.timeout, f"{what} was not encoded in time")

    async def _spelt(self, body: Body) -> dict[str, list[int]]:
        """The tokens of the constraints that are texts, by position."""
        texts = {key: value for key, value in (body.constraints or {}).items() if isinstance(value, str)}
        if not texts:
            return {}
        self.check_size(list(texts.values()), "constraints")
        try:
            return await self.tokenize(
                lambda: {key: encode_literally(self.model, text) for key, text in texts.items()}, "constraints"
            )
        except Expired as error:
            raise as_api_error(error) from error
        except ValueError as error:
            raise ApiError(400, f"constraints: {error}", "constraints") from error

    def ask(
        self, body: Body, prompts: list[Tensor], param: str, chat: bool, spelt: Mapping[str, list[int]] | None = None
    ) -> Asked:
        """The choices of a request: `n` for every prompt, each with a seed of its own.

        spelt: the tokens of the constraints that are texts.
        """
        given = numbers(body.others(), self._numbers(), self._fixed)
        for name in ("temperature", "top_p", "top_k"):
            if getattr(body, name) is not None:
                given[name] = getattr(body, name)
        if (body.top_alternatives or 0) > self.scheduler.alternatives:
            raise ApiError(
                400, f"this server keeps {self.scheduler.alternatives} alternatives of each token", "top_logprobs"
            )
        seed = self.config.seed if body.seed is None else body.seed
        choices: list[Choice] = []
        for prompt in prompts:
            room = self.model.spec.max_length - len(prompt)
            length = body.length or min(self.config.gen_length, max(room, 1))
            if length > room:
                raise self._too_long(len(prompt), length, param if room < 1 or body.length is None else "max_tokens")
            fixed = self._constraints(body.constraints or {}, length, spelt or {})
            for _ in range(body.n):
                own = (length, (seed + len(choices)) % 2**63, given, fixed, body.stops, body.top_alternatives or 0)
                choices.append(self._choice(len(choices), prompt, *own))
            self._check(choices[-1].request)  # the others differ in their seeds
        deadline = time.monotonic() + min(body.timeout or self.timeout, self.timeout)
        return Asked(body, choices, chat, deadline)

    def _check(self, request: Request) -> None:
        """Refuse here what the engine would refuse, with the field that is at fault."""
        try:
            check(self.model, self.scheduler.run, request)
        except ValueError as error:
            names = [*request.numbers, *(["constraints"] if request.fixed else [])]
            param = next((name for name in names if str(error).startswith(name.removesuffix("s"))), None)
            raise ApiError(400, f"{param}: {error}" if param else str(error), param) from error

    def _numbers(self) -> frozenset[str]:
        """Names of what a request may set for itself."""
        return frozenset(self.scheduler.run.numbers)

    def _constraints(self, given: Mapping[str, str | int], length: int, spelt: Mapping[str, list[int]]) -> dict[int, int]:
        """Tokens to fix, by position of the answer: ids as they are, texts as their tokens `spelt` from there on."""
        fixed: dict[int, int] = {}
        for key, value in given.items():
            if not key.isascii() or not key.isdigit() or int(key[:9]) >= length or len(key) > 9:
                raise ApiError(
                    400, f"constraints: {key[:40]!r} is not a position of the answer, 0..{length - 1}", "constraints"
                )
            tokens = [value] if isinstance(value, int) else spelt[key]
            for at, token in enumerate(tokens, start=int(key)):
                if at >= length or at in fixed:
                    what = "does not fit the answer" if at >= length else "overlaps another one"
                    raise ApiError(400, f"constraints: {str(value)[:40]!r} at position {key} {what}", "constraints")
                fixed[at] = token
        return fixed

    def _choice(
        self,
        number: int,
        prompt: Tensor,
        length: int,
        seed: int,
        given: Mapping[str, float],
        fixed: dict[int, int],
        stops: list[str],
        alternatives: int = 0,
    ) -> Choice:
        ends = None
        if stops:

            def ends(ids: Tensor) -> bool:
                return is_cut(self._decode(ids.tolist()), stops)

        # A stop token may be written before a constraint; then the answer is decoded to its end.
        request = Request(prompt, length, seed, fixed, () if fixed else None, dict(given), ends, alternatives)
        text = text_of(self.model, length, self.scheduler.run.stop_ids, stops, fixed, self.scheduler.revocable)
        return Choice(number, prompt, request, text, TokenList(self._decode, length))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    async def _echo(self, asked: Asked, prompts: Sequence[Any]) -> None:
        """Give every choice its prompt to repeat, with the log-probabilities of its tokens if they are wanted."""
        echoes: dict[int, Echo] = {}
        call = partial(self._call, deadline=asked.deadline)
        for choice in asked.choices:
            if id(choice.prompt) not in echoes:
                given = prompts[choice.number // asked.body.n]
                text = given if isinstance(given, str) else self._decode(given)
                wanted = asked.body.top_alternatives is not None
                readings, forwards = await self._readings.of(choice.prompt, call) if wanted else (None, 0)
                echoes[id(choice.prompt)] = Echo(text, readings)
                asked.scored += forwards
            choice.echo = echoes[id(choice.prompt)]

    async def _call(self, work: Callable[[], T], deadline: float) -> T:
        """`work` on the thread that owns the device, between two rounds."""
        try:
            return await _in_time(
                asyncio.wrap_future(self.scheduler.call(work)), deadline, "the prompt was not scored in time"
            )
        except ValueError:
            raise
        except Exception as error:
            raise as_api_error(error) from error

    # Answers.

    async def answer(self, asked: Asked) -> dict[str, Any]:
        """The whole response. Cancelling withdraws the request."""
        watched = bool(asked.body.top_alternatives)
        async with aclosing(self._pieces(asked.choices, watched, asked.deadline)) as pieces:
            async for _ in pieces:
                pass
        return self.responses.whole(asked)

    async def chunks(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        """The response in chunks, as they are sent one event each. Closing withdraws the request."""
        head = self.responses.chunk_head(asked)
        options = asked.body.stream_options
        async with aclosing(self._pieces(asked.choices, True, asked.deadline)) as pieces:
            await anext(pieces)  # taken in; only now may anything be sent
            for choice in asked.choices:
                if first := self.responses.first(asked, choice):
                    yield {**head, "choices": [first]}
            async for piece in pieces:
                choice = piece.choice
                if options and options.include_denoising and piece.progress and piece.progress.forward > choice.forwards:
                    choice.forwards = piece.progress.forward
                    yield {**head, "choices": [], "denoising": self.responses.denoising(piece)}
                reason = choice.reason if piece.over else None
                if piece.text or reason:
                    yield {**head, "choices": [self.responses.delta(asked, choice, piece.text, reason)]}
        if options and options.include_usage:
            yield {**head, "choices": [], "usage": self.responses.usage(asked)}

    async def _pieces(self, choices: list[Choice], watched: bool, deadline: float) -> AsyncGenerator[Piece, None]:
        """What happens to the choices, as it happens, after an empty piece once they are taken in. All are withdrawn when
        this is closed before its end."""
        begun, first = time.monotonic(), True
        try:
            requests = [choice.request for choice in choices]
            listening = Listening(self.scheduler, requests, watched=watched, deadline=deadline)
        except Exception as error:
            raise as_api_error(error) from error
        for choice, job in zip(choices, listening.jobs, strict=True):
            choice.job = job
        with listening:
            yield Piece(choices[0], "")
            async for number, event in listening.events():
                if isinstance(event, Failed):
                    raise as_fault(event.error) from event.error
                piece = self._take_in(choices[number], event)
                if first and watched and piece.text:
                    first = False
                    self.metrics.first_text.observe(time.monotonic() - begun)
                yield piece
            self.metrics.finished(choices, time.monotonic() - begun)

    def _take_in(self, choice: Choice, event: Event) -> Piece:
        if isinstance(event, Progress):
            choice.tokens.committed(event)
            return Piece(choice, choice.text.step(event.start, event.ids), event)
        assert isinstance(event, Finished)
        choice.result = event
        return Piece(choice, choice.text.finish(event.ids), None, True)


async def _in_time(work: Awaitable[T], deadline: float, message: str) -> T:
    """What `work` gives; `Expired` with the message once `deadline`, of `time.monotonic`, has passed."""
    left = deadline - time.monotonic()
    try:
        return await asyncio.wait_for(work, left if math.isfinite(left) else None)
    except asyncio.TimeoutError:
        raise Expired(message) from None

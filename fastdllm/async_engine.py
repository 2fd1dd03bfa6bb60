# SPDX-License-Identifier: Apache-2.0
"""One model for many asyncio callers: a web application's requests, or the rollouts of reinforcement learning.

`AsyncEngine` is the scheduler of `fastdllm serve` without the server. Requests join the batch while others are at work, and
each gets the answer that `generate` gives.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fastdllm.build import resolve
from fastdllm.config import DecodeConfig, rename
from fastdllm.engine import Request, Result
from fastdllm.fields import is_integer, shown
from fastdllm.generation import (
    ROWS,
    Call,
    Constraints,
    Output,
    add_answer,
    answer_text,
    call_of,
    merged,
    prompts_of,
    renamed,
)
from fastdllm.memory import positions_that_fit
from fastdllm.prompts import Prompts, check_model, encode
from fastdllm.serving.errors import Closed
from fastdllm.serving.jobs import Failed, Finished, Progress
from fastdllm.serving.listening import Listening
from fastdllm.serving.scheduler import Scheduler
from fastdllm.stats import peak_memory

if TYPE_CHECKING:
    from fastdllm.models import Model

T = TypeVar("T")
OWN = ("gen_length", "seed")  # options of a request, besides the numbers of its decoding


class AsyncEngine:
    """A model that any number of asyncio tasks ask at once, in one continuous batch.

    model: what `load` returned.
    config, options: see `DecodeConfig`; they hold for all requests. batch_size is the most requests at work together. The
        steps are those of an answer of the engine's gen_length; longer and shorter ones keep that pace.
    max_queue: requests that may wait; one more raises `Overloaded`. None: any number.

    Use it in one event loop, as an async context manager, or call `close`. At the end of the context the requests that were
    taken are finished; after an error in its body they end with `Closed` instead. Raises ValueError for bad options.
    """

    def __init__(
        self, model: Model, config: DecodeConfig | None = None, *, max_queue: int | None = None, **options: Any
    ) -> None:
        check_model(model)
        if max_queue is not None and (not is_integer(max_queue) or max_queue < 0):
            raise ValueError(f"max_queue={shown(max_queue)} must be None or an integer of at least 0")
        self.model, self.config = model, merged(config, options)
        rows = self.config.batch_size
        positions = positions_that_fit(model, ROWS) if rows is None else None
        queue = sys.maxsize if max_queue is None else max_queue
        self._scheduler = Scheduler(model, self.config, positions=positions, rows=rows or ROWS, max_queue=queue)
        self._run, self._shared = self._scheduler.run, resolve(model.spec, self.config)
        self._encoding = ThreadPoolExecutor(1, "encoding")
        self._entering: set[asyncio.Future[Call]] = set()
        self._closed = False
        self._scheduler.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close(cancel=error is not None)

    async def close(self, *, cancel: bool = False) -> None:
        """Take no further requests, finish those taken, and stop. cancel: end them with `Closed` instead."""
        self._closed = True
        while self._entering and not cancel:  # they go to the scheduler before this task goes on
            await asyncio.wait(tuple(self._entering))
        await asyncio.to_thread(self._scheduler.close, 0.0 if cancel else None)
        self._encoding.shutdown(wait=False)

    async def generate(
        self,
        prompts: Prompts | None = None,
        *,
        constraints: Constraints = None,
        stop: str | Sequence[str] | None = None,
        num_return_sequences: int = 1,
        attention_mask: Any = None,
        **options: Any,
    ) -> Output:
        """Answer every prompt, as `fastdllm.generate` does; the arguments are the same.

        options: gen_length, seed, and the numbers of decoding (temperature, top_p, top_k, threshold, ...), in place of the
            engine's. All else is chosen once, for the engine.

        In `stats`, seconds are those of this call, waiting included, and forwards is the most that one answer took, since
        forwards are shared with other callers. Cancelling the task frees its rows within one forward. Raises ValueError for
        bad input, `Closed` once the engine is closed, `Overloaded` when max_queue requests wait, `NotANumber` where the
        model's output was NaN, and the device's error if the request ran into one.
        """
        given = renamed(options, stop=stop, num_return_sequences=num_return_sequences)
        stop, copies = given.pop("stop", None), given.pop("num_return_sequences", 1)
        begun = time.perf_counter()
        call = await self._understand(prompts_of(prompts, given), constraints, stop, copies, attention_mask, given)
        results: dict[int, Result] = {}
        with Listening(self._scheduler, call.requests, watched=False) as listening:
            async for number, event in listening.events():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    results[number] = _result(call.requests[number], event)
        out = Output()
        texts = [add_answer(out, call, request, results[i]) for i, request in enumerate(call.requests)]
        out.texts = None if self.model.tokenizer is None else texts
        out.stats.seconds, out.stats.forwards = time.perf_counter() - begun, max(out.stats.row_forwards)
        out.stats.peak_memory = peak_memory(self.model.device)
        return out

    async def stream_text(
        self,
        prompt: Prompts | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        constraints: dict[int, int] | None = None,
        attention_mask: Any = None,
        **options: Any,
    ) -> AsyncGenerator[str, None]:
        """The answer to one prompt in pieces of text that will not change any more; joined, they are the answer.

        As `fastdllm.stream_text`; options and errors as in `generate`. Closing the iterator (`contextlib.aclosing`), or
        cancelling the task, frees the row within one forward.
        """
        given = renamed(options, stop=stop)
        stop, prompt = given.pop("stop", None), prompts_of(prompt, given)
        call = await self._understand(prompt, constraints, stop, 1, attention_mask, given)
        answer = answer_text(call)
        with Listening(self._scheduler, call.requests, watched=True) as listening:
            async for _, event in listening.events():
                if isinstance(event, Failed):
                    raise event.error
                rest = answer.step(event.start, event.ids) if isinstance(event, Progress) else answer.finish(event.ids)
                if rest:
                    yield rest
                if answer.ended:
                    return

    async def call(self, work: Callable[[], T]) -> T:
        """What `work()` gives, run between two forwards: `engine.call(lambda: fastdllm.log_likelihoods(model, pairs))`.

        The other requests wait meanwhile; they go on by a forward before the next call. Raises what `work` raises, `Closed`
        once the engine is closed, and `Overloaded` when more than max_queue calls wait.
        """
        self._check_open()
        return await asyncio.wrap_future(self._scheduler.call(work))

    async def _understand(
        self,
        prompts: Prompts,
        constraints: Constraints,
        stop: Any,
        copies: int,
        attention_mask: Any,
        options: Mapping[str, Any],
    ) -> Call:
        """The call, encoded on a thread of its own: a long prompt must not hold up the event loop."""
        self._check_open()
        config, numbers = self._own(options)

        def work() -> Call:
            ids = encode(self.model, prompts, attention_mask)
            return call_of(self.model, ids, config, constraints, stop, copies, self._run, numbers)

        encoding = asyncio.get_running_loop().run_in_executor(self._encoding, work)
        self._entering.add(encoding)
        encoding.add_done_callback(self._entering.discard)
        return await encoding

    def _own(self, options: Mapping[str, Any]) -> tuple[DecodeConfig, dict[str, float]]:
        """The config of one request, and those of the run's numbers that it replaces; None is the engine's own value.

        ValueError for an option that all requests share, at another value than the engine has.
        """
        given = {name: value for name, value in rename(options).items() if value is not None}
        config, shared = self.config.replace(**given), vars(self._shared)
        allowed = (*OWN, *self._run.numbers)
        for name, value in given.items():
            if name not in allowed and getattr(config, name) != shared.get(name):
                raise ValueError(
                    f"{name}={shown(value)} holds for all requests of an engine: give it to AsyncEngine; "
                    f"a request may have its own {', '.join(allowed)}"
                )
        own = {name: value for name in self._run.numbers if name in given and (value := getattr(config, name)) is not None}
        return config, {name: float(value) for name, value in own.items()}

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this engine is closed and takes no further requests")


def _result(request: Request, event: Finished) -> Result:
    """The engine's result, on the CPU."""
    ids = torch.cat([request.prompt.cpu(), torch.tensor(event.ids, dtype=torch.long)])
    return Result(ids, torch.tensor(event.logprobs), torch.tensor(event.committed_at), event.cost)

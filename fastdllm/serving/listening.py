# SPDX-License-Identifier: Apache-2.0
"""From the scheduler's threads to asyncio: requests that are handed over together, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType

from fastdllm.engine import Request
from fastdllm.serving.jobs import Event, Progress
from fastdllm.serving.scheduler import Scheduler


class Listening:
    """Requests that the scheduler has taken, all or none. Leaving the context withdraws those that are not over.

    Raises what `Scheduler.submit` raises. watched: whether there is a `Progress` for each forward. deadline: of
    `time.monotonic`.
    """

    def __init__(
        self, scheduler: Scheduler, requests: Sequence[Request], *, watched: bool, deadline: float | None = None
    ) -> None:
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        listeners = [self._listener(number) for number in range(len(requests))]
        self.jobs = scheduler.submit_all(list(requests), listeners, watched=watched, deadline=deadline)

    def _listener(self, number: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return deliver

    def __enter__(self) -> Listening:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for job in self.jobs:
            self._scheduler.withdraw(job)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(number of the request, event) as they come, until each request had its last one."""
        left = len(self.jobs)
        while left:
            number, event = await self._events.get()
            left -= not isinstance(event, Progress)
            yield number, event

# SPDX-License-Identifier: Apache-2.0
"""Where the requests of a run come from.

The engine numbers requests in the order in which it receives them, from 0, and asks its source between two rounds, on the
thread that decodes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from fastdllm.engine.row import Request


class Source(Protocol):
    """Hands over requests, and says which ones nobody wants any more."""

    def known(self) -> Sequence[Request] | None:
        """Every request there will ever be, or None where more may come."""

    def take(self, idle: bool) -> Sequence[Request] | None:
        """The requests that are new, in order. None: no more will come.

        idle: nothing waits or runs, so this call may block until something comes.
        """

    def withdrawn(self) -> Collection[int]:
        """Numbers of requests to drop, of those that were handed over; they may have ended meanwhile. Each is told once."""

    def meanwhile(self) -> None:
        """Called after each launch of a forward, while the device computes: time for the source's other work."""


class Listed:
    """All requests at once."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests: Sequence[Request] | None = requests
        self._all = requests

    def known(self) -> Sequence[Request]:
        return self._all

    def take(self, idle: bool) -> Sequence[Request] | None:
        new, self.requests = self.requests, None
        return new

    def withdrawn(self) -> Collection[int]:
        return ()

    def meanwhile(self) -> None:
        pass


class Live:
    """A source that any thread may feed while the run goes on.

    check: called with each request on the thread that submits it; what it raises is the submitter's error, and the run goes
    on.
    """

    def __init__(self, check: Callable[[Request], None] | None = None) -> None:
        self._check = check
        self._changed = threading.Condition()
        self._new: list[Request] = []
        self._withdrawn: set[int] = set()
        self._count = self._handed = 0
        self._closed = False

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number. Raises RuntimeError after `close`."""
        if self._check is not None:
            self._check(request)
        with self._changed:
            if self._closed:
                raise RuntimeError("this source is closed")
            self._new.append(request)
            self._count += 1
            self._changed.notify()
            return self._count - 1

    def withdraw(self, number: int) -> None:
        """Drop a request; the engine frees its place before the next round. Harmless for one that has ended.

        Raises ValueError for a number that `submit` never returned.
        """
        with self._changed:
            if not 0 <= number < self._count:
                raise ValueError(f"number={number} is no request of this source, which has taken {self._count}")
            self._withdrawn.add(number)
            self._changed.notify()

    def close(self) -> None:
        """No more requests will come; the run ends with the last of those that are there."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def known(self) -> None:
        return None

    def take(self, idle: bool) -> list[Request] | None:
        with self._changed:
            while idle and not (self._new or self._closed):
                self._withdrawn.clear()  # nothing waits or runs that they could name
                self._changed.wait()
            if self._closed and not self._new:
                return None
            new, self._new = self._new, []
            self._handed += len(new)
            return new

    def withdrawn(self) -> Collection[int]:
        with self._changed:
            # A request may come and be withdrawn since the engine asked for new ones; it does not know the number yet.
            numbers = {number for number in self._withdrawn if number < self._handed}
            self._withdrawn -= numbers
            return numbers

    def meanwhile(self) -> None:
        pass

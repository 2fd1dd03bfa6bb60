# SPDX-License-Identifier: Apache-2.0
"""Runs of several settings on one device, a forward each in turn.

A comparison needs clocks that say what a forward takes by itself, so no two forwards may be at work at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that goes to whoever has waited longest, so that runs alternate: an ordinary lock may go to its last holder."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()  # the first one has the turn

    def take(self) -> None:
        """Wait for the turn."""
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            while self._line[0] is not ticket:
                self._changed.wait()

    def give(self) -> None:
        """Let the next one have it."""
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give()

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Without the turn for a while; for its holder."""
        self.give()
        try:
            yield
        finally:
            self.take()

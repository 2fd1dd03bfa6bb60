# SPDX-License-Identifier: Apache-2.0
"""What the processes below this one use together: time, and memory of their own. Read from Linux's /proc."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import suppress

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = resource.getpagesize()
_INTERVAL = 0.05  # seconds between looks at /proc
_SLOWEST = 10.0  # times the limit, by the clock


class Usage:
    """The clock of one run: processor time while one of its processes is ready to run, else time by the wall.

    A program that others keep waiting for a processor is not charged for it, up to `_SLOWEST` times its limit. While
    processes come and go it is: what those used that nobody waits for is told nowhere.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._looked = self._elapsed = 0.0
        self._baseline = _memory(os.getpid())
        self._found: set[int] = set()
        self._first = self._last = sum(map(_processor_seconds, descendants()))

    def wall(self) -> float:
        return time.monotonic() - self._started

    def exceeded(self, seconds: float, memory: int) -> tuple[str, str] | None:
        """Status and message if the processes have used too much; looks at /proc only now and then."""
        now = self.wall()
        if now < self._looked + _INTERVAL:
            return None
        found = descendants()
        self._advance(now, found)
        if sum(max(0, _memory(pid) - self._baseline) for pid in found) > memory:
            return "failed", f"MemoryError: its processes used more than {memory >> 20} MiB together"
        if self._last - self._first > seconds:
            return "timed out", f"used more than {seconds:g} seconds of processor time"
        if self._elapsed > seconds or now > _SLOWEST * seconds:
            return "timed out", "did not end within the time limit"
        return None

    def _advance(self, now: float, found: set[int]) -> None:
        processor = sum(map(_processor_seconds, found))
        passed, used = now - self._looked, max(0.0, processor - self._last)
        ready = any(_stat(pid)[:1] in (["R"], ["D"]) for pid in found)
        known = ready and found == self._found
        # A look that comes late says that this process was kept waiting, and so the program may have been.
        self._elapsed += min(passed, used) if known else min(passed, max(used, 2 * _INTERVAL))
        self._looked, self._last, self._found = now, max(processor, self._last), found


def descendants(root: int | None = None) -> set[int]:
    """All processes below `root`, or below this one; empty where there is no /proc."""
    parents = {pid: int(found[1]) for pid in _processes() if (found := _stat(pid))}
    found_: set[int] = set()
    ring = {root or os.getpid()}
    while ring:
        ring = {pid for pid, parent in parents.items() if parent in ring} - found_
        found_ |= ring
    return found_


def threads_of_this_user() -> int:
    return sum(_threads(pid) for pid in _processes() if _owner(pid) == os.getuid())


def _processes() -> Iterator[int]:
    with suppress(OSError):
        yield from (int(name) for name in os.listdir("/proc") if name.isdigit())


def _read(path: str) -> str:
    """The file's text; nothing where it is gone, with its process, or was never there."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on: state, parent, ..."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _processor_seconds(pid: int) -> float:
    """Of the process, and of its children that have ended and been waited for."""
    fields = _stat(pid)
    return sum(int(ticks) for ticks in fields[11:15]) / _TICK


def _memory(pid: int) -> int:
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * _PAGE if fields else 0


def _owner(pid: int) -> int | None:
    with suppress(OSError):
        return os.stat(f"/proc/{pid}").st_uid
    return None


def _threads(pid: int) -> int:
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0

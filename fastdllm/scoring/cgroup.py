# SPDX-License-Identifier: Apache-2.0
"""A control group (cgroup v2) for one program: one limit for the memory of all its processes together.

Only a folder that already hands on the memory and pids controllers is used; other processes are never moved.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

MOUNT, MEMBERSHIP = "/sys/fs/cgroup", "/proc/self/cgroup"
_NEEDED = {"memory", "pids"}


class ControlGroup:
    """A group below one that this process may write to; OSError where there is none."""

    def __init__(self, memory: int, processes: int, mount: str = MOUNT, membership: str = MEMBERSHIP) -> None:
        """Limits: `memory` in bytes, files in memory and page cache included, and `processes`."""
        self.folder = f"{_delegated(mount, membership)}/score-{os.getpid()}"
        os.mkdir(self.folder)
        try:
            self._write("memory.max", memory)
            self._write("pids.max", processes)
            for name, amount in (("memory.swap.max", 0), ("memory.oom.group", 1)):
                with suppress(OSError):  # absent without swap, and on old kernels
                    self._write(name, amount)
        except OSError:
            self.remove()
            raise

    def enter(self) -> None:
        """Move this process into the group; its children are born there."""
        self._write("cgroup.procs", 0)

    def remove(self, patience: float = 2.0) -> None:
        """Take the group away once its last process is gone."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            with suppress(OSError):
                os.rmdir(self.folder)
                return
            time.sleep(0.01)

    def _write(self, name: str, amount: int) -> None:
        with open(f"{self.folder}/{name}", "w", encoding="ascii") as file:
            file.write(str(amount))


def _delegated(mount: str, membership: str) -> str:
    """The cgroup of this process, or the one above it, if it hands on what is needed and may be written to."""
    with open(membership, encoding="utf-8") as file:
        own = next((line[3:].strip() for line in file if line.startswith("0::")), None)
    if own is None:
        raise OSError("this process is in no cgroup v2")
    here = f"{mount}{own}".rstrip("/")
    for folder in (here, os.path.dirname(here)) if here != mount else (here,):
        with suppress(OSError), open(f"{folder}/cgroup.subtree_control", encoding="ascii") as file:
            if set(file.read().split()) >= _NEEDED and os.access(folder, os.W_OK):
                return folder
    raise OSError("no cgroup of this process hands on its memory and pids controllers")

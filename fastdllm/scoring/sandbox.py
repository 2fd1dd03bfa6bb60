# SPDX-License-Identifier: Apache-2.0
"""Run a program nobody has read, and learn whether its tests passed.

The program and its tests run in two process trees, with limits on time, memory, processes and files, no input, and an
empty folder each. Where the kernel allows it, they have no network, see no other process, read nothing but the
interpreter and its libraries, and are refused the system calls that computing needs nothing of; `Verdict.isolation`
says what was in force. docs/sandbox.md says what that protects from, and what not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastdllm.scoring import files

_START = "import sys; sys.path.append(sys.argv[1]); from scoring.supervisor import main; main()"
_GRACE = 30.0  # seconds that starting and cleaning up may take on a busy machine
_PATIENCE = 10.0  # times the limit that a program on a busy machine may take by the clock
_RANGES: dict[str, tuple[float, float]] = {
    "seconds": (0.01, 86_400),
    "memory": (64 << 20, 1 << 40),
    "processes": (1, 4096),
    "file_bytes": (0, 1 << 40),
}


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds of processor time, and by the clock while it has a processor; bytes; processes.

    A value out of range is a ValueError that names the range.
    """

    seconds: float = 10.0
    memory: int = 512 << 20  # address space of each process, and memory of all together
    processes: int = 16
    file_bytes: int = 64 << 20
    namespaces: bool = True  # False leaves the weaker means only, as on systems that refuse namespaces

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name}={value!r} must lie between {least:g} and {most:g}")


@dataclass(frozen=True)
class Checks:
    """Tests of a program: their source, what the problem itself defines for them, the names they take from the program."""

    source: str = ""
    setup: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """`status` is passed, failed or timed out; `isolation` says which protections were in force.

    reading: only the interpreter's files; writing: only the program's own folder; network: none; syscalls: a list is
    refused; memory: the kernel limits the total; processes: others are out of sight; process_count: limited;
    forging: the program cannot reach the process that runs its tests.
    """

    status: str
    message: str
    seconds: float
    isolation: dict[str, bool]

    @property
    def passed(self) -> bool:
        return self.status == "passed"


@contextmanager
def _folder() -> Iterator[str]:
    """An empty folder, removed with all that a program made in it, deeper than Python's own removal goes too."""
    made = tempfile.TemporaryDirectory(prefix="score-", ignore_cleanup_errors=True)
    try:
        yield made.name
    finally:
        try:
            made.cleanup()
        except RecursionError:
            subprocess.run(["rm", "-rf", "--", made.name], stderr=subprocess.DEVNULL, check=False)


_running: set[subprocess.Popen[bytes]] = set()  # supervisors, of all threads


def _kill(supervisor: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(supervisor.pid, signal.SIGKILL)


def end_programs() -> None:
    """End all programs that run, in whatever thread; to those who wait for them they have failed."""
    for supervisor in list(_running):
        _kill(supervisor)


def run_program(program: str, limits: Limits | None = None, checks: Checks | None = None) -> Verdict:
    """Run `program` confined, then `checks` against it in another process. All must end without an exception.

    Without checks, a program that merely says that it ran to its end passes. RuntimeError if the machine could not run
    it at all.
    """
    limits = limits or Limits()
    shown = files.readable()
    places = {"shown": shown, "hidden": files.solutions(shown), "packages": files.packages()}
    job = json.dumps({"program": program, **vars(limits), **places}).encode()
    tests = json.dumps(vars(checks or Checks())).encode()
    with _folder() as folder:
        supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, str(Path(__file__).resolve().parents[1]), folder, str(len(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        _running.add(supervisor)
        try:
            out, complaints = supervisor.communicate(job + tests, timeout=_PATIENCE * limits.seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return Verdict("timed out", "the supervisor did not answer", limits.seconds, {})
        finally:
            _kill(supervisor)
            supervisor.wait()
            _running.discard(supervisor)
    if supervisor.returncode < 0:  # without namespaces, a program may find and kill what watches it
        return Verdict("failed", "its supervisor was killed", limits.seconds, {})
    if supervisor.returncode > 0:
        last = complaints.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the supervisor of a program under test failed: {' '.join(last) or 'no message'}")
    return Verdict(**json.loads(out))

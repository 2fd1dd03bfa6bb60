# SPDX-License-Identifier: Apache-2.0
"""The process that runs one program under test, watches it and ends all that it started.

Three processes: this one holds the verdict and the clock; its child becomes the first of a new process namespace,
makes files read-only and reaps; the grandchild gives up its rights and runs the program. `sandbox.py` starts this
with the package's folder on the path instead of the package, so that torch is not imported for every program.
"""

from __future__ import annotations

import json
import math
import os
import resource
import secrets
import select
import signal
import sys
import time
import traceback
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NoReturn

from . import kernel

_TOKEN_BYTES = 16
_MOST_RESULT_BYTES = 4096
_MOST_MESSAGE = 500
_FAILED = b"!"


def main() -> None:
    """Run the job (JSON) from standard input in the empty folder named last; the verdict (JSON) to standard output."""
    os.chdir(sys.argv[2])
    job: dict[str, Any] = json.load(sys.stdin)
    job["number"] = os.getpid()  # no other running program has it
    isolation = _isolate(job["namespaces"])
    token_read, token_write = os.pipe()
    result_read, result_write = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(token_write)
        _first_process(job, isolation["processes"], token_read, result_write)
    os.close(result_write)
    os.close(token_read)
    token = secrets.token_bytes(_TOKEN_BYTES)  # after the fork: the program's memory never held it
    os.write(token_write, token)
    os.close(token_write)
    result, code = _watch(child, result_read, started + job["seconds"])
    seconds = time.monotonic() - started
    _end_descendants(child)
    isolation["files"], isolation["process_count"] = result[:1] == b"1", result[1:2] == b"1"
    status, message = _verdict(result[2:], code, token)
    json.dump({"status": status, "message": message, "seconds": seconds, "isolation": isolation}, sys.stdout)


def _isolate(namespaces: bool) -> dict[str, bool]:
    active = False
    if sys.platform == "linux":
        kernel.die_with_parent()
        kernel.adopt_orphans()
        if namespaces:
            with suppress(OSError):
                kernel.leave_network_and_processes()
                active = True
        kernel.hide_memory()
    return {"network": active, "processes": active}


def _first_process(job: dict[str, Any], namespaces: bool, token_fd: int, result_fd: int) -> NoReturn:
    """Becomes process 1 of its namespace: when it ends, the kernel ends everything the program started."""
    read_only = False
    if sys.platform == "linux":
        kernel.die_with_parent()
        if namespaces:
            with suppress(OSError):
                kernel.make_files_read_only(os.getcwd(), job["file_bytes"])
                read_only = True
    os.write(result_fd, b"1" if read_only else b"0")
    worker = os.fork()
    if worker == 0:
        _run(job, namespaces, token_fd, result_fd)
    os.close(result_fd)
    while True:
        pid, status = os.wait()
        if pid == worker:
            os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _run(job: dict[str, Any], namespaces: bool, token_fd: int, result_fd: int) -> NoReturn:
    try:
        os.setsid()  # so that a signal to its own process group cannot reach the supervisor
        counted = _give_up_rights(job, namespaces)
        os.write(result_fd, b"1" if counted else b"0")
        devnull = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(devnull, fd)
        outcome = _execute(job["program"], token_fd)
    except BaseException as error:  # whatever happens here must not pass for the end of the tests
        outcome = _FAILED + f"the program could not be started: {error!r}".encode()
    with suppress(OSError):
        os.write(result_fd, outcome)
    os._exit(0)


def _give_up_rights(job: dict[str, Any], namespaces: bool) -> bool:
    """Limits, then privileges. True if the number of processes is limited."""
    seconds = math.ceil(job["seconds"])
    kernel.limit(resource.RLIMIT_CPU, seconds)
    kernel.limit(resource.RLIMIT_AS, job["memory"])
    kernel.limit(resource.RLIMIT_FSIZE, job["file_bytes"])
    kernel.limit(resource.RLIMIT_NOFILE, 64)
    kernel.limit(resource.RLIMIT_CORE, 0)
    if sys.platform != "linux":
        return False
    counted = True
    already = 0
    if os.getuid() == 0:
        counted = kernel.drop_root(job["number"])
    elif namespaces:
        kernel.drop_capabilities()
    else:
        # The limit counts every thread of the user, those outside included.
        already = sum(_threads(pid) for pid in _processes() if _owner(pid) == os.getuid())
    kernel.limit(resource.RLIMIT_NPROC, already + job["processes"])
    kernel.forbid_new_privileges()
    kernel.die_with_parent()  # a change of user cleared it
    return counted


def _execute(program: str, token_fd: int) -> bytes:
    """Run the program; the token if it ran to its end, else what went wrong.

    The token is read only now, so that nothing the program could print, raise or exit with counts as success.
    """
    module = types.ModuleType("solution")  # not __main__: a `main()` at the end of an answer does not run
    sys.modules["solution"] = module
    sys.path.pop()
    sys.argv = ["solution.py"]
    try:
        exec(compile(program, "solution.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures, too
        return _FAILED + _describe(error, program).encode("utf-8", "replace")[:_MOST_MESSAGE]
    return os.read(token_fd, _TOKEN_BYTES)


def _describe(error: BaseException, program: str) -> str:
    name = type(error).__name__
    try:
        text = f"{name}: {error}"[:_MOST_MESSAGE]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "solution.py"]
        return f"{text} at: {program.splitlines()[lines[-1] - 1].strip()}" if lines and lines[-1] else text
    except BaseException:  # the program may define an exception that cannot be printed
        return name


def _watch(child: int, result_fd: int, deadline: float) -> tuple[bytes, int | None]:
    """What the program wrote, and its exit code; None if it still ran at the deadline or wrote without end."""
    result = b""
    open_, ended = True, None
    while time.monotonic() < deadline and len(result) < _MOST_RESULT_BYTES and (open_ or ended is None):
        if open_ and select.select([result_fd], [], [], 0.0 if ended is not None else 0.05)[0]:
            chunk = os.read(result_fd, _MOST_RESULT_BYTES)
            result += chunk
            open_ = bool(chunk)
            continue
        if ended is not None:
            break  # something that outlived the program holds the pipe, but has nothing to say
        pid, status = os.waitpid(child, os.WNOHANG)
        ended = os.waitstatus_to_exitcode(status) if pid else None
        if not open_ and ended is None:
            time.sleep(0.002)
    return result, ended


def _verdict(outcome: bytes, code: int | None, token: bytes) -> tuple[str, str]:
    if secrets.compare_digest(outcome, token):
        return "passed", ""
    if outcome.startswith(_FAILED):
        return "failed", outcome[1:].decode("utf-8", "replace")
    if code is None or code == 128 + signal.SIGXCPU:
        return "timed out", "did not end within the time limit"
    if code > 128 or code < 0:  # the program, or the process above it, ended by a signal
        number = code - 128 if code > 128 else -code
        return "failed", f"killed by signal {number} before its tests ended"
    return "failed", f"exited with status {code} before its tests ended"


def _end_descendants(child: int, patience: float = 5.0) -> None:
    """End the child, and then all that became a child of this process by outliving it."""
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = _descendants()
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _descendants() -> set[int]:
    parents = {pid: parent for pid in _processes() if (parent := _parent(pid)) is not None}
    found: set[int] = set()
    ring = {os.getpid()}
    while ring:
        ring = {pid for pid, parent in parents.items() if parent in ring} - found
        found |= ring
    return found


def _processes() -> Iterator[int]:
    with suppress(OSError):
        yield from (int(name) for name in os.listdir("/proc") if name.isdigit())


def _parent(pid: int) -> int | None:
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])
    return None


def _owner(pid: int) -> int | None:
    with suppress(OSError):
        return os.stat(f"/proc/{pid}").st_uid
    return None


def _threads(pid: int) -> int:
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0

# SPDX-License-Identifier: Apache-2.0
"""The process that runs one program and its tests, watches them and ends all that they started.

The program and its tests each get a box: a starter, the first process of a new process namespace, which reaps, and
the worker, which gives up its rights and runs what nobody has read. The two workers talk by pipes (`remote.py`); this
process holds the clock. `sandbox.py` starts it with the package's folder on the path instead of the package, so that
torch is not imported for every program.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn

from . import checks, kernel, landlock, remote, seccomp
from .cgroup import ControlGroup
from .usage import Usage, descendants, threads_of_this_user

_MOST_FDS = 64
_MOST_REPORT = 1 << 16
_MOST_INODES = 4096
_MOST_STARTING = 25.0  # seconds
_MOST_ENDING = 10.0  # seconds from a program's last word to its end, which says why there were no more
_DEEPEST = 100_000  # recursion; taking down millions of frames would last longer than a program may run
_OWN_PROCESSES = 6  # of a run in a user namespace of its own: this one, two starters, two first ones, the other worker


def main() -> None:
    """Run the job from standard input in the empty folder named second; the verdict (JSON) to standard output.

    The third argument says how many bytes of the input are the job itself (JSON); its tests follow.
    """
    os.chdir(sys.argv[2])
    job = json.loads(_read(int(sys.argv[3])))
    sys.path[-1:] = job["packages"]  # in place of this package's own folder
    sys.dont_write_bytecode = True
    run = _Run(job, os.getcwd())
    try:
        verdict = run.result()
    finally:
        run.end()
    json.dump(verdict, sys.stdout)


class _Box:
    """A starter's process id, and what its worker has written: a report on its confinement, then an outcome."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid, self.pipe = pid, pipe
        self.said = b""
        self.open = True
        self.status: int | None = None

    def listen(self) -> None:
        chunk = os.read(self.pipe, _MOST_REPORT)
        self.said += chunk
        self.open = bool(chunk) and len(self.said) <= _MOST_REPORT

    def reap(self) -> None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.said.split(b"\n")[:-1]]


class _Run:
    def __init__(self, job: dict[str, Any], folder: str) -> None:
        self.job, self.folder = job, folder
        self.tests: dict[str, Any] = {}
        self.number = os.getpid()  # no other running program has it
        self.namespaces = False
        self.group: ControlGroup | None = None
        self.boxes: list[_Box] = []

    def result(self) -> dict[str, Any]:
        self._isolate()
        asked, answered = os.pipe(), os.pipe()
        program = self._start(0, lambda pipe: self._run_program(pipe, asked[0], answered[1]), {asked[0], answered[1]})
        self.tests = json.loads(_read())  # after the fork: the program's memory never held what is expected of it
        tests = self._start(1, lambda pipe: self._run_tests(pipe, answered[0], asked[1]), {answered[0], asked[1]})
        for fd in (*asked, *answered):
            os.close(fd)
        self._wait_for_reports()
        usage = Usage()
        exceeded = self._watch(program, tests, usage)
        status, message = exceeded or self._verdict(program, tests)
        return {"status": status, "message": message, "seconds": usage.wall(), "isolation": self._isolation()}

    def _run_program(self, pipe: int, incoming: int, outgoing: int) -> None:
        os.close(pipe)
        program = remote.ProgramSide(remote.Channel(incoming, outgoing), self.job["program"])
        sys.modules["solution"] = program.module
        sys.argv = [remote.SOLUTION]
        set_limit = sys.setrecursionlimit
        sys.setrecursionlimit = lambda limit: set_limit(min(limit, _DEEPEST))
        program.serve()

    def _run_tests(self, pipe: int, incoming: int, outgoing: int) -> None:
        tester = remote.ChecksSide(remote.Channel(incoming, outgoing))
        _write(pipe, checks.run(tester, self.job["program"], **self.tests))

    def _isolate(self) -> None:
        if sys.platform != "linux":
            return
        kernel.die_with_parent()
        kernel.adopt_orphans()
        # Not for the program's own allocation, which RLIMIT_AS stops first, with a MemoryError.
        room = self.job["memory"] + self.job["file_bytes"] + (64 << 20)
        with suppress(OSError):
            self.group = ControlGroup(room, self.job["processes"] + _OWN_PROCESSES)
        os.chmod(self.folder, 0o711)  # the workers become other users, each with a folder of its own inside
        if self.job["namespaces"]:
            with suppress(OSError):
                kernel.leave_network()
                self.namespaces = True
        kernel.hide_memory()

    def _start(self, number: int, work: Callable[[int], None], kept: set[int]) -> _Box:
        read, write = os.pipe()
        os.mkdir(self._workspace(number), 0o700)
        pid = os.fork()
        if pid == 0:
            try:
                self._starter(number, lambda: work(write), write, kept)
            finally:  # whatever is raised in a child must not run the rest of this process once more
                os._exit(1)
        os.close(write)
        self.boxes.append(_Box(pid, read))
        return self.boxes[-1]

    def _starter(self, number: int, work: Callable[[], None], pipe: int, kept: set[int]) -> NoReturn:
        _take_away_input_and_output()
        report = {"network": self.namespaces, "memory": False, "processes": False, "reading": False, "writing": False}
        if sys.platform == "linux":
            kernel.die_with_parent()
            if self.group:
                with suppress(OSError):
                    self.group.enter()
                    report["memory"] = True
            if self.namespaces:
                with suppress(OSError):
                    kernel.own_process_ids()
                    report["processes"] = True
        worker = os.fork()
        if worker == 0:
            self._first(number, work, pipe, kept, report)
        _close_all_but(())
        _pass_on_status_of(worker)

    def _first(self, number: int, work: Callable[[], None], pipe: int, kept: set[int], report: dict[str, bool]) -> NoReturn:
        """Becomes process 1 of its namespace: when it ends, the kernel ends everything that the worker started."""
        os.chdir(self._workspace(number))
        if sys.platform == "linux":
            kernel.die_with_parent()
            if report["processes"]:
                here = os.getcwd()
                try:
                    kernel.enter_root(here, self.job["shown"], self.job["hidden"], self.job["file_bytes"], _MOST_INODES)
                    report.update(reading=True, writing=True)
                except (OSError, KeyError):
                    os.chdir(here)
        worker = os.fork()
        if worker == 0:
            self._work(number, work, pipe, kept, report)
        _close_all_but(())
        _pass_on_status_of(worker)

    def _work(self, number: int, work: Callable[[], None], pipe: int, kept: set[int], report: dict[str, bool]) -> NoReturn:
        try:
            os.setsid()  # so that a signal to its own process group cannot reach the supervisor
            _close_all_but({pipe, *kept})
            os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
            self._give_up_rights(number, report)
            _write(pipe, report)
        except BaseException as error:  # the machine's fault, not the program's
            _write(pipe, {"error": str(error) or type(error).__name__})
            os._exit(1)
        work()
        os._exit(0)

    def _give_up_rights(self, number: int, report: dict[str, bool]) -> None:
        """Limits, then files, then privileges, then system calls; `report` notes what is in force."""
        kernel.limit(resource.RLIMIT_CPU, math.ceil(self.job["seconds"]) + 1)
        kernel.limit(resource.RLIMIT_AS, self.job["memory"])
        kernel.limit(resource.RLIMIT_FSIZE, self.job["file_bytes"])
        kernel.limit(resource.RLIMIT_NOFILE, _MOST_FDS)
        kernel.limit(resource.RLIMIT_CORE, 0)
        report.update(process_count=False, syscalls=False, forging=False)
        if sys.platform != "linux":
            return
        mounted = report["reading"]
        already = _OWN_PROCESSES if self.namespaces else threads_of_this_user()
        if not mounted:
            with suppress(OSError):
                landlock.restrict(self.job["shown"], self.job["hidden"], os.getcwd())
                report.update(reading=True, writing=True)
        if os.getuid() == 0 and kernel.drop_root(2 * self.number + number, keep_reading=report["reading"]):
            already = 0
        elif self.namespaces:
            kernel.keep_capabilities(0)
        kernel.limit(resource.RLIMIT_NPROC, already + self.job["processes"])
        report["process_count"] = os.getuid() != 0
        kernel.die_with_parent()  # a change of user cleared it
        kernel.forbid_new_privileges()
        with suppress(OSError):
            seccomp.install(file_attributes=mounted)
            report.update(syscalls=True, network=True)
        # What Landlock leaves open, only the list of calls closes.
        report["writing"] = report["writing"] and (mounted or report["syscalls"])
        # Another process's memory and pipes: out of sight, or out of the user's rights and of reach of the calls.
        report["forging"] = report["processes"] or report["syscalls"]

    def _wait_for_reports(self) -> None:
        """Until both workers are confined: what that takes on a busy machine is not the program's time."""
        end = time.monotonic() + _MOST_STARTING
        while not all(box.said or not box.open for box in self.boxes) and time.monotonic() < end:
            self._listen(0.05)

    def _listen(self, seconds: float) -> None:
        open_ = {box.pipe: box for box in self.boxes if box.open}
        for pipe in select.select(list(open_), [], [], seconds if open_ else 0.002)[0]:
            open_[pipe].listen()

    def _watch(self, program: _Box, tests: _Box, usage: Usage) -> tuple[str, str] | None:
        """Until the tests have ended; status and message if a limit was exceeded before."""
        while tests.status is None or tests.open:
            self._listen(0.02)
            if len(tests.lines()) > 1:
                return None
            exceeded = usage.exceeded(self.job["seconds"], self.job["memory"])
            if exceeded:
                return exceeded
            tests.reap()
            if program.status is None:
                program.reap()
                if program.status is not None:  # what outlived it holds its pipes, but must not answer for it
                    _kill(descendants() - descendants(tests.pid) - {tests.pid})
        return None

    def _verdict(self, program: _Box, tests: _Box) -> tuple[str, str]:
        outcome = tests.lines()[1:]
        if not outcome:
            return _died(tests.status, "its tests")
        if outcome[0]["status"] != checks.ENDED:
            return outcome[0]["status"], outcome[0]["message"]
        if outcome[0]["message"]:
            return "failed", outcome[0]["message"]
        end = time.monotonic() + _MOST_ENDING
        while program.status is None and time.monotonic() < end:
            time.sleep(0.002)
            program.reap()
        return _died(program.status, "it")

    def _isolation(self) -> dict[str, bool]:
        """What was in force for the program and for its tests."""
        reports = [box.lines()[0] for box in self.boxes if box.said]
        for report in reports:
            if "error" in report:
                raise RuntimeError(report["error"])
        if len(reports) < len(self.boxes):
            raise RuntimeError("a process ended before it was confined")
        return {name: all(report[name] for report in reports) for name in reports[0]}

    def _workspace(self, number: int) -> str:
        return f"{self.folder}/{number}"

    def end(self, patience: float = 5.0) -> None:
        """End all that the boxes started, those included that outlived their parents."""
        _kill(box.pid for box in self.boxes if box.status is None)
        end = time.monotonic() + patience
        while time.monotonic() < end:
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            left = descendants()
            if not left:
                break
            _kill(left)
            time.sleep(0.001)
        if self.group:
            self.group.remove()


def _died(code: int | None, who: str) -> tuple[str, str]:
    if code is None:
        return "failed", f"{who} closed the pipes before the tests ended"
    if code == 128 + signal.SIGXCPU:
        return "timed out", "did not end within the time limit"
    if code > 128 or code < 0:  # the worker, or the process above it, ended by a signal
        number = code - 128 if code > 128 else -code
        return "failed", f"{who} was killed by signal {number} before the tests ended"
    return "failed", f"{who} exited with status {code} before the tests ended"


def _pass_on_status_of(worker: int) -> NoReturn:
    while True:
        pid, status = os.wait()
        if pid == worker:
            os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _read(amount: int | None = None) -> bytes:
    """So many bytes of standard input and no more, or all that is left."""
    found = b""
    while amount is None or len(found) < amount:
        chunk = os.read(0, 1 << 20 if amount is None else amount - len(found))
        if not chunk:
            break
        found += chunk
    return found


def _take_away_input_and_output() -> None:
    devnull = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(devnull, fd)


def _close_all_but(kept: Iterable[int]) -> None:
    for fd in {*range(3, _MOST_FDS)} - {*kept}:
        with suppress(OSError):
            os.close(fd)


def _write(pipe: int, message: dict[str, Any]) -> None:
    os.write(pipe, json.dumps(message).encode() + b"\n")


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)

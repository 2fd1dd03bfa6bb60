# SPDX-License-Identifier: Apache-2.0
"""Run a program nobody has read, and learn whether its tests passed.

Every program gets a process tree of its own with limits on time, memory, processes and files, no input, and an empty
folder. Where the kernel allows it (Linux namespaces), it has no network either, sees no other process, and every file
outside its folder is read-only; `Verdict.isolation` says what was in force. This contains what models write by
accident: endless loops, forks, exits, deletions. It is no defence against somebody who attacks the kernel.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_START = "import sys; sys.path.append(sys.argv[1]); from scoring.supervisor import main; main()"
_GRACE = 30.0  # seconds that starting and cleaning up may take on a busy machine


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds by the clock (and of each process's CPU), bytes, processes."""

    seconds: float = 10.0
    memory: int = 512 << 20  # address space of each process
    processes: int = 16
    file_bytes: int = 64 << 20
    namespaces: bool = True  # False leaves the weaker means only, as on systems that refuse namespaces


@dataclass(frozen=True)
class Verdict:
    """`status` is passed, failed or timed out; `isolation` says which protections were in force."""

    status: str
    message: str
    seconds: float
    isolation: dict[str, bool]

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_program(program: str, limits: Limits | None = None) -> Verdict:
    """Run `program` confined. It passes if it runs to its end without an exception."""
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="score-", ignore_cleanup_errors=True) as folder:
        supervisor = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _START, str(Path(__file__).resolve().parents[1]), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        job = json.dumps({"program": program, **vars(limits)})
        try:
            out, complaints = supervisor.communicate(job.encode(), timeout=limits.seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return Verdict("timed out", "the supervisor did not answer", limits.seconds, {})
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(supervisor.pid, signal.SIGKILL)
            supervisor.wait()
    if supervisor.returncode < 0:  # without namespaces, a program may find and kill what watches it
        return Verdict("failed", "its supervisor was killed", limits.seconds, {})
    if supervisor.returncode > 0:
        last = complaints.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the supervisor of a program under test failed: {' '.join(last) or 'no message'}")
    return Verdict(**json.loads(out))

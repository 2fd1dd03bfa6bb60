# SPDX-License-Identifier: Apache-2.0
"""The limits of the sandbox hold for a program as a whole, and what a system cannot give is said."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastdllm.scoring import usage
from fastdllm.scoring.cgroup import ControlGroup
from fastdllm.scoring.sandbox import Limits, run_program

GREEDY = {
    "memory files": (
        "import os\nfor i in range(7):\n    os.write(os.memfd_create(str(i)), bytes(100 << 20))",
        "syscalls",
        "Errno",
    ),
    "shared memory": (
        "import mmap, os, time\nfor i in range(6):\n    if os.fork() == 0:\n        m = mmap.mmap(-1, 200 << 20)\n"
        "        for at in range(0, 200 << 20, 4096): m[at] = 1\n        time.sleep(60)\ntime.sleep(60)",
        "process_count",
        "MiB together",
    ),
    "children": (
        "import os, time\nfor i in range(3):\n    if os.fork() == 0:\n        held = bytearray(b'x' * (350 << 20))\n"
        "        time.sleep(60)\ntime.sleep(60)",
        "process_count",
        "MiB together",
    ),
    "files": ("for i in range(5_000): open(f'{i}', 'w').close()", "processes", "No space left"),
    "one after another": (
        "for i in range(30):\n    with open(f'{i}', 'wb') as f: f.write(bytes(8 << 20))",
        "processes",
        "No space left",
    ),
    "recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)",
        "forging",
        "RecursionError" if sys.version_info >= (3, 11) else "signal 11",  # 3.10 keeps a frame on the C stack for each call
    ),
    "flood": (
        "import os\nwhile True:\n    for fd in range(3, 64):\n        try: os.write(fd, b'x' * 65536)\n"
        "        except OSError: pass",
        "forging",
        "the program sent",
    ),
}

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", GREEDY)
def test_limits_hold_for_the_program_as_a_whole(name: str, run) -> None:
    program, means, message = GREEDY[name]
    verdict = run(program, means)
    assert verdict.status in ("failed",), verdict
    assert message in verdict.message or (verdict.isolation["memory"] and "signal 9" in verdict.message), verdict


def test_processor_time_is_counted_over_all_processes(run) -> None:
    busy = "import os\nfor i in range(6): os.fork()\nwhile True: pass"
    verdict = run(busy, "process_count", seconds=1.0, processes=64)
    assert verdict.status == "timed out"


def test_processes_that_come_and_go_unseen_use_up_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that nobody waits for leave no processor time behind; so many looks at them are so much time."""
    now, numbers = [0.0], itertools.count(10**9)
    monkeypatch.setattr(usage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(usage, "descendants", lambda *root: {next(numbers)})
    monkeypatch.setattr(usage, "_stat", lambda pid: ["R", *["0"] * 20])
    watched = usage.Usage()
    for _ in range(30):
        now[0] += 0.1
        if watched.exceeded(1.0, 1 << 30):
            break
    assert now[0] < 2.0


def test_a_verdict_does_not_depend_on_neighbours() -> None:
    honest = "import time\nwhile time.process_time() < 0.6: pass"
    busy = "import os\nfor i in range(14):\n    if os.fork() == 0: break\nwhile True: pass"
    with ThreadPoolExecutor(4) as pool:
        neighbours = [pool.submit(run_program, busy, Limits(seconds=1.0)) for _ in range(3)]
        verdict = pool.submit(run_program, honest, Limits(seconds=1.0)).result()
        assert [one.result().status for one in neighbours] == ["timed out"] * 3
    assert verdict.passed, verdict


# A parent with a filter of its own takes away what the system would give.
POORER = """
import json, sys, types
package = types.ModuleType("fastdllm")  # so that torch is not imported
package.__path__ = [sys.argv[1]]
sys.modules["fastdllm"] = package
from fastdllm.scoring import files, seccomp, usage
from fastdllm.scoring.sandbox import Limits, run_program
seccomp._REFUSED = {"unshare": (272, 97), "landlock_create_ruleset": (444, 444)}
seccomp.install(file_attributes=True)
try:
    verdict = run_program("import zlib\\nopen('here', 'w').write('x')", Limits(seconds=20.0))
except RuntimeError as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([verdict.status, verdict.isolation]))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no numbers for this machine")
def test_what_a_system_refuses_is_reported() -> None:
    command = [sys.executable, "-c", POORER, str(ROOT / "fastdllm")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if isinstance(result, str):  # root, with an interpreter that no other user can read
        assert os.getuid() == 0 and "is closed to other users" in result
        return
    status, isolation = result
    assert status == "passed"
    assert [isolation[name] for name in ("processes", "reading", "writing")] == [False] * 3
    assert [isolation[name] for name in ("network", "syscalls", "forging")] == [True] * 3


def _cgroups(folder: Path, controllers: str) -> tuple[str, str]:
    """A folder in the shape of cgroup v2, and the file that says where this process is in it."""
    for name in ("user", "user/app"):
        (folder / name).mkdir()
        (folder / name / "cgroup.subtree_control").write_text(controllers if name == "user" else "")
    (folder / "membership").write_text("4:memory:/old\n0::/user/app\n")
    return str(folder), str(folder / "membership")


def test_a_control_group_is_made_where_its_controllers_are_handed_on(tmp_path: Path) -> None:
    group = ControlGroup(1 << 20, 7, *_cgroups(tmp_path, "cpu memory pids\n"))
    folder = tmp_path / "user" / f"score-{os.getpid()}"
    assert (folder / "memory.max").read_text() == str(1 << 20)
    assert (folder / "pids.max").read_text() == "7"
    group.enter()
    assert (folder / "cgroup.procs").read_text() == "0"
    for file in folder.iterdir():
        file.unlink()
    group.remove()
    assert not folder.exists()


@pytest.mark.parametrize("controllers", ["", "pids", "memory"])
def test_no_control_group_where_they_are_not(controllers: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="hands on"):
        ControlGroup(1 << 20, 7, *_cgroups(tmp_path, controllers))
    assert not [*tmp_path.glob("**/score-*")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seconds", value) for value in (0, -1, float("nan"), float("inf"))),
        *(("memory", value) for value in (0, -1, 10**19)),
        ("processes", 0),
        ("file_bytes", -1),
    ],
)
def test_limits_out_of_range_are_errors_that_name_the_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* must lie between"):
        Limits(**{name: value})

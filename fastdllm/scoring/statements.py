# SPDX-License-Identifier: Apache-2.0
"""What a top-level statement sets, changes and reads: the facts that decide whether a program needs it."""

from __future__ import annotations

import ast
import symtable
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Calls on a module that set up the interpreter or a library for everything after them.
_SETTINGS = {
    "setrecursionlimit",
    "set_int_max_str_digits",
    "seed",
    "setcontext",
    "simplefilter",
    "filterwarnings",
}


@dataclass(frozen=True)
class Statement:
    """Source lines of a top-level statement, the module names it binds, changes in place and reads."""

    lines: tuple[str, ...]
    binds: frozenset[str]
    changes: frozenset[str]
    reads: frozenset[str]
    always: bool  # kept whatever the program needs


def describe(found: list[tuple[list[ast.stmt], list[str]]]) -> list[Statement]:
    """Statements with their lines -> their facts. Those that share a line come, and stay, together."""
    every = [node for nodes, _ in found for node in nodes]
    functions = {node.name: node for node in every if isinstance(node, ast.FunctionDef)}
    modules = {name for node in every if isinstance(node, (ast.Import, ast.ImportFrom)) for name in _bound(node)}
    return [
        Statement(
            tuple(lines),
            frozenset(name for node in nodes for name in _binds(node)),
            frozenset(name for node in nodes for name in _changes(node, functions, modules)),
            _reads("\n".join(lines)),
            any(_is_always_kept(node) for node in nodes),
        )
        for nodes, lines in found
    ]


def _binds(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, _SCOPES):
        yield node.name
    elif not _is_main_guard(node):
        yield from _bound(node)


def _changes(node: ast.stmt, functions: dict[str, ast.FunctionDef], modules: set[str]) -> Iterator[str]:
    """Names whose values `node` changes when it runs, itself or through a function of the same program."""
    if isinstance(node, (*_SCOPES, ast.Assert)) or _is_main_guard(node):
        return
    # `n = int(sys.stdin.readline())` uses sys, it does not prepare it for others.
    is_assignment = isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign))
    yield from _changed(node, modules, methods=not is_assignment)
    for call in _same_scope(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in functions:
            yield from _changed_by_calling(functions[call.func.id], modules)


def _reads(source: str) -> frozenset[str]:
    """Module names that running `source` may read, inside functions too, but for their local variables."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tables = [symtable.symtable(source, "answer", "exec")]
    except (SyntaxError, RecursionError):
        return frozenset()
    names = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_referenced()}
    while tables:
        children = tables.pop().get_children()
        names |= {s.get_name() for table in children for s in table.get_symbols() if s.is_global()}
        tables += children
    return frozenset(names)


def _is_always_kept(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__" or node.names[0].name == "*"
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _SETTINGS


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and any(
        isinstance(name, ast.Name) and name.id == "__name__" for name in ast.walk(node.test)
    )


def _same_scope(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run in the scope of `node`: nested functions and classes are named, not entered."""
    stack = [node]  # no recursion: `1 + 1 + 1 ...` nests as deep as it is long
    while stack:
        one = stack.pop()
        yield one
        if one is node or not isinstance(one, (*_SCOPES, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(one))


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that `node` binds in its own scope, however deep in if, for, with or try they stand."""
    for one in _same_scope(node):
        if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Load):
            yield one.id
        elif isinstance(one, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in one.names)
        elif one is not node and isinstance(one, _SCOPES):
            yield one.name


def _changed(node: ast.AST, modules: set[str], methods: bool) -> Iterator[str]:
    """Names changed in place: `x[0] = 1`, `x.y = 1` and, if asked for, `x.append(1)` on what is no module."""
    for one in _same_scope(node):
        if isinstance(one, (ast.Subscript, ast.Attribute)) and not isinstance(one.ctx, ast.Load):
            yield from _root(one)
        elif methods and isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute):
            yield from (name for name in _root(one.func) if name not in modules)


def _changed_by_calling(function: ast.FunctionDef, modules: set[str]) -> set[str]:
    declared = {name for one in _same_scope(function) if isinstance(one, ast.Global) for name in one.names}
    arguments = {one.arg for one in ast.walk(function.args) if isinstance(one, ast.arg)}
    local = (set(_bound(function)) | arguments) - declared
    return (set(_changed(function, modules, methods=True)) | declared) - local


def _root(node: ast.AST) -> Iterator[str]:
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id

# SPDX-License-Identifier: Apache-2.0
"""Docstrings for the documentation site: the lines that explain arguments and fields become a list (see mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")
FILLED_IN_WHEN_IMPORTED = {
    "{aliases}": "  [Options](options.md) lists them.",
    "{table}": "[Options](options.md) explains each of them.",
}


def as_list(text: str, names: set[str]) -> str:
    """The text of a docstring with `name: what it is`, for these names, as a Markdown list.

    text: of a docstring without indentation; the lines that continue an entry are indented by four.
    names: arguments or fields of the object. A line that begins with another word stays as it is.
    """
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        entry = ENTRY.fullmatch(line)
        if entry and set(entry[1].split(", ")) <= names:
            if not inside and out and out[-1]:
                out.append("")
            called = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            out.append(f"* {called}: {entry[2]}")
            inside = True
            continue
        inside = inside and line.startswith("    ")
        out.append(line)
    return "\n".join(out)


class Arguments(griffe.Extension):
    """Rewrites the docstrings of functions and classes before they are rendered."""

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        rewrite(func)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        rewrite(cls)


def rewrite(obj: griffe.Function | griffe.Class) -> None:
    if obj.docstring is None:
        return
    text = as_list(obj.docstring.value, {p.name.lstrip("*") for p in obj.parameters} | set(obj.members))
    for placeholder, words in FILLED_IN_WHEN_IMPORTED.items():
        text = text.replace(placeholder, words)
    obj.docstring.value = text

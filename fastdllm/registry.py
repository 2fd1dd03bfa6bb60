# SPDX-License-Identifier: Apache-2.0
"""The file name is the name: decoders, caches and runners are found by their file, so that adding one is adding a file."""

from __future__ import annotations

import dataclasses
import typing
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

CLASSES = {"decoders": "Decoder", "caches": "Cache", "runners": "Runner"}


@cache
def names(kind: str) -> tuple[str, ...]:
    """The names of one kind ("decoders", "caches" or "runners"), sorted."""
    folder = Path(__file__).parent / kind
    return tuple(sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base")))


@cache
def find(kind: str, name: str) -> type:
    """The class of that name; ValueError lists the known ones."""
    if name not in names(kind):
        raise ValueError(f"{kind[:-1]}={name!r} is unknown; allowed are {', '.join(names(kind))}")
    return getattr(import_module(f"fastdllm.{kind}.{name}"), CLASSES[kind])


@cache
def options(kind: str, name: str) -> dict[str, Any]:
    """Option -> declared type: the dataclass fields that have a default (the others are filled in by `build.py`)."""
    component = find(kind, name)
    if not dataclasses.is_dataclass(component):
        return {}
    hints = typing.get_type_hints(component)
    return {f.name: hints[f.name] for f in dataclasses.fields(component) if f.default is not dataclasses.MISSING}

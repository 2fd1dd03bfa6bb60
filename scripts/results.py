# SPDX-License-Identifier: Apache-2.0
"""Files that an earlier run of a script left, which this one goes on with. A damaged one is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON value of a file. Raises ValueError, which names the file, for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON ({error}); without it the run begins anew") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a value of type {type(value).__name__} where {kind.__name__} is expected")
    return value


def read_lines(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, each with `fields` of these types, in that order; none where there is no file.

    What an interrupted run left of its last line is cut off the file. Raises ValueError, which names file and line, for
    every other damage, and changes nothing then.
    """
    data = path.read_bytes() if path.exists() else b""
    *whole, last = data.split(b"\n")
    lines = [_line(raw, fields, f"{path}:{number}") for number, raw in enumerate(whole, start=1)]
    if not last:
        return lines
    try:
        lines.append(_line(last, fields, f"{path}:{len(whole) + 1}"))
    except ValueError:
        start = f'{{"{next(iter(fields))}":'.encode()
        if not start.startswith(last[: len(start)]):
            raise
        with path.open("r+b") as file:
            file.truncate(len(data) - len(last))
    else:
        with path.open("ab") as file:
            file.write(b"\n")
    return lines


def _line(raw: bytes, fields: Mapping[str, type | tuple[type, ...]], where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object")
    if wrong := [name for name, kind in fields.items() if not isinstance(value.get(name), kind)]:
        raise ValueError(f"{where}: {', '.join(wrong)} missing, or of another type")
    return value

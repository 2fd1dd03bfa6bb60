# SPDX-License-Identifier: Apache-2.0
"""Training files to conversations: messages JSON, LMFlow's wrapper of it, JSON lines, and Alpaca JSON.

A record that cannot be used raises `BadRecord`, which says where it stands; `keep_good` decides what happens then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROLES = ("system", "user", "assistant", "tool")
POLICIES = ("skip", "error")
T = TypeVar("T")
U = TypeVar("U")


class BadRecord(ValueError):
    """A record that holds nothing to train on; the message names its file and its line or index."""


class Record(NamedTuple):
    """One JSON value of a file; `where` names the file and the line (JSON lines) or index (JSON arrays)."""

    where: str
    value: Any


class Conversation(NamedTuple):
    """Chat messages in transformers' form, at least one of them by the assistant."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Record(f"{path}:{number}", line)


def _json_array(path: Path) -> Iterator[Record]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON document ({error}); JSON lines need the ending .jsonl") from error
    if isinstance(value, dict) and "instances" in value:
        if value.get("type") != "conversation":
            raise ValueError(f"{path}: type={value.get('type')!r} is not supported, only 'conversation'")
        value = value["instances"]
    if not isinstance(value, list):
        raise ValueError(f"{path}: expected a list of records or LMFlow's {{'type', 'instances'}}")
    for index, item in enumerate(value):
        yield Record(f"{path}[{index}]", item)


def read_records(source: Path) -> Iterator[Record]:
    """The records of a file, or of all .json and .jsonl files of a folder in the order of their names."""
    files = [source]
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix in {".json", ".jsonl"})
    if not files or not all(path.is_file() for path in files):
        raise FileNotFoundError(f"{source}: no such file, or a folder without .json and .jsonl files")
    for path in files:
        yield from (_json_lines if path.suffix == ".jsonl" else _json_array)(path)


def _check_messages(where: str, messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise BadRecord(f"{where}: 'messages' is not a list")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadRecord(f"{where}: message {number} has no role out of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise BadRecord(f"{where}: the content of message {number} is not a string")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise BadRecord(f"{where}: no message by the assistant")
    return messages


def to_conversation(record: Record) -> Conversation:
    """One conversation out of a messages record (`system` and `tools` beside it allowed) or an Alpaca record."""
    where, value = record
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRecord(f"{where}: not a JSON value ({error})") from error
    if not isinstance(value, dict):
        raise BadRecord(f"{where}: not a JSON object")
    if "messages" in value:
        messages = _check_messages(where, value["messages"])
        if value.get("system"):
            messages = [{"role": "system", "content": value["system"]}, *messages]
        return Conversation(where, messages, value.get("tools") or None)
    if "instruction" in value and "output" in value:
        parts = [value["instruction"], value.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise BadRecord(f"{where}: 'instruction' or 'input' is not a string")
        turns = {"user": "\n\n".join(filter(None, parts)), "assistant": value["output"]}
        return Conversation(where, _check_messages(where, [{"role": r, "content": c} for r, c in turns.items()]))
    raise BadRecord(f"{where}: neither 'messages' nor 'instruction' and 'output'; keys {sorted(value)}")


def keep_good(items: Iterable[T], convert: Callable[[T], U], policy: str, report: Callable[[str], None]) -> Iterator[U]:
    """Convert every item; one that raises `BadRecord` is reported and left out ("skip") or ends it all ("error")."""
    if policy not in POLICIES:
        raise ValueError(f"on_bad_record={policy!r} is unknown; allowed are {', '.join(POLICIES)}")
    for item in items:
        try:
            converted = convert(item)
        except BadRecord as error:
            if policy == "error":
                raise
            report(str(error))
        else:
            yield converted

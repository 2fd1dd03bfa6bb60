# SPDX-License-Identifier: Apache-2.0
"""Training files to conversations: every common spelling of a chat or of an instruction with its answer, JSON or JSON lines.

A record that cannot be used raises `BadRecord`, which says where it stands; `keep_good` decides what happens then. Nothing
that a file may hold raises anything else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROLES = ("system", "user", "assistant", "tool")
# What other formats call a role: ShareGPT, LLaMA-Factory's tool calls, OpenAI, Gemma, Open Assistant.
ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "developer": "system",
}
# Keys of an instruction, of what it is about, and of the answer: Alpaca, dolly, prompt and completion, GSM8K.
INSTRUCTIONS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
    ("question", "", "answer"),
)
POLICIES = ("skip", "error")
NOT_DATA = {"dataset_info.json"}  # LLaMA-Factory's and datasets' description of the files next to it
LONGEST_QUOTE = 200  # characters of a file's own text in a message
T = TypeVar("T")
U = TypeVar("U")


class BadRecord(ValueError):
    """A record that holds nothing to train on; the message names its file and its line or index."""


class Record(NamedTuple):
    """One JSON value of a file, or its text; `where` names the file and the line (JSON lines) or index (JSON arrays)."""

    where: str
    value: Any


class Conversation(NamedTuple):
    """Chat messages in transformers' form. Those of the assistant with text are trained on, unless `weight` is 0."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def parse(text: str) -> Any:
    """A JSON value. Raises ValueError for anything else, nesting that exhausts the stack included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Record(f"{path}:{number}", line)


def _whole(path: Path, text: str) -> Iterator[Record]:
    """The records of one JSON document. A file that is none is one bad record, or JSON lines under another name."""
    try:
        value = parse(text)
    except ValueError:
        first = next((line for line in text.split("\n") if line.strip()), "")
        try:
            lines = isinstance(parse(first), dict)
        except ValueError:
            lines = False
        yield from _lines(path, text) if lines else [Record(str(path), text)]
        return
    if isinstance(value, dict) and value.get("type") == "conversation" and isinstance(value.get("instances"), list):
        value = value["instances"]  # LMFlow's wrapper
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        yield Record(f"{path}[{index}]", item)


def read_records(source: Path) -> Iterator[Record]:
    """The records of a file, or of all .json and .jsonl files of a folder in the order of their names.

    A byte order mark is no part of the text. Bytes that are not UTF-8 become lone surrogates, which spoil only the record
    that holds them. Raises FileNotFoundError for a missing file and for a folder without data.
    """
    files = [source]
    if source.is_dir():
        named = (path for path in source.iterdir() if path.suffix in {".json", ".jsonl"} and path.name not in NOT_DATA)
        files = sorted(path for path in named if path.is_file())
    if not files or not all(path.is_file() for path in files):
        raise FileNotFoundError(f"{source}: no such file, or a folder without .json and .jsonl files")
    for path in files:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
        yield from (_lines if path.suffix == ".jsonl" else _whole)(path, text)


def _text(where: str, name: str, value: Any) -> str:
    """A string that can be encoded; a list of text parts is joined."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(_text(where, name, part.get("text")) for part in value)
    if not isinstance(value, str):
        raise BadRecord(f"{where}: {name} is not a string")
    if not encodable(value):
        raise BadRecord(f"{where}: {name} holds bytes that are not UTF-8, or half of a surrogate pair")
    return value


def strings(value: object) -> Iterator[str]:
    """Every string within a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from (name, *strings(item))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _message(where: str, number: int, message: Any) -> dict[str, Any]:
    """A message in transformers' form, from either spelling."""
    role = None
    if isinstance(message, dict):
        role = message.get("role", message.get("from"))
        role = role.strip().lower() if isinstance(role, str) else None
        role = ALIASES.get(role, role)
    if role not in ROLES:
        raise BadRecord(f"{where}: message {number} has no role out of {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if content is None and message.get("tool_calls"):
        content = ""
    trained = message.get("weight", 1) != 0 and message.get("loss", True) is not False
    rest = {name: value for name, value in message.items() if name in ("name", "tool_calls", "tool_call_id")}
    content = _text(where, f"the content of message {number}", content)
    return {"role": role, "content": content, **rest, **({} if trained else {"weight": 0})}


def _messages(where: str, messages: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise BadRecord(f"{where}: {name!r} is not a list")
    return [_message(where, number, message) for number, message in enumerate(messages)]


def _history(where: str, value: Any) -> list[dict[str, Any]]:
    """LLaMA-Factory's earlier turns, pairs of instruction and answer."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRecord(f"{where}: 'history' is not a list of pairs")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": _text(where, "'history'", text)}
        for pair in value
        for role, text in zip(roles, pair, strict=True)
    ]


def _instruction(where: str, value: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of an instruction and its answer, under whichever keys they stand."""
    known = (keys for keys in INSTRUCTIONS if keys[0] in value and keys[2] in value)
    asked, about, answer = next(known, ("", "", ""))
    if not asked:
        keys = ", ".join(sorted(map(str, value)))[:LONGEST_QUOTE]
        raise BadRecord(f"{where}: no form that is known (messages, conversations, {_known_forms()}); its keys are {keys}")
    if isinstance(value[asked], list) and isinstance(value[answer], list):  # a prompt and a completion of messages
        context = [{**message, "weight": 0} for message in _messages(where, value[asked], asked)]
        return context + _messages(where, value[answer], answer)
    parts = [value[asked], (about and value.get(about)) or ""]
    question = "\n\n".join(filter(None, (_text(where, repr(asked), part) for part in parts)))
    turns = [("user", question), ("assistant", _text(where, repr(answer), value[answer]))]
    earlier = _history(where, value["history"]) if value.get("history") else []
    return earlier + [{"role": role, "content": content} for role, content in turns]


def _known_forms() -> str:
    return ", ".join(f"{asked} with {answer}" for asked, _, answer in INSTRUCTIONS)


def is_target(message: dict[str, Any]) -> bool:
    """Whether a message is something to learn: the assistant's, with text, and not excluded."""
    return message["role"] == "assistant" and bool(message["content"]) and message.get("weight", 1) != 0


def to_conversation(record: Record) -> Conversation:
    """One conversation out of a record in any form that is known. `system` and `tools` may stand next to the messages."""
    where, value = record
    if isinstance(value, str):
        try:
            value = parse(value)
        except ValueError as error:
            raise BadRecord(f"{where}: not a JSON value ({str(error)[:LONGEST_QUOTE]})") from error
    if not isinstance(value, dict):
        raise BadRecord(f"{where}: not a JSON object")
    name = next((name for name in ("messages", "conversations") if name in value), None)
    messages = _messages(where, value[name], name) if name else _instruction(where, value)
    if value.get("system"):
        messages = [{"role": "system", "content": _text(where, "'system'", value["system"])}, *messages]
    tools = value.get("tools") or None
    if isinstance(tools, str):  # LLaMA-Factory writes the list as JSON text
        try:
            tools = parse(tools)
        except ValueError as error:
            raise BadRecord(f"{where}: 'tools' is not JSON") from error
    if tools is not None and not isinstance(tools, list):
        raise BadRecord(f"{where}: 'tools' is not a list")
    if not any(map(is_target, messages)):
        raise BadRecord(f"{where}: no message by the assistant")
    return Conversation(where, messages, tools)


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

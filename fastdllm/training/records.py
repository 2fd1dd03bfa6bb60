# SPDX-License-Identifier: Apache-2.0
"""Training files to conversations: every common spelling of a chat or of an instruction with its answer, JSON or JSON lines,
also compressed by gzip, in any Unicode encoding.

A record that cannot be used raises `BadRecord`, which says where it stands; `keep_good` decides what happens then. Nothing
that a file may hold raises anything else.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastdllm.fields import shown
from fastdllm.models.files import LFS

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
CONVERSATIONS = ("messages", "conversations", "conversation")  # keys of a list of messages; the last one is LMSYS's
POLICIES = ("skip", "error")
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
GZIP = b"\x1f\x8b"
OTHER_KINDS = {b"PAR1": "a Parquet file", b"PK\x03\x04": "a zip archive", b"ARROW1": "an Arrow file"}  # by how they begin
# What a record may hold beside its conversation, without which that is another one: what an answer should not be, and media.
PREFERENCES = ("chosen", "rejected", "rejected_response")
VERDICTS = ("label", "kto_tag")  # TRL's and LLaMA-Factory's names of whether the answer is a good one
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
NOT_DATA = {"dataset_info.json"}  # LLaMA-Factory's and datasets' description of the files next to it
LONGEST_QUOTE = 200  # characters of a file's own text in a message
T = TypeVar("T")
U = TypeVar("U")


class BadRecord(ValueError):
    """A record that holds nothing to train on; the message names its file and its line or index."""


class Record(NamedTuple):
    """One JSON value of a file, its text, or what is wrong with the whole file; `where` names the file and the line (JSON
    lines) or index (JSON arrays)."""

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


def _text_of(path: Path) -> str:
    """The text of a file. Bytes that are not UTF-8 become lone surrogates. Raises BadRecord for a file that is no text; one
    in which a line can be read is, however it begins."""
    data, problem = path.read_bytes(), None
    if data.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            problem = f"not a whole gzip file ({error})"
    if data.startswith(LFS):
        problem = "a git-lfs pointer instead of the file; run `git lfs pull` in its folder"
    elif kind := next((kind for start, kind in OTHER_KINDS.items() if data.startswith(start)), None):
        problem = f"{kind}; only JSON and JSON lines are read, which to_json of datasets and of pandas writes"
    wide = json.detect_encoding(data)
    if not wide.startswith("utf-8") and (text := _wide(data, wide)).lstrip()[:1] in ("{", "["):
        return text
    text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")
    if problem and not any(map(_is_object, text.split("\n"))):
        raise BadRecord(f"{path}: {problem}")
    return text


def _wide(data: bytes, encoding: str) -> str:
    """Text of two or four bytes a character. Where it is torn, it ends with half of a surrogate pair, which no record may
    hold."""
    try:
        return data.decode(encoding, errors="surrogatepass")
    except UnicodeDecodeError as error:
        return data[: error.start].decode(encoding, errors="surrogatepass") + "\udcff" if error.end >= len(data) else ""


def _lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # of a file that another one was appended to
        if line.strip():
            yield Record(f"{path}:{number}", line)


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse(text), dict)
    except ValueError:
        return False


def _records(path: Path, text: str) -> Iterator[Record]:
    """The records of one JSON document or of JSON lines: what the file holds counts, where its name says the other one."""
    lines = ".jsonl" in path.suffixes
    objects = _is_object(next((line for line in text.split("\n") if line.strip()), ""))
    if lines and objects:
        return _lines(path, text)
    try:
        return _items(path, parse(text))
    except ValueError:
        return _lines(path, text) if lines or objects else iter([Record(str(path), text)])


def _items(path: Path, value: Any) -> Iterator[Record]:
    """The records of a JSON document."""
    if isinstance(value, dict) and value.get("type") == "conversation" and isinstance(value.get("instances"), list):
        value = value["instances"]  # LMFlow's wrapper
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        yield Record(f"{path}[{index}]", item)


def read_records(source: Path) -> Iterator[Record]:
    """The records of a file, or of all .json and .jsonl files of a folder, also .gz, in the order of their names.

    A byte order mark is no part of the text. Bytes that are not UTF-8 become lone surrogates, which spoil only the record
    that holds them; a file that is no text is one bad record. Raises FileNotFoundError for a missing file and for a folder
    without data.
    """
    files = [source]
    if source.is_dir():
        named = (path for path in source.iterdir() if path.name.endswith(ENDINGS) and path.name not in NOT_DATA)
        files = sorted(path for path in named if path.is_file())
    if not files or not all(path.is_file() for path in files):
        raise FileNotFoundError(f"{source}: no such file, or a folder without .json and .jsonl files")
    for path in files:
        try:
            text = _text_of(path)
        except BadRecord as error:
            yield Record(str(path), error)
        else:
            yield from _records(path, text)


def _text(where: str, name: str, value: Any) -> str:
    """A string that can be encoded; a list of text parts is joined."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        texts = [part.get("text") for part in value]
        value = "".join(texts) if all(isinstance(text, str) for text in texts) else None
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


def _given(value: dict[str, Any]) -> dict[str, Any]:
    """The fields without those that are null: tables of records of several forms fill up with it."""
    return {name: item for name, item in value.items() if item is not None}


def _message(where: str, number: int, message: Any) -> dict[str, Any]:
    """A message in transformers' form, from either spelling."""
    role = None
    if isinstance(message, dict):
        message = _given(message)
        role = message.get("role", message.get("from"))
        role = role.strip().lower() if isinstance(role, str) else None
        role = ALIASES.get(role, role)
    if role not in ROLES:
        raise BadRecord(f"{where}: message {number} has no role out of {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if content is None and message.get("tool_calls"):
        content = ""
    flags = {name: message.get(name, 1) for name in ("weight", "loss")}
    for name, flag in flags.items():
        if flag not in (0, 1):
            raise BadRecord(f"{where}: {name}={shown(flag)} of message {number} is none of 0, 1, false and true")
    trained = all(flags.values())
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
        known_forms = ", ".join([*CONVERSATIONS, *(f"{asked} with {answer}" for asked, _, answer in INSTRUCTIONS)])
        raise BadRecord(f"{where}: no form that is known ({known_forms}); its keys are {keys}")
    if isinstance(value[asked], list) and isinstance(value[answer], list):  # a prompt and a completion of messages
        context = [{**message, "weight": 0} for message in _messages(where, value[asked], asked)]
        return context + _messages(where, value[answer], answer)
    parts = [(name, value[name]) for name in (asked, about) if name and name in value]
    question = "\n\n".join(filter(None, (_text(where, repr(name), part) for name, part in parts)))
    turns = [("user", question), ("assistant", _text(where, repr(answer), value[answer]))]
    earlier = _history(where, value.get("history") or [])
    return earlier + [{"role": role, "content": content} for role, content in turns]


def is_target(message: dict[str, Any]) -> bool:
    """Whether a message is something to learn: the assistant's, with text, and not excluded."""
    return message["role"] == "assistant" and bool(message["content"]) and message.get("weight", 1) != 0


def to_conversation(record: Record) -> Conversation:
    """One conversation out of a record in any form that is known. `system` and `tools` may stand next to the messages."""
    where, value = record
    if isinstance(value, BadRecord):
        raise value
    if isinstance(value, str):
        try:
            value = parse(value)
        except ValueError as error:
            raise BadRecord(f"{where}: not a JSON value ({str(error)[:LONGEST_QUOTE]})") from error
    if not isinstance(value, dict):
        raise BadRecord(f"{where}: not a JSON object")
    value = _given(value)
    named = [name for name in CONVERSATIONS if name in value]
    others = any(keys[0] in value for keys in INSTRUCTIONS)
    # An empty list is no conversation where there is another one, or an instruction: some tables fill up with it.
    name = next((name for name in named if value[name] != []), None if others else next(iter(named), None))
    messages = _messages(where, value[name], name) if name else _instruction(where, value)
    if system := _text(where, "'system'", value.get("system", "")):
        messages = [{"role": "system", "content": system}, *messages]
    tools = value.get("tools") or None
    if isinstance(tools, str):  # LLaMA-Factory writes the list as JSON text
        try:
            tools = parse(tools)
        except ValueError as error:
            raise BadRecord(f"{where}: 'tools' is not JSON") from error
    if tools is not None and not isinstance(tools, list):
        raise BadRecord(f"{where}: 'tools' is not a list")
    if lost := [name for name in (*PREFERENCES, *MEDIA) if value.get(name)]:
        raise BadRecord(f"{where}: has {', '.join(lost)}; only conversations of text with one answer are trained on")
    if rejected := [name for name in VERDICTS if value.get(name) is False]:
        raise BadRecord(f"{where}: {rejected[0]} is false: its answer is an example of a bad one")
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

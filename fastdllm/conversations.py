# SPDX-License-Identifier: Apache-2.0
"""Texts and conversations to token ids.

`encode_conversation` is the one way from messages to ids, for generation, chat, evaluation and training: there only the chat
template's own control tokens are control tokens; a name like `<|im_end|>` that somebody wrote into a message is text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdllm.fields import shown
from fastdllm.libraries import has_tokenizers, hint
from fastdllm.templates import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from fastdllm.models import Model

Message = Mapping[str, Any]
Messages = Sequence[Message]
INSTRUCTIONS = ("system", "developer")  # roles that some templates do not know
ESCAPE = "\u2060"  # WORD JOINER: invisible, after the first letter of a control token's name that is meant as text
MARKS = range(0xF0000, 0xFFFFE)  # private-use characters, for finding a message in what a template made of it


def without_tokenizer() -> str:
    """What to add to an error about a model that has no tokenizer: the library that reads it, if that is missing."""
    return "" if has_tokenizers() else f"; {hint('reading texts', 'transformers')}"


def article(word: str) -> str:
    """The word with its indefinite article, by its sound: "an int", "an ndarray", "a uint8", "a Tensor"."""
    spelt = word[:2].lower() in ("nd", "rn", "hf")  # read as letters
    return f"{'an' if spelt or word[:1].lower() in 'aeio' else 'a'} {word}"


def keys_of(item: Mapping[Any, Any]) -> str:
    """The first few keys of a mapping, for an error."""
    first = [shown(key).strip("'") for key in islice(item, 8)]
    return ", ".join([*first, "..."] if len(item) > len(first) else first) or "(none)"


def named(item: Any) -> str:
    """What a value is, in few words: its type, and of a container what it holds."""
    kind = article(type(item).__name__)
    if isinstance(item, Tensor | np.ndarray):
        return f"{kind} of shape {list(item.shape)} and type {item.dtype}"
    if isinstance(item, Mapping):
        return f"{kind} with the keys {keys_of(item)}"
    if isinstance(item, list | tuple):
        inside = sorted({type(entry).__name__ for entry in item})
        return f"{kind} of {' and '.join(inside)}" if inside else f"an empty {type(item).__name__}"
    return "None" if item is None else kind


def encode_text(model: Model, text: str) -> list[int]:
    """Token ids of a text; special tokens written in it are recognised, none is added (templates write their own)."""
    return ids_of(model.tokenizer, text)


def encode_literally(model: Model, text: str) -> list[int]:
    """Ids of a text in which nothing is special."""
    return _literal(model.tokenizer, text)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a text; escaped names (see `escape`) are text."""
    check_text(text, "the text")
    ids, start = [], 0
    for found in _names(tokenizer, escaped=True).finditer(text) if ESCAPE in text else ():
        ids += _tokens(tokenizer, text[start : found.start()])
        ids += _literal(tokenizer, found[0].replace(ESCAPE, "", 1))
        start = found.end()
    return ids + _tokens(tokenizer, text[start:])


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Raises ValueError for a text that the vocabulary has no tokens for, of one that cannot leave out what it lacks."""
    try:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the tokenizer has no tokens for {shown(text)} ({error})") from error


def _literal(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Cut inside each special token's name, none is left to recognise."""
    check_text(text, "the text")
    ids, names = [], _names(tokenizer)
    while found := names.search(text):
        ids += _tokens(tokenizer, text[: found.start() + 1])
        text = text[found.start() + 1 :]
    return ids + _tokens(tokenizer, text)


def _names(tokenizer: PreTrainedTokenizerFast, escaped: bool = False) -> re.Pattern[str]:
    """What finds the names of added tokens in a text, the longest first; `escaped`: in what `escape` returns."""
    return _pattern(tuple(tokenizer.get_added_vocab()), ESCAPE if escaped else "")


@lru_cache(maxsize=16)
def _pattern(names: tuple[str, ...], escape: str) -> re.Pattern[str]:
    parts = [re.escape(name[0] + escape + name[1:]) for name in sorted(names, key=len, reverse=True) if len(name) > 1]
    return re.compile("|".join(parts) or r"(?!)")


def escape(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The text with an invisible character in each control token's name, which `encode_text` then reads as text."""
    return _names(tokenizer).sub(lambda found: found[0][0] + ESCAPE + found[0][1:], text)


def check_text(text: str, what: str) -> None:
    """ValueError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{what} has a lone surrogate ({half}) at position {error.start}, which is no character") from None


# From messages to ids.


class Encoded(NamedTuple):
    """ids of a conversation [n] and, for each, which of the assistant's turns it belongs to (0, 1, ...; -1: to none). A turn
    is its words and what the template puts after them (`<|im_end|>` and a line break in ChatML)."""

    ids: list[int]
    turns: list[int]

    @property
    def answer(self) -> list[bool]:
        """For each id whether it belongs to a turn of the assistant."""
        return [turn >= 0 for turn in self.turns]


def encode_messages(model: Model, messages: Messages) -> Tensor:
    """Ids [P] of a conversation and of the start of the answer. See `encode_conversation`."""
    if model.tokenizer is None:
        raise ValueError(f"model {model.name!r} has no tokenizer, so it cannot chat{without_tokenizer()}")
    ids = encode_conversation(model.tokenizer, messages, add_generation_prompt=True).ids
    return torch.tensor(ids, dtype=torch.long)


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast,
    messages: Messages,
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
) -> Encoded:
    """Ids of the rendered messages, in which only the template's own control tokens are control tokens.

    Each turn of the assistant is tokenised by itself, as it is when the model writes it. A system text that the template
    leaves out is put in front of the first user turn, with a warning; a warning also names any other message that it leaves
    out.

    tokenizer: with a chat template.
    messages: dicts with "role" and "content".
    tools: handed to the template.
    add_generation_prompt: end with the start of an answer.

    Raises ValueError for messages without role or text and for whatever the template raises.
    """
    messages, text, places = _render(tokenizer, messages, tools, add_generation_prompt)
    ids: list[int] = []
    turns: list[int] = []

    def add(piece: str, turn: int) -> None:
        found = ids_of(tokenizer, piece)
        ids.extend(found)
        turns.extend([turn] * len(found))

    answers = [place for message, place in zip(messages, places, strict=True) if message["role"] == "assistant"]
    tail = _end_of_turn(tokenizer, tokenizer.chat_template) if answers else ""
    start = 0
    for turn, place in enumerate(answers):
        if place is None or place[0] < start:
            continue
        add(text[start : place[0]], -1)
        start = place[1] + _common(text[place[1] :], tail)
        add(text[place[0] : start], turn)
    add(text[start:], -1)
    return Encoded(ids, turns)


def render(model: Model, messages: Messages, *, continue_final: bool = False) -> str:
    """The chat template's text, with the start of the answer, or, with `continue_final`, up to where the last message is
    left open; plain paragraphs for a model without a template. Names of control tokens in the messages are escaped."""
    return _render(model.tokenizer, messages, None, not continue_final, continue_final)[1]


def takes_system(model: Model) -> bool:
    """Whether the template shows a system message: some refuse one, some leave it out without a word."""
    probe = "a system text to look for"
    try:
        messages = [{"role": "system", "content": probe}, {"role": "user", "content": "x"}]
        return probe in _apply(model.tokenizer, messages, None, True, False)
    except ValueError:
        return False


def fold_system(messages: Messages) -> list[Message]:
    """The messages with every system text in front of the first user turn's."""
    texts = [message["content"] for message in messages if message["role"] in INSTRUCTIONS]
    turns: list[Any] = [dict(message) for message in messages if message["role"] not in INSTRUCTIONS]
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": "\n\n".join(texts)}, *turns]
    first["content"] = "\n\n".join([*texts, first["content"]])
    return turns


Place = tuple[int, int]  # of a message's text in the rendered one: first character and the one after the last


def _render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Messages,
    tools: Sequence[Any] | None,
    prompt: bool,
    open_end: bool = False,
) -> tuple[list[Message], str, list[Place | None]]:
    """The messages as they are sent, the template's text of them, and where in it each one stands (None: not known)."""
    messages = [_check_message(tokenizer, message, i) for i, message in enumerate(messages)]
    if not messages:
        raise ValueError("a conversation is empty; at least one message is needed")
    tools = escaped(tokenizer, tools)
    system = any(message["role"] in INSTRUCTIONS for message in messages)
    try:
        text = _apply(tokenizer, messages, tools, prompt, open_end)
    except ValueError:
        if not system:
            raise
        lost, text = [0], ""  # some templates refuse a system message
    else:
        places, lost = _find(tokenizer, messages, tools, prompt, open_end, text)
    if any(messages[i]["role"] in INSTRUCTIONS for i in lost) or not text:
        messages = fold_system(messages)
        text = _apply(tokenizer, messages, tools, prompt, open_end)
        warnings.warn("the chat template has no system role: the system text is put before the first message", stacklevel=4)
        places, lost = _find(tokenizer, messages, tools, prompt, open_end, text)
    for i in lost:
        warnings.warn(f"the chat template leaves out message {i} (role {messages[i]['role']!r})", stacklevel=4)
    return messages, text, places


def _find(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    tools: Sequence[Any] | None,
    prompt: bool,
    open_end: bool,
    text: str,
) -> tuple[list[Place | None], list[int]]:
    """Where each message stands in the rendered text, and which ones are left out of it.

    A second rendering, with marks around every message, tells. It says nothing where the template treats marked messages
    otherwise; blanks at a message's ends stay outside its marks, since templates strip them.
    """
    held = set(text)
    marks = list(islice((mark for mark in map(chr, MARKS) if mark not in held), 2 * len(messages)))
    if len(marks) < 2 * len(messages):
        return [None] * len(messages), []
    pairs = list(zip(marks[::2], marks[1::2], strict=True))

    def wrapped(content: str, pair: tuple[str, str]) -> str:
        return re.sub(r"\S(?:.*\S)?", lambda core: core[0].join(pair), content, flags=re.S)

    marked = [{**m, "content": wrapped(m["content"], pair)} for m, pair in zip(messages, pairs, strict=True)]
    try:
        shown = _apply(tokenizer, marked, tools, prompt, open_end)
    except ValueError:
        return [None] * len(messages), []
    if open_end:
        shown += pairs[-1][1]
    at: dict[str, int] = {}
    for number, found in enumerate(re.finditer(f"[{marks[0]}-{marks[-1]}]", shown)):
        at.setdefault(found[0], found.start() - number)
    if re.sub(f"[{marks[0]}-{marks[-1]}]", "", shown) != text:
        return [None] * len(messages), []
    places: list[Place | None] = []
    for message, pair in zip(messages, pairs, strict=True):
        content = message["content"]
        if not all(mark in at for mark in pair):
            places.append(None)
            continue
        start, end = (at[mark] for mark in pair)
        before, after = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
        start -= len(before) if text[:start].endswith(before) else 0
        end += len(after) if text.startswith(after, end) else 0
        places.append((start, end))
    lost = [
        i
        for i, (m, pair) in enumerate(zip(messages, pairs, strict=True))
        if m["content"].strip() and not at.keys() & {*pair}
    ]
    return places, lost


@lru_cache(maxsize=16)
def _end_of_turn(tokenizer: PreTrainedTokenizerFast, template: str | None) -> str:
    """What the template writes after an answer, before anything of the next turn.

    It is what follows an answer both at the end of a conversation and before another turn. Where the template starts a new
    turn in any case, as LLaDA's does, that holds the next header as well: there it ends with the first control token.
    """
    words = chr(MARKS[0])
    asked, answered = {"role": "user", "content": "question"}, {"role": "assistant", "content": words}

    def after(messages: list[Message], prompt: bool) -> str:
        return _apply(tokenizer, messages, None, prompt, False).partition(words)[2]

    try:
        last, prompt = after([asked, answered], False), after([asked, answered], True)
        more = after([asked, answered, asked], False)
    except ValueError:
        return ""
    tail = last[: _common(last, more)]
    if last == prompt and (found := _names(tokenizer).search(tail)):
        rest = tail[found.end() :]
        return tail[: found.end()] + rest[: len(rest) - len(rest.lstrip())]
    return tail


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _apply(
    tokenizer: PreTrainedTokenizerFast, messages: Messages, tools: Sequence[Any] | None, prompt: bool, open_end: bool
) -> str:
    """The template's text of messages that are checked already. Whatever it raises is a ValueError that names it, and so is
    one that does not end (`templates.rendered`)."""
    template = tokenizer.chat_template
    if template is None:
        return "\n\n".join(message["content"] for message in messages)
    try:
        return rendered(tokenizer, messages, tools, prompt, open_end)
    except Exception as error:  # a template may raise anything of its own
        start = " ".join(str(template).split())[:60]
        raise ValueError(f"the chat template ({start!r}...) fails: {type(error).__name__}: {error}") from error


def _check_message(tokenizer: PreTrainedTokenizerFast, message: Any, i: int) -> dict[str, Any]:
    """The message with its content as one text and every text escaped."""
    if not isinstance(message, Mapping):
        raise ValueError(f"message {i} is {named(message)}; a message is a dict with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"message {i} has no role; it has the keys {keys_of(message)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list | tuple):
        content = "".join(_part(part, i) for part in content)
    if not isinstance(content, str):
        what = "no content" if "content" not in message else f"content of type {type(content).__name__}"
        raise ValueError(f"message {i} (role {role!r}) has {what}; allowed are a text and a list of text parts")
    check_text(content, f"message {i}")
    try:
        return escaped(tokenizer, {**message, "content": content})
    except RecursionError:
        raise ValueError(f"message {i} is nested too deep") from None


def _part(part: Any, i: int) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"message {i} has a content part of type {kind!r}; only {{'type': 'text', 'text': ...}} is read")


def escaped(tokenizer: PreTrainedTokenizerFast, value: Any) -> Any:
    """`value` with every text in it escaped, however deep it stands."""
    if isinstance(value, str):
        return escape(tokenizer, value)
    if isinstance(value, Mapping):
        return {key: escaped(tokenizer, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(tokenizer, item) for item in value]
    return value

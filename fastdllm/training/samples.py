# SPDX-License-Identifier: Apache-2.0
"""Conversations to token rows: response-only labels, padding to whole blocks, optional packing.

Only the assistant's tokens are targets, with what its template puts after them (`<|im_end|>` and a line break in
ChatML). Text is tokenised turn by turn, so that a prompt has the tokens it has when a model is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from fastdllm.training.objective import IGNORE
from fastdllm.training.records import BadRecord, Conversation, encodable, is_target, strings

# ChatML with the system prompt of the published Fast-dLLM v2 checkpoints instead of Qwen2.5's.
FAST_DLLM_V2_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Sample(NamedTuple):
    """One document: token ids and labels, int32 [n] each; labels are the ids to predict or `IGNORE`."""

    ids: np.ndarray
    labels: np.ndarray


def turns(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, bool]]:
    """The conversation's text in pieces, each with whether it is a target.

    Raises BadRecord for messages the chat template refuses, in whatever way, and for a template that rewrites earlier
    turns: the model would be trained on prompts it never gets.
    """
    where, messages, tools = conversation

    def render(messages: list[dict[str, object]], prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates and what runs them raise anything: of jinja2, ValueError, IndexError ...
            raise BadRecord(f"{where}: the chat template refuses it: {error}") from error

    def opening() -> str:
        """What stands before the first answer of a conversation that begins with it: no template renders no message."""
        (text,) = unused([messages[0]["content"]], 1)
        return render([{**messages[0], "content": text}], False).partition(text)[0]

    if tools and "tools" not in tokenizer.chat_template:
        raise BadRecord(f"{where}: has tools, but the chat template knows none")
    pieces, done = [], ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:index], True) if index else opening()
        answered = render(messages[: index + 1], False)
        if not (prompt.startswith(done) and answered.startswith(prompt)):
            raise BadRecord(f"{where}: the chat template rewrites what stands before message {index}")
        pieces += [(prompt[len(done) :], False), (answered[len(prompt) :], is_target(message))]
        done = answered
    return pieces


def replaced(value: object, table: dict[str, str]) -> object:
    """A JSON value with every string's parts exchanged by `table`, in its order."""
    if isinstance(value, str):
        for old, new in table.items():
            value = value.replace(old, new)
    elif isinstance(value, dict):
        return {name: replaced(item, table) for name, item in value.items()}
    elif isinstance(value, list):
        return [replaced(item, table) for item in value]
    return value


def unused(texts: Iterable[str], count: int) -> list[str]:
    """`count` characters for private use that occur in none of the texts."""
    taken = set().union(*texts)
    return list(islice((chr(code) for code in range(0xF0000, 0xFFFFD) if chr(code) not in taken), count))


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Sample:
    """Tokens and response-only labels of a conversation.

    Only what the template writes is special, as in `fastdllm.prompts.encode_messages`: the name of a control token in a
    message means those characters. Raises BadRecord for whatever the template or the tokenizer refuses.
    """
    where, messages, tools = conversation
    try:
        texts = list(strings([messages, tools]))
        if not all(map(encodable, texts)):
            raise BadRecord(f"{where}: holds bytes that are not UTF-8, or half of a surrogate pair")
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        names = [name for name in added if any(name in text for text in texts)]
        stand_ins = dict(zip(names, unused(texts, len(names)), strict=True))
        plain = Conversation(where, replaced(messages, stand_ins), replaced(tools, stand_ins))
        meant = {stand_in: name for name, stand_in in stand_ins.items()}
        ids: list[int] = []
        labels: list[int] = []
        for text, target in turns(plain, tokenizer):
            piece = _encode_piece(text, meant, tokenizer)
            ids += piece
            labels += piece if target else [IGNORE] * len(piece)
    except RecursionError as error:
        raise BadRecord(f"{where}: nested too deeply") from error
    return Sample(np.array(ids, np.int32), np.array(labels, np.int32))


def _encode_piece(text: str, meant: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of a text whose stand-ins are control tokens' names that mean their characters."""
    ids: list[int] = []
    start = 0
    for at, character in enumerate(text if meant else ""):
        if character in meant:
            ids += tokenizer(text[start:at], add_special_tokens=False)["input_ids"]
            ids += encode_literally(meant[character], tokenizer)
            start = at + 1
    return ids + tokenizer(text[start:], add_special_tokens=False)["input_ids"]


def encode_literally(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of a text in which nothing is special: cut inside each added token's name, none is left to recognise."""
    name = next((name for name in tokenizer.get_added_vocab() if name in text and len(name) > 1), None)
    if name is None:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    at = text.index(name) + 1
    return encode_literally(text[:at], tokenizer) + encode_literally(text[at:], tokenizer)


def fit(sample: Sample, context: int, where: str) -> Sample:
    """The sample cut to `context` tokens. Raises BadRecord when nothing of a response is left."""
    cut = Sample(sample.ids[:context], sample.labels[:context])
    if (cut.labels[1:] == IGNORE).all():
        raise BadRecord(f"{where}: no response within the first {context} tokens")
    return cut


def pad_to_block(sample: Sample, block: int, fill: int, label: int = IGNORE) -> Sample:
    """The sample filled up to whole blocks with the token `fill`; full blocks get none.

    Published: masks that are no targets, for what a decoder sees behind the end of a text. They leave open what the
    model writes there. Filling with the end token, as `label` too, teaches it to repeat the end.
    """
    extra = -len(sample.ids) % block
    return Sample(
        np.pad(sample.ids, (0, extra), constant_values=fill),
        np.pad(sample.labels, (0, extra), constant_values=label),
    )


def pack(samples: Iterable[Sample], context: int) -> list[list[Sample]]:
    """Rows of whole samples in their order, each row as full as `context` tokens allow. No sample is cut."""
    rows: list[list[Sample]] = []
    room = 0
    for sample in samples:
        if len(sample.ids) > room:
            rows.append([])
            room = context
        rows[-1].append(sample)
        room -= len(sample.ids)
    return rows

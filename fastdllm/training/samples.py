# SPDX-License-Identifier: Apache-2.0
"""Conversations to token rows: response-only labels, padding to whole blocks, optional packing.

Only the assistant's tokens are targets, with what its template puts after them (`<|im_end|>` and a line break in
ChatML). Text is tokenised turn by turn, so that a prompt has the tokens it has when a model is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from fastdllm.conversations import MARKS, escaped, ids_of
from fastdllm.templates import rendered
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
            return rendered(tokenizer, messages, tools, prompt)
        except Exception as error:  # templates and what runs them raise anything: of jinja2, ValueError, IndexError ...
            raise BadRecord(f"{where}: the chat template refuses it: {error}") from error

    def opening() -> str:
        """What stands before the first answer of a conversation that begins with it: no template renders no message."""
        text = next(mark for mark in map(chr, MARKS) if mark not in messages[0]["content"])
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


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Sample:
    """Tokens and response-only labels of a conversation.

    Only what the template writes is special, as when the model is asked: the name of a control token in a message means
    those characters. Raises BadRecord for whatever the template or the tokenizer refuses.
    """
    where, messages, tools = conversation
    try:
        if not all(map(encodable, strings([messages, tools]))):
            raise BadRecord(f"{where}: holds bytes that are not UTF-8, or half of a surrogate pair")
        ids: list[int] = []
        labels: list[int] = []
        for text, target in turns(Conversation(where, escaped(tokenizer, messages), escaped(tokenizer, tools)), tokenizer):
            piece = ids_of(tokenizer, text)
            ids += piece
            labels += piece if target else [IGNORE] * len(piece)
    except RecursionError as error:
        raise BadRecord(f"{where}: nested too deeply") from error
    return Sample(np.array(ids, np.int32), np.array(labels, np.int32))


def fit(sample: Sample, context: int, where: str) -> Sample:
    """The sample cut to `context` tokens. Raises BadRecord when nothing of a response is left."""
    cut = Sample(sample.ids[:context], sample.labels[:context])
    if (cut.labels[1:] == IGNORE).all():
        raise BadRecord(f"{where}: no response within the first {context} tokens")
    return cut


def pad_to_block(sample: Sample, block: int, fill: int, label: int = IGNORE) -> Sample:
    """The sample filled up to whole blocks with the token `fill`; full blocks get none.

    Published: masks that are no targets, for what a decoder sees after the end of a text. They leave open what the
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

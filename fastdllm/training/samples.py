# SPDX-License-Identifier: Apache-2.0
"""Conversations to token rows: response-only labels, padding to whole blocks, optional packing.

Only the assistant's tokens are targets, with what its template puts after them (`<|im_end|>` and a line break in
ChatML). Text is tokenised turn by turn, so that a prompt has the tokens it has when a model is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from fastdllm.training.objective import IGNORE
from fastdllm.training.records import BadRecord, Conversation

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
    """The conversation's text in pieces, each with whether it is a response.

    Raises BadRecord for messages the chat template refuses, and for a template that rewrites earlier turns: the model
    would be trained on prompts it never gets.
    """

    where, messages, tools = conversation

    def render(messages: list[dict[str, object]], prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, tools=conversation.tools, tokenize=False, add_generation_prompt=prompt
            )
        except TemplateError as error:
            raise BadRecord(f"{where}: the chat template refuses it: {error}") from error

    if tools and "tools" not in tokenizer.chat_template:
        raise BadRecord(f"{where}: has tools, but the chat template knows none")
    pieces, done = [], ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:index], True)
        answered = render(messages[: index + 1], False)
        if not (prompt.startswith(done) and answered.startswith(prompt)):
            raise BadRecord(f"{where}: the chat template rewrites what stands before message {index}")
        pieces += [(prompt[len(done) :], False), (answered[len(prompt) :], True)]
        done = answered
    return pieces


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Sample:
    """Tokens and response-only labels of a conversation."""
    ids: list[int] = []
    labels: list[int] = []
    for text, response in turns(conversation, tokenizer):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if response else [IGNORE] * len(piece)
    return Sample(np.array(ids, np.int32), np.array(labels, np.int32))


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

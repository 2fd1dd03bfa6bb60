# SPDX-License-Identifier: Apache-2.0
"""From prompts, texts, conversations or ids, to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastdllm.models import Model

Messages = Sequence[dict[str, str]]
Prompts = str | Sequence[str] | Sequence[Messages] | Sequence[Tensor] | Tensor


def encode(model: Model, prompts: Prompts) -> list[Tensor]:
    """Prompts as 1-D LongTensors.

    A string is tokenised as it stands; a list of messages ({"role", "content"}) goes through the chat template; a tensor is
    taken as ids ([B, P], or one [P] per prompt). Raises ValueError for an empty prompt.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    elif isinstance(prompts, Tensor):
        prompts = list(prompts) if prompts.ndim == 2 else [prompts]
    out = []
    for prompt in prompts:
        if isinstance(prompt, Tensor):
            ids = prompt.detach().long().flatten()
        elif model.tokenizer is None:
            raise ValueError(f"model {model.name!r} has no tokenizer; pass token ids instead of text")
        elif isinstance(prompt, str):
            ids = torch.tensor(encode_text(model, prompt), dtype=torch.long)
        else:
            ids = encode_messages(model, list(prompt))
        if not len(ids):
            raise ValueError("a prompt is empty; at least one token is needed")
        if ids.min() < 0 or ids.max() >= model.spec.vocab:  # sync: bad ids would read outside the embedding
            raise ValueError(f"a prompt has token ids outside 0..{model.spec.vocab - 1}")
        out.append(ids)
    if not out:
        raise ValueError("prompts is empty")
    return out


def encode_text(model: Model, text: str) -> list[int]:
    """Token ids of a text; special tokens written in it are recognised, none is added (templates write their own)."""
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def render(model: Model, messages: list[dict[str, str]]) -> str:
    """The chat template's text, with the start of the answer; plain paragraphs for a model without a template."""
    if model.tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages)
    return model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_messages(model: Model, messages: list[dict[str, str]]) -> Tensor:
    """Ids [P] of the rendered messages, in which only the template's own special tokens are special.

    A user who writes the mask token's name means those characters. Each such name is swapped for a character that no
    message holds, and encoded as plain text where the template left that character.
    """
    if model.tokenizer is None:
        raise ValueError(f"model {model.name!r} has no tokenizer, so it cannot chat")
    contents = "".join(message["content"] for message in messages)
    names = [name for name in model.tokenizer.get_added_vocab() if name in contents]
    if not names:
        return torch.tensor(encode_text(model, render(model, messages)), dtype=torch.long)
    unused = (chr(code) for code in range(0xF0000, 0xFFFFD) if chr(code) not in contents)
    stand_ins = dict(zip(unused, sorted(names, key=len, reverse=True), strict=False))
    for stand_in, name in stand_ins.items():
        messages = [{**message, "content": message["content"].replace(name, stand_in)} for message in messages]
    ids, start, text = [], 0, render(model, messages)
    for at, character in enumerate(text):
        if character in stand_ins:
            ids += encode_text(model, text[start:at]) + encode_literally(model, stand_ins[character])
            start = at + 1
    return torch.tensor(ids + encode_text(model, text[start:]), dtype=torch.long)


def encode_literally(model: Model, text: str) -> list[int]:
    """Ids of a text in which nothing is special: cut inside each special token's name, none is left to recognise."""
    names = [name for name in model.tokenizer.get_added_vocab() if name in text and len(name) > 1]
    if not names:
        return encode_text(model, text)
    at = text.index(names[0]) + 1
    return encode_literally(model, text[:at]) + encode_literally(model, text[at:])

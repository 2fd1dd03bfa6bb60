# SPDX-License-Identifier: Apache-2.0
"""Words at token positions, "5:apples, 12:left", as the page takes them: tokens by position of the answer."""

from __future__ import annotations

import re

from fastdllm.conversations import encode_literally
from fastdllm.models import Model
from fastdllm.ui.conversation import clean

ITEM = re.compile(r"\s*(\d+)\s*:\s*(?:\"([^\"]*)\"|([^,\"]*))\s*(?:,|$)")


def parse_constraints(model: Model, text: str, length: int) -> dict[int, int]:
    """Tokens to fix, by position of an answer of `length`.

    A word gets a space in front, except at position 0; one in double quotes is taken as it stands. A word of several tokens
    takes as many positions. ValueError for what can't be read, does not fit, or would write a position twice.
    """
    fixed: dict[int, int] = {}
    at, text = 0, clean(text)
    while text[at:].strip():
        item = ITEM.match(text, at)
        word = item and (item[2] if item[2] is not None else item[3].strip())
        if not item or not word:
            raise ValueError(f"constraints: {text[at:].strip()!r} is not of the form position:word, position:word")
        at, position = item.end(), int(item[1])
        spaced = word if item[2] is not None or position == 0 else f" {word}"
        for offset, token in enumerate(encode_literally(model, spaced)):
            if position + offset >= length:
                raise ValueError(f"constraints: {word!r} at position {position} does not fit an answer of {length} tokens")
            if position + offset in fixed:
                raise ValueError(f"constraints: {word!r} overlaps another word at position {position + offset}")
            fixed[position + offset] = token
    return fixed

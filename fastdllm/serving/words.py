# SPDX-License-Identifier: Apache-2.0
"""Words at token positions, "5:apples, 12:left", as the page takes them: tokens by position of the answer."""

from __future__ import annotations

from fastdllm.conversations import encode_literally
from fastdllm.fields import shown
from fastdllm.models import Model
from fastdllm.ui.conversation import clean


def next_item(text: str) -> tuple[int, str, bool, str]:
    """Of "position:word, ...": the first position, its word, whether the word is quoted, and the text after its comma.

    ValueError for what can't be read. No regular expression: where blanks may stand in several places of one, it tries
    every way to share them out, and a line of blanks keeps the server busy for hours.
    """
    number, colon, rest = text.partition(":")
    number, rest = number.strip(), rest.lstrip()
    quoted = rest.startswith('"')
    if quoted:
        word, closed, rest = rest[1:].partition('"')
        nothing, _, rest = rest.partition(",")
    else:
        word, _, rest = rest.partition(",")
        word, closed, nothing = word.strip(), colon, '"' if '"' in word else ""
    if not (number.isascii() and number.isdigit() and len(number) < 10 and closed and word) or nothing.strip():
        raise ValueError(f"constraints: {shown(text.strip())} is not of the form position:word, position:word")
    return int(number), word, quoted, rest


def parse_constraints(model: Model, text: str, length: int) -> dict[int, int]:
    """Tokens to fix, by position of an answer of `length`.

    A word gets a space in front, except at position 0; one in double quotes is taken as it stands. A word of several tokens
    takes as many positions. ValueError for what can't be read, does not fit, or would write a position twice.
    """
    fixed: dict[int, int] = {}
    text = clean(text)
    while text.strip():
        position, word, quoted, text = next_item(text)
        spaced = word if quoted or position == 0 else f" {word}"
        for offset, token in enumerate(encode_literally(model, spaced)):
            if position + offset >= length:
                raise ValueError(f"constraints: {word!r} at position {position} does not fit an answer of {length} tokens")
            if position + offset in fixed:
                raise ValueError(f"constraints: {word!r} overlaps another word at position {position + offset}")
            fixed[position + offset] = token
    return fixed

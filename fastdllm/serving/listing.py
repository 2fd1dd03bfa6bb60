# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of an answer's tokens, at the forward that committed each, in OpenAI's two formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdllm.text import AnswerText, Decode, TokenText

if TYPE_CHECKING:
    from fastdllm.likelihood import Reading
    from fastdllm.serving.jobs import Progress
    from fastdllm.serving.tokens import Spelling

Alternatives = Sequence[tuple[int, float]]  # (token, log-probability), likeliest first


@dataclass(frozen=True)
class Listed:
    """A token of the answer, the offset of its text, its log-probability (None for a constraint), and the alternatives."""

    token: int
    offset: int
    logprob: float | None
    alternatives: Alternatives


class TokenList:
    """What was committed at each of `length` positions, handed out once, in order, as the text gets there."""

    def __init__(self, decode: Decode, length: int) -> None:
        self._logprobs: list[float | None] = [None] * length
        self._alternatives: list[Alternatives] = [()] * length
        self._characters = TokenText(decode)
        self._offset = self._given = 0

    def committed(self, progress: Progress) -> None:
        """Take in one forward."""
        for i, new in enumerate(progress.committed):
            if new:
                self._logprobs[progress.start + i] = progress.logprobs[i]
                self._alternatives[progress.start + i] = progress.likeliest[i] if progress.likeliest else ()

    def complete(self, logprobs: Sequence[float]) -> None:
        """Take in those of the finished answer; NaN where nothing was committed."""
        self._logprobs = [None if math.isnan(value) else value for value in logprobs]

    def take(self, text: AnswerText, over: bool) -> list[Listed]:
        """Tokens that were not given out yet and whose text begins within what is final; all that are left when it is over,
        but none after a stop string."""
        out = []
        while self._given < text.tokens and (self._offset < len(text.text) or (over and not text.is_cut)):
            out.append(self._listed(text.ids[self._given]))
            self._offset += len(self._characters.feed([out[-1].token]))
        return out

    def end(self, text: AnswerText) -> list[Listed]:
        """The stop token that ended the answer, after all others were taken; none where nothing or a stop string did."""
        ended = text.ended and not text.is_cut and self._given == text.tokens
        return [self._listed(text.ids[text.tokens])] if ended else []

    def _listed(self, token: int) -> Listed:
        """The next token."""
        at, self._given = self._given, self._given + 1
        logprob = self._logprobs[at]
        # One number for one token: the other is the same up to rounding.
        others = [(other, logprob if other == token and logprob is not None else p) for other, p in self._alternatives[at]]
        return Listed(token, self._offset, logprob, others)


def chat_logprobs(spelling: Spelling, tokens: Sequence[Listed], most: int) -> dict[str, Any]:
    """The format of chat completions, with the `most` likeliest alternatives of each token."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": spelling.text(token), "logprob": _finite(logprob), "bytes": spelling.bytes(token)}

    content = [
        {**entry(t.token, t.logprob), "top_logprobs": [entry(token, p) for token, p in t.alternatives[:most]]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    spelling: Spelling,
    tokens: Sequence[Listed],
    most: int,
    prompt: tuple[Sequence[int], Sequence[Reading]] | None,
    offset: int,
) -> dict[str, Any]:
    """The format of completions. prompt: ids to list first, and what was read of all but the first; offset: length of the
    prompt's text where it is repeated."""
    out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    if prompt is not None:
        _list_prompt(spelling, out, *prompt)
    for t in tokens:
        top = {spelling.text(token): _finite(p) for token, p in reversed(t.alternatives[:most])}
        if t.logprob is not None and most:
            top.setdefault(spelling.text(t.token), t.logprob)  # as OpenAI does: the token itself is always there
        _append(out, spelling.text(t.token), t.logprob, top, offset + t.offset)
    return out


def _list_prompt(spelling: Spelling, out: dict[str, list[Any]], ids: Sequence[int], readings: Sequence[Reading]) -> None:
    at = 0
    for token, reading in zip(ids, [None, *readings], strict=True):
        text = spelling.text(token)
        if reading is None:
            _append(out, text, None, None, at)
        else:
            value, best = float(reading.log_prob[0]), int(reading.top[0])
            # The same number for the token and for the likeliest one where they are the same: clients compare them.
            top = {text: value} if best == token else {text: value, spelling.text(best): math.log(float(reading.conf[0]))}
            _append(out, text, value, top, at)
        at += len(text)


def _append(out: dict[str, list[Any]], text: str, logprob: float | None, top: dict[str, Any] | None, offset: int) -> None:
    out["tokens"].append(text)
    out["token_logprobs"].append(_finite(logprob))
    out["top_logprobs"].append(top)
    out["text_offset"].append(offset)


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes -9999.0 for what is too unlikely to list."""
    return logprob if logprob is None or math.isfinite(logprob) else -9999.0

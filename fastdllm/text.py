# SPDX-License-Identifier: Apache-2.0
"""The text of an answer while it is being written: only what will not change any more, in order.

A diffusion model fills positions in any order, a token may be a part of a character, and a stop string may be half written.
`AnswerText` holds back whatever could still change. The server, `stream_text` and the terminal chat all use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdllm.models import Model

UNKNOWN = "\ufffd"  # what a part of a character decodes to
Decode = Callable[[Sequence[int]], str]


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the first stop string; empty stop strings say nothing."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def is_cut(text: str, stops: Sequence[str]) -> bool:
    """Whether `cut` gives the same for `text` and for anything that starts with it: a stop string is there, and none that
    would start before it can still be incomplete."""
    return any(stop in text for stop in stops) and len(cut(text, stops)) + max(map(len, stops)) - 1 <= len(text)


def settled(text: str, stops: Sequence[str]) -> tuple[int, bool]:
    """(n, found): `text[:n]` holds no stop string and no beginning of one; found: a whole one begins at n."""
    for at in range(len(text)):
        if any(text.startswith(stop, at) for stop in stops):
            return at, True
        if any(stop.startswith(text[at:]) for stop in stops):
            return at, False
    return len(text), False


class TokenText:
    """Token ids, a few at a time, to text at whole characters.

    decode: ids -> text.

    Joined, the pieces are `decode` of all ids at once. A short window is decoded anew each time, because in some tokenizers
    what a token looks like depends on the one before it.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._known = 0  # leading ids of the window whose text was given out whole
        self._given = 0  # characters of the window's text that were given out

    def feed(self, ids: Sequence[int]) -> str:
        """The text that is certain once `ids` follow what was fed before."""
        if not ids:
            return ""
        self._window += ids
        text = self._decode(self._window)
        whole = text.rstrip(UNKNOWN)
        piece, self._given = whole[self._given :], max(self._given, len(whole))
        if len(whole) == len(text):
            self._window, self._known = self._window[self._known :], len(self._window) - self._known
            self._given = len(self._decode(self._window))
        return piece

    def finish(self) -> str:
        """What was held back, when nothing follows."""
        text = self._decode(self._window) if self._window else ""
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece


class AnswerText:
    """The text of one answer, fed with the blocks as they are decoded.

    decode: ids -> text without special tokens.
    length: positions of the answer.
    mask_id: the id of an open position.
    stop_ids, stops: tokens and texts that end the answer; neither is part of it.
    fixed: constraints, token by position; a stop token before the last of them ends nothing.
    revocable: whether tokens of a block may change until the next one begins.
    """

    def __init__(
        self,
        decode: Decode,
        length: int,
        mask_id: int,
        stop_ids: Sequence[int] = (),
        stops: Sequence[str] = (),
        fixed: Mapping[int, int] | None = None,
        revocable: bool = False,
    ) -> None:
        self.ids = [mask_id] * length
        for at, token in (fixed or {}).items():
            self.ids[at] = token
        self.ended = False  # a stop token or a stop string came
        self.tokens = 0  # ids that are final and belong to the answer
        self.text = ""  # all that was given out
        self._mask, self._stop_ids, self._stops = mask_id, frozenset(stop_ids), [stop for stop in stops if stop]
        self._after = max(fixed or {}, default=-1) + 1
        self._revocable = revocable
        self._cut = self._closed = False
        self._characters = TokenText(decode)
        self._held = ""

    @property
    def is_cut(self) -> bool:
        """Whether a stop string ended the answer, so that its text is shorter than its tokens."""
        return self._cut

    def step(self, start: int, ids: Sequence[int]) -> str:
        """The new text after a forward that left `ids` at the positions from `start` on. The same again is harmless."""
        self.ids[start : start + len(ids)] = ids
        if self._revocable:
            return self._extend(start)
        return self._extend(next((at for at, token in enumerate(self.ids) if token == self._mask), len(self.ids)))

    def finish(self, ids: Sequence[int] | None = None) -> str:
        """The rest of the text, when the answer is over; ids: all of the answer, open positions at most after its end."""
        if ids is not None:
            self.ids[: len(ids)] = ids
        piece = self._extend(next((at for at, token in enumerate(self.ids) if token == self._mask), len(self.ids)))
        return piece + self._close()

    def _extend(self, final: int) -> str:
        """Take in the positions before `final`, which will not change any more."""
        fresh = []
        for at in range(self.tokens, final):
            if self._closed:
                break
            if self.ids[at] in self._stop_ids and at >= self._after:
                self.ended = self._closed = True
                break
            fresh.append(self.ids[at])
        self.tokens += len(fresh)
        piece = self._give(self._characters.feed(fresh))
        return piece + self._close() if self._closed else piece

    def _give(self, text: str) -> str:
        if self._cut:
            return ""
        self._held += text
        sure, self._cut = settled(self._held, self._stops)
        self.ended = self.ended or self._cut
        piece, self._held = self._held[:sure], self._held[sure:]
        self.text += piece
        return piece

    def _close(self) -> str:
        """Nothing follows: an unfinished stop string is none."""
        self._closed = True
        piece = self._give(self._characters.finish())
        if self._cut:
            return piece
        rest = cut(self._held, self._stops)
        self._cut = len(rest) < len(self._held)
        self.ended, self._held = self.ended or self._cut, ""
        self.text += rest
        return piece + rest


def text_of(
    model: Model,
    length: int,
    stop_ids: Sequence[int],
    stops: Sequence[str] = (),
    fixed: Mapping[int, int] | None = None,
    revocable: bool = False,
) -> AnswerText:
    """An `AnswerText` in this model's tokens."""
    tokenizer: Any = model.tokenizer

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return AnswerText(decode, length, model.spec.mask_id, stop_ids, stops, fixed, revocable)

# SPDX-License-Identifier: Apache-2.0
"""What a decoder sees of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class View:
    """What a decoder sees of R rows, one block of Q positions each.

    ids: [R, Q] int64, the mask id where masked.
    masked: [R, Q] bool, positions that may be committed now.
    top: [R, Q] int64, the token that each position would take.
    conf: [R, Q] fp32, its confidence.
    step: [R], forwards spent on the block, without an opening pass that told nothing of it.
    initial: [R], masks when the block opened.
    mask_id: the id that a rule writes to mask a position again.
    entropy, margin: [R, Q] fp32, only if the decoder `needs` them.
    slot: [R], where each row's share of the decoder's `state` lies.
    state: the tensors that the decoder keeps from step to step.
    unaware: [R, Q] fp32, only if the decoder has a `shadow`: how likely the token at a position is when that position is
        masked and all others are not. NaN where the position may not be masked again.
    editable: [R, Q] bool, only if the decoder `edits`: positions of the open block that decoding has written, and that this
        forward predicts.
    causal: [R] bool, only if the decoder `drafts`: the pass was read from left to right, and verifies the drafts; or it
        opens a block, and gives its first token.
    attention: [R, Q, Q] fp32, only if the decoder `needs` it: how much of its attention in the last layer the query that
        predicts position i gives to position j, the mean over heads.
    answer, stops: [R, Q] bool and [R, n], only if the decoder `needs` "stops": the positions of the answer, and the tokens
        that end it.
    logits, score: only if the decoder has an `adjust`: [R, Q, V] fp32, and what turns logits into scores.
    logprob: [R, Q] fp32, the log-probability of `top` where a position was scored, and of the token there when it was
        committed elsewhere. A rule that takes over what another branch holds takes this over too.
    """

    ids: Tensor
    masked: Tensor
    top: Tensor
    conf: Tensor
    step: Tensor
    initial: Tensor
    mask_id: int
    entropy: Tensor | None = None
    margin: Tensor | None = None
    slot: Tensor | None = None
    state: dict[str, Tensor] | None = None
    unaware: Tensor | None = None
    editable: Tensor | None = None
    causal: Tensor | None = None
    logprob: Tensor | None = None
    attention: Tensor | None = None
    answer: Tensor | None = None
    stops: Tensor | None = None
    logits: Tensor | None = None
    score: Callable[[Tensor], Any] | None = None

    def rows(self, number: float | Tensor) -> Tensor:
        """A number of the rule, or the rows' own ones [R, 1], as fp32 [R]."""
        return number.flatten() if isinstance(number, Tensor) else torch.full_like(self.conf[:, 0], number)

    def take_over(self, source: Tensor, branches: int) -> None:
        """Let all branches of a row have the log-probabilities that branch source [R, 1, Q] holds at each position."""
        if self.logprob is not None:
            own = self.logprob.view(-1, branches, self.logprob.shape[1]).gather(1, source)[:, 0]
            self.logprob = repeat(own, branches)

    def branch(self, which: Tensor, branches: int) -> View:
        """The view of one branch `which` [R] of every row."""
        index = torch.arange(len(which), device=which.device) * branches + which
        own = copy.copy(self)
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                setattr(own, name, x[index])
        return own

    def rescore(self, logits: Tensor) -> None:
        """Take the scores from other logits [R, Q, V]."""
        if self.score is not None:
            s = self.score(logits)
            self.top, self.conf, self.entropy, self.margin, self.logprob = s.top, s.conf, s.entropy, s.margin, s.logprob

    def stopped(self) -> Tensor:
        """[R] bool: whether a token that ends the answer has no mask before it."""
        if self.stops is None or self.answer is None:
            return torch.zeros_like(self.step, dtype=torch.bool)
        return (ends(self.ids, self.answer, self.stops) & ~self.masked & (self.masked.cumsum(1) == 0)).any(1)

    def scores(self) -> Tensor:
        """Confidence [R, Q], -inf where nothing may be committed."""
        return self.conf.masked_fill(~self.masked, -torch.inf)

    def ranked(self) -> tuple[Tensor, Tensor]:
        """Scores [R, Q] in falling order, and each position's rank in it from 0 (of equal ones the first position leads)."""
        ranked, order = self.scores().sort(dim=1, descending=True, stable=True)
        return ranked, order.argsort(dim=1)

    def commit(self, pick: Tensor) -> Tensor:
        """The next ids when `pick` [R, Q] bool is committed, and at least the most confident masked position of each row."""
        if pick.dtype != torch.bool or pick.shape != self.ids.shape:
            got, wanted = f"{list(pick.shape)} of {pick.dtype}", list(self.ids.shape)
            raise ValueError(f"commit takes which positions to commit, {wanted} of torch.bool, not {got}")
        best = torch.zeros_like(pick).scatter_(1, self.scores().argmax(1, keepdim=True), True)
        return torch.where((pick | best) & self.masked, self.top, self.ids)


def ends(ids: Tensor, answer: Tensor, stops: Tensor) -> Tensor:
    """[R, Q] bool: which of ids [R, Q] lie in the answer [R, Q] and are one of the tokens that end it, stops [R, n]."""
    return (ids[..., None] == stops[:, None]).any(-1) & answer


def repeat(x: Tensor, branches: int) -> Tensor:
    """x [R, ...] -> [R * branches, ...], each row once for every branch."""
    return x[:, None].expand(-1, branches, *x.shape[1:]).flatten(0, 1) if branches > 1 else x

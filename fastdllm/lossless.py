# SPDX-License-Identifier: Apache-2.0
"""The tokens of any deterministic rule in fewer forwards: several of its steps are checked in one forward.

Branches of a row hold drafts of what the rule will write next (a graph of drafts, as in Spiffy, arXiv 2509.18085). Branch 0
holds the row's content, and its scores give the rule's next step. Where a branch holds the result of that step, its scores
give the step after, and so on: a walk over the branches that takes the rule's own steps and no others. New drafts come from
the scores at its end. Lossless up to the rounding of a forward, wherever a forward depends on the block's content only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdllm.decoders.base import DecoderRule
from fastdllm.drafts import Graph, longest
from fastdllm.view import View, repeat

if TYPE_CHECKING:
    from typing_extensions import Self

TAKEN, DRAFTED = "lossless.taken", "lossless.drafted"


class Lossless(DecoderRule):
    """`inner`, several steps at a time. graph: what the branches 1, 2, ... draft. With 0 branches a rule asks for as many as
    pay."""

    inner: DecoderRule
    graph: Graph

    lossless = True

    @property
    def branches(self) -> int:  # type: ignore[override]
        return len(self.graph) + 1

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs | {"stops"}

    @property
    def probability(self) -> bool:  # type: ignore[override]
        return self.inner.probability

    @property
    def per_request(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.per_request

    @property
    def numbers(self) -> dict[str, float]:
        return self.inner.numbers

    @property
    def owner(self) -> Hashable:
        return Lossless, self.graph, self.inner.owner

    @property
    def adjust(self) -> Callable[[View, Tensor], Tensor] | None:  # type: ignore[override]
        """What `inner` makes of the logits depends on the steps before, so they wait for the walk."""
        return _keep if self.inner.adjust else None

    def of(self, numbers: Mapping[str, Tensor]) -> Self:
        if not self.per_request:
            return self
        return self._with({"inner": self.inner.of({name: column[:: self.branches] for name, column in numbers.items()})})

    def checked(self, numbers: Mapping[str, float]) -> None:
        self.inner.checked(numbers)

    def state(self, width: int, vocab: int, device: torch.device, rows: int) -> dict[str, Tensor]:
        """The state of `inner`, with a second share for each row, where steps go that count for nothing; the steps that it
        has taken in the block [rows]; of each branch the ranks that it drafts [n, width]."""
        drafted = [[rank in draft for rank in range(width)] for draft in ((), *self.graph)]
        return {
            **(self.inner.state(width, vocab, device, 2 * rows) if self.inner.state else {}),
            TAKEN: torch.zeros(rows, dtype=torch.long, device=device),
            DRAFTED: torch.tensor(drafted, device=device),
        }

    def step(self, view: View) -> Tensor:
        end = self._walk(view)
        view.logprob = None if end.logprob is None else repeat(end.logprob, self.branches)
        return self._drafts(end).flatten(0, 1)

    def _walk(self, view: View) -> View:
        """Take the steps of `inner` that the branches answer, from the content of branch 0 on. Returns what R rows then hold
        and have open, with the scores of the last content that was scored."""
        assert view.state is not None and view.slot is not None
        n, count = self.branches, view.state[TAKEN]
        slot = view.slot[::n]
        taken = count[slot].masked_fill(view.step[::n] == 0, 0)
        contents = view.ids.unflatten(0, (-1, n))  # [R, n, Q]
        here = end = view.branch(torch.zeros_like(slot), n)
        walks = torch.ones_like(slot, dtype=torch.bool)
        for left in reversed(range(longest(self.graph))):
            here.step, here.slot = taken, torch.where(walks, slot, slot + len(count))
            if self.inner.adjust:
                here.rescore(self.inner.adjust(here, here.logits))
            before, here.ids = here.masked, self.inner.step(here)
            here.masked = before & (here.ids == view.mask_id)
            new = before & ~here.masked
            end = _joined(here, end, walks, new)
            taken = taken + walks.long()
            if left:
                same = (contents == end.ids[:, None]).all(2)
                walks = walks & new.any(1) & same.any(1) & ~end.stopped()
                here = view.branch(same.long().argmax(1), n)
        count[slot] = taken
        return end

    def _drafts(self, end: View) -> Tensor:
        """What the branches hold next [R, n, Q]: the content as it is, and with the tokens of each draft."""
        assert end.state is not None
        holds = end.state[DRAFTED].t()[end.ranked()[1]].transpose(1, 2) & end.masked[:, None]
        return torch.where(holds, end.top[:, None], end.ids[:, None])


@dataclass(frozen=True)
class Over(Lossless):
    """A rule of the registry, as the option `lossless` has it."""

    inner: DecoderRule
    graph: Graph


def _joined(here: View, end: View, walks: Tensor, new: Tensor) -> View:
    """`here` for the rows that walk [R] and `end` for the others; log-probabilities of what is `new` [R, Q] only."""
    out, rows = copy.copy(end), walks[:, None]
    for name in ("ids", "masked", "top", "conf"):
        setattr(out, name, torch.where(rows, getattr(here, name), getattr(end, name)))
    if here.logprob is not None and end.logprob is not None:
        out.logprob = torch.where(rows & new, here.logprob, end.logprob)
    return out


def _keep(view: View, logits: Tensor) -> Tensor:
    view.logits = logits
    return logits

# SPDX-License-Identifier: Apache-2.0
"""Parallel speculative decoding (PSD, arXiv 2605.15609): commit by a rule, and keep the next tokens that stay the likeliest.

A rule such as a threshold commits several tokens. Each further branch also holds the next most confident token, one more
than the branch before it. After the joint forward the deepest branch is kept whose tokens are all still the likeliest: each
is what the branch before it, which does not hold it, predicts there now. The rule goes on from that branch. So a token of
which the rule is not sure may be committed too, if it stayed the likeliest; the tokens are not those of the rule.

Written after descriptions of the paper, whose full text was not at hand. They do not say how many tokens a depth adds.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fastdllm.decoders.base import DecoderRule
from fastdllm.decoders.credit import RULES, decider
from fastdllm.fields import Bounds, shown
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """Fewer forwards than its rule where one has room for branches (small batches); it wants a high threshold."""

    level: Annotated[float, "First option of the rule that decides."] = 0.97
    rule: Annotated[str, "Rule that decides: threshold, factor or frechet."] = "threshold"
    branches: Annotated[int, "Branches per row, each a token deeper; 1 is the rule.", Bounds(at_most="block_length")] = 4

    per_request = ("level",)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule={shown(self.rule)} is unknown; allowed are {', '.join(RULES)}")
        if self.branches < 1:
            raise ValueError(f"branches={self.branches} must be at least 1")
        RULES[self.rule](self.level)

    def step(self, view: View) -> Tensor:
        n = self.branches
        deepest = self._deepest(view)
        here = view.branch(deepest, n)
        level = self.level[::n] if isinstance(self.level, Tensor) else self.level
        after = decider(self.rule, level).step(here)
        here.masked = here.masked & (after == view.mask_id)
        drafted = here.ranked()[1][:, None] < torch.arange(n, device=after.device)[:, None]
        return torch.where(drafted & here.masked[:, None], here.top[:, None], after[:, None]).flatten(0, 1)

    def _deepest(self, view: View) -> Tensor:
        """The deepest branch [R] that is consistent, with each token's log-probability from where it was last open."""
        n = self.branches
        ids, masked, top = (t.unflatten(0, (-1, n)) for t in (view.ids, view.masked, view.top))
        new = masked[:, :-1] & ~masked[:, 1:]  # what each branch holds in addition to the one before
        same = new.any(2) & (~new | (ids[:, 1:] == top[:, :-1])).all(2)
        deepest = same.long().cumprod(1).sum(1)
        passed = torch.arange(n, device=ids.device)[:, None] <= deepest[:, None, None]
        view.take_over(((masked & passed).sum(1, keepdim=True) - 1).clamp(min=0), n)
        return deepest

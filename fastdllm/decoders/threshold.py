# SPDX-License-Identifier: Apache-2.0
"""Confidence threshold (Fast-dLLM, arXiv 2505.22618): commit every token whose probability reaches the threshold.

Let n tokens have a probability above 1 - e each, with (n + 1) e <= 1. Then their product and their joint distribution share
the most likely value (theorem 1 there). So independent commits do little harm at a high threshold.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fastdllm import kernels
from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """The default, and the rule of the presets paper, balanced and fast."""

    threshold: Annotated[float, "Probability from which a token is committed."] = 0.9
    strict: Annotated[bool, "Commit above the threshold (v2's published rule) instead of from it."] = False
    steps_per_block: Annotated[int, "Forwards of a block at most, of an even share or more each (LLaDA2.0); 0: any."] = 0

    per_request = ("threshold",)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must lie in [0, 1]")
        if self.steps_per_block < 0:
            raise ValueError(f"steps_per_block={self.steps_per_block} must be at least 0")

    def step(self, view: View) -> Tensor:
        rule = "threshold_strict" if self.strict else "threshold"
        after = kernels.accept(view.ids, view.top, view.conf, view.masked, rule, view.rows(self.threshold))
        if not self.steps_per_block:
            return after
        # As published, a whole block's share, also where the block holds fewer masks.
        share, more = divmod(view.ids.shape[1], self.steps_per_block)
        due = kernels.accept(view.ids, view.top, view.conf, view.masked, "quota", share + (view.step < more).float())
        return torch.where(after == view.mask_id, due, after)

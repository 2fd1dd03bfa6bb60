# SPDX-License-Identifier: Apache-2.0
"""Frechet profile (Fast-dLLM++, arXiv 2606.02955): commit the longest prefix, in falling confidence, that is provably safe.

The n best tokens together have at least the probability c_1 + ... + c_n - (n - 1) (Frechet's bound), and any other choice
at those positions at most 1 - c_n. While the first exceeds the second, the joint maximum is the tuple of single maxima; it
is the strongest such certificate that can be had from marginals. Accepts whatever `factor` accepts at factor = 1 - delta.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """In place of a threshold: commits more tokens than `factor` at the same certainty."""

    delta: Annotated[float, "How far the lower bound must exceed the upper one, in [-1, 1]; smaller commits more."] = 0.25

    per_request = ("delta",)

    def __post_init__(self) -> None:
        if not -1 <= self.delta <= 1:
            raise ValueError(f"delta={self.delta} must lie in [-1, 1]")

    def step(self, view: View) -> Tensor:
        ranked, rank = view.ranked()
        before = torch.arange(ranked.shape[1], device=ranked.device)
        gap = ranked.clamp(min=0).cumsum(1) - before - (1 - ranked)
        # The gap never grows along the prefix, so the number of positions above delta is the longest such prefix.
        return view.commit(rank < (gap > self.delta).sum(1, keepdim=True))

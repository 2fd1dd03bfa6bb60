# SPDX-License-Identifier: Apache-2.0
"""Hierarchical rule (dInfer, arXiv 2510.08666): besides the confident tokens, the best token of every run of masks.

Commits that lie apart depend on each other less than neighbours do, so one per contiguous run of masks may be taken at a
lower probability.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """Fewer forwards than `threshold` at 0.9, for some accuracy."""

    threshold: Annotated[float, "Probability from which any token is committed."] = 0.8
    low: Annotated[float, "Probability above which the best token of a run is committed."] = 0.62

    per_request = ("threshold", "low")

    def __post_init__(self) -> None:
        for name in ("threshold", "low"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")

    def step(self, view: View) -> Tensor:
        scores, masked = view.scores(), view.masked
        first = masked.clone()
        first[:, 1:] &= ~masked[:, :-1]
        run = first.cumsum(1).masked_fill(~masked, 0)  # 1, 2, ... by run; 0 outside
        best = torch.full((len(scores), scores.shape[1] + 1), -torch.inf, device=scores.device)
        best = best.scatter_reduce(1, run, scores, "amax").gather(1, run)
        return view.commit((scores >= self.threshold) | ((scores == best) & (scores > self.low)))

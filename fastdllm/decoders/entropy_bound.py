# SPDX-License-Identifier: Apache-2.0
"""Entropy bound (EB-Sampler, arXiv 2505.24857): commit the longest prefix, in falling confidence, of bounded entropy.

Committing a set at once ignores how its tokens depend on each other. That error is at most the sum of their entropies less
the largest one. The rule keeps this bound at or below gamma.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """In place of a threshold: bounds how much tokens that are committed together may depend on each other."""

    gamma: Annotated[float, "Bound on that dependence in nats; 0 commits one token, and more only at entropy 0."] = 0.1

    per_request = ("gamma",)

    needs = frozenset({"entropy"})

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise ValueError(f"gamma={self.gamma} must be at least 0")

    def step(self, view: View) -> Tensor:
        _, rank = view.ranked()
        entropy = torch.zeros_like(view.entropy).scatter(1, rank, view.entropy.masked_fill(~view.masked, torch.inf))
        # Sum of all but the largest, which never falls along the prefix; summed so because inf - inf is not a number.
        largest = entropy.cummax(1).values
        rest = torch.minimum(entropy[:, 1:], largest[:, :-1]).cumsum(1)
        count = 1 + (rest <= self.gamma).sum(1, keepdim=True)
        return view.commit(rank < count)

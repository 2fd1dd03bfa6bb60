# SPDX-License-Identifier: Apache-2.0
"""Wide in, narrow out (WINO, arXiv 2507.18578): commit early, and remask what the text around it does not confirm.

A low threshold fills the block fast and sometimes wrongly. So every step asks each token of the block how likely it is given
everything but itself (`shadows.py`), and remasks the doubtful ones. It remasks fewer than it commits, so that each step
gains a token, and a block ends.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """A low threshold whose mistakes are repaired: wrong tokens are masked again."""

    threshold: Annotated[float, "Probability above which a token is committed (paper: 0.6; 0.7 for code)."] = 0.6
    keep: Annotated[float, "Probability, given everything but itself, from which a token stays."] = 0.9

    per_request = ("threshold", "keep")

    shadow = True

    def __post_init__(self) -> None:
        for name in ("threshold", "keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")

    def step(self, view: View) -> Tensor:
        scores, rank = view.scores(), view.ranked()[1]
        most = (view.masked.sum(1, keepdim=True) * 7 // 10).clamp(5, 20)  # the paper's cap on commits, 0.7 of the masks
        commit = view.masked & ((rank == 0) | ((scores > self.threshold) & (rank < most)))
        doubted = view.unaware < self.keep  # never where it is NaN
        worst = view.unaware.masked_fill(~doubted, torch.inf).argsort(dim=1, stable=True).argsort(1)
        remask = doubted & (worst < commit.sum(1, keepdim=True) - 1)
        return torch.where(commit, view.top, view.ids.masked_fill(remask, view.mask_id))

# SPDX-License-Identifier: Apache-2.0
"""Joint thresholds (LLaDA2.1, arXiv 2602.08676): one for masks, another for tokens that are written already.

A model that was trained to correct text may also disagree with what the block holds. Each forward commits the masks above
the one threshold, and replaces what decoding wrote where another token is above the other one. A full block is read again
until nothing in it changes. The defaults are the model card's quality mode. Its speed mode is
`threshold=0.5` and an editing threshold of 0.
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
    """LLaDA2.1: tokens of the open block are replaced where the model comes to prefer others."""

    threshold: Annotated[float, "Probability above which a token is committed."] = 0.7
    editing_threshold: Annotated[float, "Probability above which another token replaces a written one; 1: none does."] = 0.5
    max_post_steps: Annotated[int, "Forwards over a full block at most, which only edit."] = 16

    per_request = ("threshold", "editing_threshold")

    edits = True

    def __post_init__(self) -> None:
        for name in self.per_request:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.max_post_steps < 0:
            raise ValueError(f"max_post_steps={self.max_post_steps} must be at least 0")

    def step(self, view: View) -> Tensor:
        limit = view.rows(self.threshold)
        after = kernels.accept(view.ids, view.top, view.conf, view.masked, "threshold_strict", limit)
        return torch.where(view.editable & (view.conf > self.editing_threshold), view.top, after)

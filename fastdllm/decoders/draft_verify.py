# SPDX-License-Identifier: Apache-2.0
"""Draft and verify (FreeDave, arXiv 2510.00294): the tokens of one-token-per-step decoding, in fewer forwards.

The logits that commit one token also suggest the next ones. Branch d holds the block with the d + 1 best committed, and one
forward runs all branches. Branch 0 is right by construction; branch d + 1 is right when branch d is and one token per step
would turn branch d into it. The deepest right branch is what that decoding reaches several forwards later, and new drafts
start from there. Lossless up to the rounding of a forward, under every cache whose forward depends only on the block's
content.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fastdllm.decoders.base import DecoderRule
from fastdllm.fields import Bounds
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """The tokens of one token per step in fewer forwards, where a forward is bound by memory (preset exact)."""

    depth: Annotated[int, "Branches per row; 1 is one token per step.", Bounds(at_most="block_length")] = 4

    lossless = True

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be at least 1")

    @property
    def branches(self) -> int:  # type: ignore[override]
        return self.depth

    def step(self, view: View) -> Tensor:
        shape = (-1, self.depth, view.ids.shape[1])
        ids, masked, top = view.ids.view(shape), view.masked.view(shape), view.top.view(shape)
        rank = view.ranked()[1].view(shape)
        single = torch.where((rank == 0) & masked, top, ids)  # what one token per step makes of each branch
        right = (single[:, :-1] == ids[:, 1:]).all(2)
        deepest = right.long().cumprod(1).sum(1)[:, None, None].expand(-1, 1, shape[2])
        # A token that a right branch holds was committed by the last branch before it in which it was still masked.
        branch = torch.arange(self.depth, device=ids.device)[:, None]
        by = ((masked & (branch <= deepest)).sum(1, keepdim=True) - 1).clamp(min=0)
        view.take_over(by, self.depth)
        ids, masked, top, rank = (t.gather(1, deepest) for t in (ids, masked, top, rank))  # [R, 1, Q]
        return torch.where((rank <= branch) & masked, top, ids).flatten(0, 1)

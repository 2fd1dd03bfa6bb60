# SPDX-License-Identifier: Apache-2.0
"""Look-ahead branches (LoPA, arXiv 2512.16229): try several next tokens at once, keep the branch that clears the view most.

Branch 0 commits what the threshold allows; each further branch also commits one more token, the next most confident. The
branch whose remaining masks are the most confident after the joint forward wins and gives the next round's tokens.
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
    """Fewer forwards where one has room for branches (small batches); it wants a high threshold."""

    threshold: Annotated[float, "Probability from which a token is committed in every branch."] = 0.9
    branches: Annotated[int, "Branches per row; 1 is decoder threshold.", Bounds(at_most="block_length")] = 4

    per_request = ("threshold",)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must lie in [0, 1]")
        if self.branches < 1:
            raise ValueError(f"branches={self.branches} must be at least 1")

    def step(self, view: View) -> Tensor:
        shape = (-1, self.branches, view.ids.shape[1])
        ids, masked, top = view.ids.view(shape), view.masked.view(shape), view.top.view(shape)
        scores, rank = view.scores().view(shape), view.ranked()[1].view(shape)
        open_slots = masked.sum(2)
        # A branch without masks has nothing left that could speak for its last token; it wins only if all are full.
        mean = scores.masked_fill(~masked, 0).sum(2) / open_slots.clamp(min=1)
        winner = mean.masked_fill(open_slots == 0, -1).argmax(1)[:, None, None].expand(-1, 1, shape[2])
        view.take_over(winner, self.branches)
        ids, masked, top, scores, rank = (t.gather(1, winner) for t in (ids, masked, top, scores, rank))  # [R, 1, Q]
        least = view.rows(self.threshold)[:: self.branches, None, None]
        sure = ((scores >= least) & masked).sum(2, keepdim=True).clamp(min=1)  # the first `sure` ranks
        branch = torch.arange(self.branches, device=ids.device)[:, None]
        extra = (branch > 0) & (rank == sure + branch - 1)
        return torch.where(((rank < sure) | extra) & masked, top, ids).flatten(0, 1)

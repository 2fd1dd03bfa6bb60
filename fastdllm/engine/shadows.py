# SPDX-License-Identifier: Apache-2.0
"""Shadows: what the model would say of a position if the token there were still masked, in the same forward (WINO, arXiv
2507.18578).

The shadow of slot s is a copy of the positions from the one that predicts s up to s itself, [s - shift, s], with s masked:
one query for a model without shift, two with it (the token before, and the mask that it would see behind itself). The copy
sees itself in the place of what it copies, else what the originals see; nobody else sees it. What others made of the token
at s in deeper layers it does see, so that in a network of one layer its answer is that of a forward with s masked, and close
to it in a deeper one. (The paper's shadows also see one another: so many masks where the text is already known.)

Its keys and values lie behind everything a row may read in this block, and are rewritten by every pass that has shadows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Widened:
    """A pass of W positions with N = Q * (1 + shift) shadow positions behind them, or with none (pos alone).

    pos, slot [R, W + N]: positions, and the slots of their keys and values. swap [R, W + N, 3]: see `kernels.attention`.
    masked [W + N] bool: the shadow positions that hold the mask. The first position of each shadow, W, W + 1 + shift, ...,
    predicts its slot.
    """

    pos: Tensor
    slot: Tensor | None = None
    swap: Tensor | None = None
    masked: Tensor | None = None


def widen(pos: Tensor, block: Tensor, visible_end: Tensor, shift: int, scratch: Tensor) -> Widened:
    """Append the shadows of a block to its pass.

    pos [R, W]: the pass. block [R, Q]: the block's positions. Both hold scratch [R] where they are padded. visible_end [R]:
    the first slot after all that the block's queries may see; the shadows' keys and values lie from there on.
    """
    rows, width, size = *pos.shape, 1 + shift
    member = torch.arange(size, device=pos.device)
    order = torch.arange(width + block.shape[1] * size, device=pos.device)
    own = visible_end[:, None] + order[: len(order) - width : size]  # [R, Q]: the first slot of each shadow
    scratch = scratch[:, None]
    padded = (block == scratch)[..., None]
    copies = block[..., None] - shift + member  # [R, Q, 1 + shift]
    copies = torch.where(padded | (copies < 0), scratch[..., None], copies)
    swap = torch.stack([block - shift, block + 1, own], -1).masked_fill(padded, 0)
    swap = swap[:, :, None].expand(-1, -1, size, -1).flatten(1, 2)
    swap = torch.cat([swap.new_zeros(rows, width, 3), swap], 1)
    wide = torch.cat([pos, copies.flatten(1)], 1)
    slot = torch.cat([pos, (own[..., None] + member).flatten(1)], 1)
    masked = (order >= width) & ((order - width) % size == shift)
    return Widened(wide, torch.where(wide == scratch, scratch, slot), swap, masked)

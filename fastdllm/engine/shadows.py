# SPDX-License-Identifier: Apache-2.0
"""Shadows: what the model would say of a position if its token were still masked, in the same forward (WINO, arXiv
2507.18578).

A shadow is an extra query with the mask in place of the token. It stands at the position of the token that it asks about.
Here three tokens A B C have been committed, and the model has no shift:

    slot                        0  1  2    3  4  5
    token                       A  B  C    ░  ░  ░     slots 3 to 5: the shadows of A, B and C
    its position                0  1  2    0  1  2
    A, B and C see              x  x  x                no shadow is seen by anybody else
    the shadow of B (4) sees    x  .  x       x        itself in the place of B, otherwise what B sees

With a shift of one a token is predicted from the position before it. So its shadow is two queries: a copy of that position,
and the mask that this copy sees after itself.

In deeper layers A and C have seen B, and so their keys still tell of it. In a network of one layer the answer is exactly
that of a forward with B masked; in a deeper one it is close. (The paper's shadows also see one another, which shows each of
them many masks where the text is already known.)

Keys and values of shadows lie after everything that a row may read in its block. Every pass with shadows rewrites them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Widened:
    """A pass of W positions, followed by N = Q * (1 + shift) shadow positions or by none (then only `pos` is set).

    pos, slot: [R, W + N], positions, and the slots of their keys and values.
    swap: [R, W + N, 3], see `kernels.attention`.
    masked: [W + N] bool, the shadow positions that hold the mask. The first position of each shadow (W, W + 1 + shift, ...)
        predicts its token.
    """

    pos: Tensor
    slot: Tensor | None = None
    swap: Tensor | None = None
    masked: Tensor | None = None


def widen(pos: Tensor, block: Tensor, visible_end: Tensor, shift: int, scratch: Tensor) -> Widened:
    """Append the shadows of a block to its pass.

    pos: [R, W], the pass.
    block: [R, Q], the block's positions.
    visible_end: [R], the first slot after all that the block's queries may see; the shadows' keys and values begin there.
    shift: the model's token shift, 0 or 1.
    scratch: [R], the position that `pos` and `block` hold where they are padded.
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

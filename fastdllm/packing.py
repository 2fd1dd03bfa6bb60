# SPDX-License-Identifier: Apache-2.0
"""Packing: rows whose passes differ in width share one forward without padding each other.

Every pass is cut into pieces of a few positions, and the pieces of all rows run as the rows of one forward. Attention reads
the store after every position of the pass has written to it, so that a piece sees the rest of its pass there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastdllm.store import KVStore, Window

PIECE = 8  # positions of a piece: what Fast-dLLM v2 recomputes of a block, and the narrowest captured pass


def pieces(widths: Iterable[int]) -> int:
    """How many pieces passes of these widths make."""
    return sum(-(-width // PIECE) for width in widths)


def forward_packed(
    network: Callable[..., Tensor], ids: Tensor, window: Window, store: KVStore, lengths: Tensor, count: int, scratch: int
) -> Tensor:
    """`network(ids, window, store)` [R, W, C], computed for the first `lengths` [R] positions of each row alone.

    `count` is the number of pieces that run, at least those of the lengths; the others write to the slot `scratch`. What
    the result holds behind a row's length means nothing.
    """
    R, W = ids.shape
    each = (lengths + PIECE - 1).div(PIECE, rounding_mode="floor")
    ends = each.cumsum(0)
    first = ends - each
    piece = torch.arange(count, device=ids.device)
    member = torch.searchsorted(ends, piece, right=True).clamp(max=R - 1)  # the row of a piece
    at = ((piece - first[member]) * PIECE)[:, None] + torch.arange(PIECE, device=ids.device)  # [count, PIECE]
    index = member[:, None], at.clamp(max=W - 1)
    pos = torch.where(at < lengths[member, None], window.pos[index], scratch)
    hide = None if window.hide is None else window.hide[member]
    packed = Window(window.row[member], pos, window.limit[index], window.keys, window.uniform, hide)
    hidden = network(ids[index], packed, store).flatten(0, 1)  # [count * PIECE, C]
    back = (first * PIECE)[:, None] + torch.arange(W, device=ids.device)
    return hidden[back.clamp(max=len(hidden) - 1)]

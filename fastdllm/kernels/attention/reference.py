# SPDX-License-Identifier: Apache-2.0
"""Attention over the KV store through torch's scaled dot product, with a boolean mask where one is needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    row: Tensor,
    limit: Tensor,
    keys: int,
    hide: Tensor | None = None,
    scale: float | None = None,
    uniform: bool = False,
    swap: Tensor | None = None,
) -> Tensor:
    """See `fastdllm.kernels.attention`."""
    k, v = _rows(k_store, row, keys), _rows(v_store, row, keys)
    query = q.transpose(1, 2)
    if uniform:
        out = F.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    mask = _visible(limit, hide, keys, swap)
    out = F.scaled_dot_product_attention(query, k, v, mask.unsqueeze(1), scale=scale, enable_gqa=True)
    # A query that sees nothing has no softmax; its output is defined as zero rather than left to the backend.
    return out.transpose(1, 2).masked_fill(~mask.any(-1)[:, :, None, None], 0)


def _rows(store: Tensor, row: Tensor, keys: int) -> Tensor:
    """The rows' first `keys` slots, [R, K, keys, D]; a view where the store has one row only."""
    slots = store[:, :, :keys]
    return slots if len(row) == len(store) == 1 else slots[row]


def _visible(limit: Tensor, hide: Tensor | None, keys: int, swap: Tensor | None) -> Tensor:
    """[R, W, keys] bool: which slots each query sees."""
    slot = torch.arange(keys, device=limit.device)
    seen = slot < limit.unsqueeze(-1)
    if swap is not None:
        start, stop, instead = swap.split(1, -1)  # [R, W, 1] each
        seen &= (slot < start) | (slot >= stop)
        seen |= (slot >= instead) & (slot < instead + stop - start)
    if hide is not None:
        hidden = (slot >= hide[:, :1]) & (slot < hide[:, 1:])
        seen = seen & ~hidden.unsqueeze(1)
    return seen

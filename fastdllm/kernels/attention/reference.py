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
    kv_len: Tensor,
    max_kv_len: int,
    hide: Tensor | None = None,
    scale: float | None = None,
    dense: bool = False,
    swap: Tensor | None = None,
) -> Tensor:
    """Queries q [R, W, H, D] over the store's rows `row` [R] int64: returns [R, W, H, D]. Writes nothing.

    k_store, v_store: [B, K, T, D], contiguous in D, else of any strides; rows may overlap. Query head h reads kv head
        h // (H / K).
    kv_len: [R, W] int64; query (r, w) sees slots j < kv_len[r, w]; one that sees nothing gives zeros.
    max_kv_len: slots [0, max_kv_len) are looked at and no others; it bounds every kv_len.
    hide: [R, 2] int64; slots [hide[r, 0], hide[r, 1]) are hidden from every query of the row.
    scale: of the scores; 1/sqrt(D) if None.
    dense: promises that every kv_len is max_kv_len and that nothing is hidden.
    swap: [R, W, 3] int64 (start, stop, instead); the query does not see slots [start, stop) but as many from `instead` on in
        their place, whatever its kv_len; start = stop changes nothing. `hide` holds for both.
    """
    query = q.transpose(1, 2)
    if dense:
        k, v = rows_of(k_store, row, max_kv_len), rows_of(v_store, row, max_kv_len)
        out = F.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    mask = visible(kv_len, hide, max_kv_len, swap)
    k, v = (_cleared(store[:, :, :max_kv_len][row], ~mask.any(1)) for store in (k_store, v_store))
    out = F.scaled_dot_product_attention(query, k, v, mask.unsqueeze(1), scale=scale, enable_gqa=True)
    # A query that sees nothing has no softmax; its output is defined as zero rather than left to the backend.
    return out.transpose(1, 2).masked_fill(~mask.any(-1)[:, :, None, None], 0)


def _cleared(slots: Tensor, unseen: Tensor) -> Tensor:
    """`slots` [R, K, T, D], with zeros where no query of the row sees them [R, T]; changed in place.

    They may be another row's, or left over from an earlier one, and NaN there would get through the mask: NaN - inf and
    0 * NaN are NaN.
    """
    return slots.masked_fill_(unseen[:, None, :, None], 0)


def rows_of(store: Tensor, row: Tensor, max_kv_len: int) -> Tensor:
    """The rows' first `max_kv_len` slots, [R, K, max_kv_len, D]; a view where the store has one row only."""
    slots = store[:, :, :max_kv_len]
    return slots if len(row) == len(store) == 1 else slots[row]


def visible(kv_len: Tensor, hide: Tensor | None, max_kv_len: int, swap: Tensor | None = None) -> Tensor:
    """[R, W, max_kv_len] bool: which slots each query sees."""
    slot = torch.arange(max_kv_len, device=kv_len.device)
    seen = slot < kv_len.unsqueeze(-1)
    if swap is not None:
        start, stop, instead = swap.split(1, -1)  # [R, W, 1] each
        seen &= (slot < start) | (slot >= stop)
        seen |= (slot >= instead) & (slot < instead + stop - start)
    if hide is not None:
        hidden = (slot >= hide[:, :1]) & (slot < hide[:, 1:])
        seen = seen & ~hidden.unsqueeze(1)
    return seen

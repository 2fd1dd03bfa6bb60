# SPDX-License-Identifier: Apache-2.0
"""Attention over the KV store through torch's scaled dot product, with a boolean mask where one is needed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm.kernels.linear.reference import Quantized, quantize_tokens


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
    together: Tensor | None = None,
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
    together: [G, S] int64, with W = 1 and no swap: each query r is in one group, those of a group have the same `row` and
        `hide`, and are computed together; R, only at the end of a group, stands for none.
    """
    if together is not None:
        count = len(q)
        # Places that nobody has repeat their group's first query; an empty group computes the last query of all.
        first = together[:, :1].clamp(max=count - 1)
        at, lead = torch.where(together < count, together, first), first[:, 0]
        row, kv_len, hide = row[lead], kv_len[at, 0], None if hide is None else hide[lead]
        grouped = attention(q[at, 0], k_store, v_store, row, kv_len, max_kv_len, hide, scale, dense)
        out = q.new_zeros(count + 1, *q.shape[2:])  # the last one for the places that nobody has
        out[together.flatten()] = grouped.flatten(0, 1)
        return out[:count, None]
    if dense:
        return _seeing(q, rows_of(k_store, row, max_kv_len), rows_of(v_store, row, max_kv_len), None, scale)
    if q.device.type == "cpu":
        return _row_by_row(q, k_store, v_store, row, kv_len, max_kv_len, hide, scale, swap)
    return _masked(q, k_store, v_store, row, kv_len, max_kv_len, hide, scale, swap)


def attention_fp8(
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
    together: Tensor | None = None,
) -> Quantized:
    """`attention` in fp8, for the product that reads it: tokens [R, W, H * D]."""
    return quantize_tokens(
        attention(q, k_store, v_store, row, kv_len, max_kv_len, hide, scale, dense, swap, together).flatten(2)
    )


def _row_by_row(
    q: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    row: Tensor,
    kv_len: Tensor,
    max_kv_len: int,
    hide: Tensor | None,
    scale: float | None,
    swap: Tensor | None,
) -> Tensor:
    """On a CPU, where reading a number costs nothing: a row whose queries see the same slots, as most do, takes these where
    they are, without a copy, a mask, or what only longer rows have."""
    rows = row.tolist()  # sync: a CPU
    shortest, longest = (x.clamp(max=max_kv_len).tolist() for x in torch.aminmax(kv_len, dim=1))  # sync: a CPU
    hidden = [(0, 0)] * len(rows) if hide is None else hide.tolist()  # sync: a CPU
    out = []
    for r, at in enumerate(rows):
        one, slots, (first, stop) = slice(r, r + 1), longest[r], hidden[r]
        if swap is None and slots > 0 and first >= min(stop, slots):  # the query that sees furthest sees every slot
            mask = None if slots == shortest[r] else visible(kv_len[one], None, slots)
            out.append(_seeing(q[one], k_store[at, None, :, :slots], v_store[at, None, :, :slots], mask, scale))
        else:
            hide_one, swap_one = (None if x is None else x[one] for x in (hide, swap))
            slots = max(slots, 1) if swap is None else max_kv_len
            out.append(_masked(q[one], k_store, v_store, row[one], kv_len[one], slots, hide_one, scale, swap_one))
    return torch.cat(out)


def _masked(
    q: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    row: Tensor,
    kv_len: Tensor,
    max_kv_len: int,
    hide: Tensor | None,
    scale: float | None,
    swap: Tensor | None,
) -> Tensor:
    """`attention` with a mask, over a copy of the slots."""
    mask = visible(kv_len, hide, max_kv_len, swap)
    slot = seen_slots(mask)
    return _seeing(q, slots_of(k_store, row, slot), slots_of(v_store, row, slot), mask, scale)


def _seeing(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Queries [R, W, H, D] that see of k, v [R, K, T, D] what the mask [R, W, T] says, all of it without one."""
    seen = None if mask is None else mask.unsqueeze(1)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, seen, scale=scale, enable_gqa=True).transpose(1, 2)
    # A query that sees nothing has no softmax; its output is defined as zero rather than left to the backend.
    return out if mask is None else out.masked_fill(~mask.any(-1)[:, :, None, None], 0)


def rows_of(store: Tensor, row: Tensor, max_kv_len: int) -> Tensor:
    """The rows' first `max_kv_len` slots, [R, K, max_kv_len, D]; a view where the store has one row only."""
    slots = store[:, :, :max_kv_len]
    return slots if len(row) == len(store) == 1 else slots.index_select(0, row)


def seen_slots(mask: Tensor) -> Tensor:
    """mask [R, W, T] -> slots [R, T]: each slot itself, or where no query of the row sees it, the first one that is seen.

    An unseen slot may be another row's, or left over from an earlier one, and NaN there would get through the mask: NaN -
    inf and 0 * NaN are NaN. To copy another slot in its place costs nothing, since the slots are copied anyway.
    """
    seen = mask.any(1)
    first = seen.to(torch.uint8).argmax(1, keepdim=True)
    return torch.where(seen, torch.arange(mask.shape[-1], device=mask.device), first)


def slots_of(store: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    """Slots slot [R, N] of the store's rows `row` [R]: [R, K, N, D].

    One index for row and slot together, because `index_select` copies all numbers of a slot at once.
    """
    rows, heads, length, dim = store.shape
    apart, step = store.stride(0), store.stride(2)
    unit = math.gcd(apart, step) or 1
    places = ((rows - 1) * apart + (length - 1) * step) // unit + 1
    flat = store.as_strided((heads, places, dim), (store.stride(1), unit, store.stride(3)))
    at = row[:, None] * (apart // unit) + slot * (step // unit)
    return flat.index_select(1, at.flatten()).unflatten(1, at.shape).transpose(0, 1)


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

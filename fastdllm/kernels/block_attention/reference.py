# SPDX-License-Identifier: Apache-2.0
"""The attention between a block's positions in plain torch, fp32: softmax over all visible slots, kept for the block's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdllm.kernels.attention.reference import rows_of, visible


def block_attention(
    q: Tensor,
    k_store: Tensor,
    row: Tensor,
    kv_len: Tensor,
    max_kv_len: int,
    query: Tensor,
    slot: Tensor,
    hide: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Weights [R, Q, Q] fp32: the share of its attention that query i of a row gives to slot[j], the mean over heads.

    q: [N, H, D], the queries of a forward, contiguous.
    k_store: [B, K, T, D], contiguous in D, else of any strides. Query head h reads kv head h // (H / K).
    row: [R] int64, rows of the store.
    kv_len: [N] int64; query n sees slots j < kv_len[n]. What it does not see weighs nothing.
    max_kv_len: bounds every kv_len.
    query: [R, Q] int64, which of the N queries each of a block is.
    slot: [R, Q] int64, the slots of the block's keys; one from max_kv_len on weighs nothing.
    hide: [R, 2] int64; slots [hide[r, 0], hide[r, 1]) are hidden from every query of the row.
    scale: of the scores; 1/sqrt(D) if None.
    """
    H, D, K = q.shape[1], q.shape[2], k_store.shape[1]
    scale = D**-0.5 if scale is None else scale
    own, keys = q[query].unflatten(2, (K, H // K)).float(), rows_of(k_store, row, max_kv_len).float()
    scores = torch.einsum("rqkgd,rktd->rkgqt", own, keys) * scale
    seen = visible(kv_len[query], hide, max_kv_len)  # [R, Q, max_kv_len]
    weight = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).mean((1, 2)).masked_fill(~seen, 0)
    at = slot[:, None].expand(-1, slot.shape[1], -1)
    return weight.gather(2, at.clamp(max=max_kv_len - 1)).masked_fill(at >= max_kv_len, 0)

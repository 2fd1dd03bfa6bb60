# SPDX-License-Identifier: Apache-2.0
"""One program for each row, query head and tile of queries: it runs over the keys for the softmax's sum, and then once more
over those of the block. Heads are averaged afterwards, always in the same order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.dot import dot
from fastdllm.kernels.pdl import LAUNCH, wait

LOG2E = 1.4426950408889634


@triton.jit
def _block_attention_kernel(
    q,
    k_store,
    row,
    kv_len,
    query,
    slot,
    hide,
    part,
    Q,
    max_kv_len,
    scale,
    stride_kb,
    stride_kh,
    stride_kt,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_m, i_h, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_m, o_n, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < Q, o_d < D
    wait()
    b_at = tl.load(query + i_r * Q + o_m, mask=m_m, other=0)
    b_len = tl.minimum(tl.load(kv_len + b_at, mask=m_m, other=0).to(tl.int32), max_kv_len)
    reach = tl.max(b_len, 0)
    hide_start, hide_stop = reach, reach
    if HIDE:
        hide_start = tl.load(hide + i_r * 2).to(tl.int32)
        hide_stop = tl.load(hide + i_r * 2 + 1).to(tl.int32)
    b_q = tl.load(q + (b_at * H + i_h)[:, None] * D + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_k = k_store + tl.load(row + i_r) * stride_kb + (i_h // G) * stride_kh + o_d[:, None]

    b_max = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for j in range(0, reach, BLOCK_N):
        o_j = j + o_n
        # Slots that no query sees may hold anything, NaN included: they are not read.
        m_j = (o_j < reach) & ((o_j < hide_start) | (o_j >= hide_stop))
        b_k = tl.load(p_k + o_j.to(tl.int64)[None, :] * stride_kt, mask=m_j[None, :] & m_d[:, None], other=0.0)
        b_s = dot(b_q, b_k, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)) * scale
        b_s = tl.where(m_j[None, :] & (o_j[None, :] < b_len[:, None]), b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # A query that has seen nothing yet has no maximum; any finite reference keeps its weights at zero.
        b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_ref) + tl.sum(tl.exp2(b_s - b_ref[:, None]), 1)
        b_max = b_new
    b_ref = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)

    for j in range(0, Q, BLOCK_N):
        o_j = j + o_n
        b_slot = tl.load(slot + i_r * Q + o_j, mask=o_j < Q, other=0)  # Triton 3.2 compiles no other value here
        m_j = (o_j < Q) & (b_slot < reach) & ((b_slot < hide_start) | (b_slot >= hide_stop))
        b_k = tl.load(p_k + b_slot[None, :] * stride_kt, mask=m_j[None, :] & m_d[:, None], other=0.0)
        b_s = dot(b_q, b_k, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)) * scale
        m_s = m_j[None, :] & (b_slot[None, :] < b_len[:, None])
        b_p = tl.where(m_s, tl.exp2(tl.where(m_s, b_s, 0.0) - b_ref[:, None]), 0.0) / b_sum[:, None]
        p_part = part + ((i_r * H + i_h) * Q + o_m)[:, None] * Q + o_j[None, :]
        tl.store(p_part, b_p, mask=m_m[:, None] & (o_j < Q)[None, :])


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
    """See `fastdllm.kernels.block_attention.reference.block_attention`."""
    (R, Q), (_, H, D), K = query.shape, q.shape, k_store.shape[1]
    part = torch.empty((R, H, Q, Q), dtype=torch.float32, device=q.device)
    block_m = min(32, max(16, triton.next_power_of_2(Q)))
    _block_attention_kernel[(triton.cdiv(Q, block_m), H, R)](
        q.contiguous(),
        k_store,
        row.contiguous(),
        kv_len.contiguous(),
        query.contiguous(),
        slot.contiguous(),
        row if hide is None else hide.contiguous(),
        part,
        Q,
        max_kv_len,
        (D**-0.5 if scale is None else scale) * LOG2E,
        *k_store.stride()[:3],
        H=H,
        G=H // K,
        D=D,
        HIDE=hide is not None,
        BLOCK_M=block_m,
        BLOCK_N=64,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        num_warps=4,
        **LAUNCH,
    )
    return part.mean(1)

# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding and KV write in one pass: a program rotates some heads of one position and puts each where
it belongs. After a product over few positions it adds up the product's partial sums first.

A head is seen as pairs of channels, in two tiles. The pairs that turn come first; those of the channels that stay have an
angle of 0. Queries go to a fresh tensor, keys and values straight into their slots, so that nothing but the slots of this
pass is touched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.linear.reference import Activations
from fastdllm.kernels.linear.triton import split_k_partials
from fastdllm.kernels.pdl import LAUNCH, wait

# Heads of one position per program: 32 positions of LLaDA's 96 heads make 384 programs, about three a multiprocessor.
BLOCK_H = 8


@triton.jit
def _normalise(x_low, x_high, b_rms, m_h, w_low, w_high):
    """The heads m_h times b_rms and the norm's weights, rounded like its output in memory; the others as they are."""
    dtype = w_low.dtype
    n_low = ((x_low * b_rms[:, None]).to(dtype).to(tl.float32) * w_low.to(tl.float32)[None, :]).to(dtype).to(tl.float32)
    n_high = ((x_high * b_rms[:, None]).to(dtype).to(tl.float32) * w_high.to(tl.float32)[None, :]).to(dtype).to(tl.float32)
    return tl.where(m_h[:, None], n_low, x_low), tl.where(m_h[:, None], n_high, x_high)


@triton.jit
def _rope_store_kernel(
    qkv,
    cos,
    sin,
    pos,
    slot,
    row,
    q,
    k_store,
    v_store,
    q_norm,
    k_norm,
    eps,
    rows,
    W,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    PARTS: tl.constexpr,
    SLOT: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_d, m_t = o_d < D // 2, o_d < TURNED // 2
    o_low, o_high = o_d, o_d + D // 2
    if TURNED < D:  # the pairs are (i, i + TURNED / 2), then from channel TURNED on (i, i + (D - TURNED) / 2)
        o_low, o_high = tl.where(m_t, o_low, o_d + TURNED // 2), tl.where(m_t, o_d + TURNED // 2, o_high)
    m_hd = (o_h < H + 2 * K)[:, None] & m_d[None, :]

    if Q_NORM:
        q_low, q_high = tl.load(q_norm + o_low, mask=m_d, other=0.0), tl.load(q_norm + o_high, mask=m_d, other=0.0)
    if K_NORM:
        k_low, k_high = tl.load(k_norm + o_low, mask=m_d, other=0.0), tl.load(k_norm + o_high, mask=m_d, other=0.0)
    wait()
    p_x = qkv + (i_n * (H + 2 * K) + o_h[:, None]) * D
    b_low = tl.load(p_x + o_low[None, :], mask=m_hd, other=0.0)
    b_high = tl.load(p_x + o_high[None, :], mask=m_hd, other=0.0)
    for part in tl.static_range(1, PARTS):
        p_part = qkv + ((i_n + part * rows) * (H + 2 * K) + o_h[:, None]) * D
        b_low += tl.load(p_part + o_low[None, :], mask=m_hd, other=0.0)
        b_high += tl.load(p_part + o_high[None, :], mask=m_hd, other=0.0)
    b_pos = tl.load(pos + i_n)
    b_slot = tl.load(slot + i_n) if SLOT else b_pos
    b_row = tl.load(row + i_n // W)
    p_cos, p_sin = cos + b_pos * TURNED + o_d, sin + b_pos * TURNED + o_d
    b_cl, b_ch = tl.load(p_cos, mask=m_t, other=1.0), tl.load(p_cos + TURNED // 2, mask=m_t, other=1.0)
    b_sl, b_sh = tl.load(p_sin, mask=m_t, other=0.0), tl.load(p_sin + TURNED // 2, mask=m_t, other=0.0)
    x_low, x_high = b_low.to(tl.float32), b_high.to(tl.float32)
    if Q_NORM or K_NORM:
        b_rms = tl.rsqrt((tl.sum(x_low * x_low, 1) + tl.sum(x_high * x_high, 1)) / D + eps)
        if Q_NORM:
            x_low, x_high = _normalise(x_low, x_high, b_rms, o_h < H, q_low, q_high)
        if K_NORM:
            x_low, x_high = _normalise(x_low, x_high, b_rms, (o_h >= H) & (o_h < H + K), k_low, k_high)
    r_low = x_low * b_cl[None, :] - x_high * b_sl[None, :]
    r_high = x_high * b_ch[None, :] + x_low * b_sh[None, :]

    m_q = m_hd & (o_h < H)[:, None]
    p_q = q + (i_n * H + o_h[:, None]) * D
    tl.store(p_q + o_low[None, :], r_low, mask=m_q)
    tl.store(p_q + o_high[None, :], r_high, mask=m_q)

    m_k = m_hd & ((o_h >= H) & (o_h < H + K))[:, None]
    o_k = (o_h - H).to(tl.int64)
    p_k = k_store + b_row * stride_kb + b_slot * stride_kt + o_k[:, None] * stride_kh
    tl.store(p_k + o_low[None, :], r_low, mask=m_k)
    tl.store(p_k + o_high[None, :], r_high, mask=m_k)

    m_v = m_hd & (o_h >= H + K)[:, None]
    o_v = (o_h - H - K).to(tl.int64)
    p_v = v_store + b_row * stride_vb + b_slot * stride_vt + o_v[:, None] * stride_vh
    tl.store(p_v + o_low[None, :], b_low, mask=m_v)
    tl.store(p_v + o_high[None, :], b_high, mask=m_v)


def rope_store(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    pos: Tensor,
    row: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    slot: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """See `fastdllm.kernels.rope_store.reference.rope_store`."""
    return _launch(qkv[None], heads, kv_heads, cos, sin, pos, row, k_store, v_store, slot, q_norm, k_norm, eps)


def linear_rope_store(
    x: Activations,
    weight: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    pos: Tensor,
    row: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    slot: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """See `fastdllm.kernels.rope_store.reference.linear_rope_store`."""
    parts = split_k_partials(x, weight, scale, bias)
    return _launch(parts, heads, kv_heads, cos, sin, pos, row, k_store, v_store, slot, q_norm, k_norm, eps)


def _launch(
    parts: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    pos: Tensor,
    row: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    slot: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """`rope_store` of the sum of parts [S, ..., (H + 2K) D]."""
    R, W = pos.shape
    D = k_store.shape[-1]
    q = torch.empty((R, W, heads, D), dtype=k_store.dtype, device=parts.device)
    grid = (R * W, triton.cdiv(heads + 2 * kv_heads, BLOCK_H))
    _rope_store_kernel[grid](
        parts.contiguous(),
        cos,
        sin,
        pos.contiguous(),
        pos if slot is None else slot.contiguous(),
        row.contiguous(),
        q,
        k_store,
        v_store,
        q if q_norm is None else q_norm,
        q if k_norm is None else k_norm,
        eps,
        R * W,
        W,
        *k_store.stride()[:3],
        *v_store.stride()[:3],
        H=heads,
        K=kv_heads,
        D=D,
        TURNED=cos.shape[1],
        PARTS=len(parts),
        SLOT=slot is not None,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        BLOCK_H=BLOCK_H,
        BLOCK_D=triton.next_power_of_2(D // 2),
        num_warps=4,
        **LAUNCH,
    )
    return q

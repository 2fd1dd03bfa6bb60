# SPDX-License-Identifier: Apache-2.0
"""Layers that run for some positions only, in three launches of one program a position.

A program of `pick` counts the rows' pieces and ranks its row's scores anew, a few comparisons, and so knows its position
without another launch; one of `merge` looks up whether its position ran. Both normalise what they move.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.partial.reference import Picked
from fastdllm.kernels.pdl import LAUNCH, wait


@triton.jit
def _drift_kernel(
    x,
    kept,
    row,
    at,
    bonus,
    score,
    still,
    W,
    stride_b,
    stride_k,
    stride_t,
    C: tl.constexpr,
    D: tl.constexpr,
    BONUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    wait()
    b_row, b_at = tl.load(row + i_n // W), tl.load(at + i_n)
    b_x = tl.load(x + i_n * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    p_kept = kept + b_row * stride_b + b_at * stride_t + (o_c // D).to(tl.int64) * stride_k + o_c % D
    b_kept = tl.load(p_kept, mask=m_c, other=0.0).to(tl.float32)
    size = tl.maximum(tl.sqrt_rn(tl.sum(b_x * b_x, 0)), 1e-8) * tl.maximum(tl.sqrt_rn(tl.sum(b_kept * b_kept, 0)), 1e-8)
    b_drift = 1.0 - tl.sum(b_x * b_kept, 0) / size
    b_drift = tl.where(b_drift < still, 0.0, b_drift)
    if BONUS:
        b_drift += tl.load(bonus + i_n)
    tl.store(score + i_n, b_drift)


def drift(x: Tensor, kept: Tensor, row: Tensor, at: Tensor, bonus: Tensor | None = None, still: float = 0.0) -> Tensor:
    """See `fastdllm.kernels.partial.reference.drift`."""
    R, W, C = x.shape
    score = torch.empty((R, W), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(C)
    _drift_kernel[(R * W,)](
        x.contiguous(),
        kept,
        row.contiguous(),
        at.contiguous(),
        score if bonus is None else bonus.contiguous(),
        score,
        still,
        W,
        *kept.stride()[:3],
        C=C,
        D=kept.shape[-1],
        BONUS=bonus is not None,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
        **LAUNCH,
    )
    return score


@triton.jit
def _normalised(b_x, norm, o_c, C, eps, dtype: tl.constexpr):
    """b_x [BLOCK] fp32 over its root mean square, rounded to `dtype` before the product with the weight."""
    b_y = (b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / C + eps)).to(dtype).to(tl.float32)
    return b_y * tl.load(norm + o_c, mask=o_c < C, other=0.0).to(tl.float32)


@triton.jit
def _score(score, p, m):
    """Scores at p; NaN like what is not there, below all others."""
    b_s = tl.load(score + p, mask=m, other=-float("inf"))
    return tl.where(b_s != b_s, -float("inf"), b_s)


@triton.jit
def _pick_kernel(
    h,
    score,
    quota,
    pos,
    kv_len,
    scratch,
    norm,
    row,
    at,
    entry,
    ids,
    seen,
    out,
    y,
    out_row,
    out_pos,
    out_len,
    source,
    n,
    R,
    W,
    eps,
    stride_es,
    stride_ed,
    stride_ss,
    C: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_r, o_w, o_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK)
    m_c = o_c < C
    wait()
    b_each = tl.cdiv(tl.load(quota + o_r, mask=o_r < R, other=0), n)
    i_r = tl.minimum(tl.sum((tl.cumsum(b_each, 0) <= i_n // n).to(tl.int64), 0), R - 1)
    target = i_n - tl.sum(tl.where(o_r < i_r, b_each, 0), 0) * n
    mine = target < tl.load(quota + i_r)
    target = tl.minimum(target, W - 1)

    b_s = _score(score, i_r * W + o_w, o_w < W)
    b_rank = tl.zeros((BLOCK_W,), dtype=tl.int32)
    for j in range(0, W, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        b_sj = _score(score, i_r * W + o_j, o_j < W)
        tie = (b_sj[None, :] == b_s[:, None]) & (o_j[None, :] < o_w[:, None])
        before = (b_sj[None, :] > b_s[:, None]) | tie
        b_rank += tl.sum((before & (o_j < W)[None, :]).to(tl.int32), 1)
    i_w = i_r * W + tl.sum(tl.where((b_rank == target) & (o_w < W), o_w, 0), 0)

    b_h = tl.load(h + i_w * C + o_c, mask=m_c, other=0.0)
    tl.store(out + i_n * C + o_c, b_h, mask=m_c)
    tl.store(y + i_n * C + o_c, _normalised(b_h.to(tl.float32), norm, o_c, C, eps, y.dtype.element_ty), mask=m_c)
    tl.store(out_row + i_n // n, i_r, mask=i_n % n == 0)
    tl.store(out_pos + i_n, tl.where(mine, tl.load(pos + i_w), tl.load(scratch + i_r)))
    tl.store(out_len + i_n, tl.load(kv_len + i_w))
    tl.store(source + i_w, i_n.to(tl.int32), mask=mine)
    if KEEP:
        b_row, b_at = tl.load(row + i_r), tl.load(at + i_w)
        tl.store(entry + b_row * stride_es + b_at * stride_ed + o_c, b_h, mask=m_c & mine)
        tl.store(seen + b_row * stride_ss + b_at, tl.load(ids + i_w), mask=mine)


def pick(
    h: Tensor,
    score: Tensor,
    quota: Tensor,
    pieces: int,
    n: int,
    pos: Tensor,
    kv_len: Tensor,
    scratch: Tensor,
    norm: Tensor,
    eps: float,
    row: Tensor | None = None,
    at: Tensor | None = None,
    entry: Tensor | None = None,
    ids: Tensor | None = None,
    seen: Tensor | None = None,
) -> Picked:
    """See `fastdllm.kernels.partial.reference.pick`."""
    R, W, C = h.shape
    keep, block = entry is not None, triton.next_power_of_2(C)
    out, y = (torch.empty((pieces, n, C), dtype=h.dtype, device=h.device) for _ in range(2))
    out_pos, out_len = (torch.empty((pieces, n), dtype=torch.int64, device=h.device) for _ in range(2))
    out_row = torch.empty((pieces,), dtype=torch.int64, device=h.device)
    source = torch.full((R, W), -1, dtype=torch.int32, device=h.device)
    if pieces * n == 0:
        return Picked(out, y, out_row, out_pos, out_len, source)
    _pick_kernel[(pieces * n,)](
        h.contiguous(),
        score.contiguous(),
        quota.contiguous(),
        pos.contiguous(),
        kv_len.contiguous(),
        scratch.contiguous(),
        norm,
        row.contiguous() if keep else quota,
        at.contiguous() if keep else pos,
        entry if keep else out,
        ids.contiguous() if keep else pos,
        seen if keep else out_pos,
        out,
        y,
        out_row,
        out_pos,
        out_len,
        source,
        n,
        R,
        W,
        eps,
        *(entry.stride()[:2] if keep else (0, 0)),
        seen.stride(0) if keep else 0,
        C=C,
        KEEP=keep,
        BLOCK_R=triton.next_power_of_2(R),
        BLOCK_W=triton.next_power_of_2(W),
        BLOCK_J=32,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
        **LAUNCH,
    )
    return Picked(out, y, out_row, out_pos, out_len, source)


@triton.jit
def _merge_kernel(
    h,
    fresh,
    source,
    cached,
    row,
    at,
    norm,
    out,
    y,
    W,
    eps,
    stride_s,
    stride_d,
    C: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    wait()
    i_fresh = tl.load(source + i_n).to(tl.int64)
    ran = i_fresh >= 0
    p_cached = cached + tl.load(row + i_n // W) * stride_s + tl.load(at + i_n) * stride_d + o_c
    b_h = tl.load(h + i_n * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_fresh = tl.load(fresh + i_fresh * C + o_c, mask=m_c & ran, other=0.0).to(tl.float32)
    b_kept = tl.load(p_cached, mask=m_c & (i_fresh < 0), other=0.0).to(tl.float32)
    if OUTPUT:
        b_out = tl.where(ran, b_fresh, b_kept)
        tl.store(p_cached, b_fresh, mask=m_c & ran)
    else:
        b_out = tl.where(ran, b_fresh, b_h + b_kept)
        tl.store(p_cached, b_fresh - b_h, mask=m_c & ran)
    # Rounded before its statistics are taken, as the norm of a state in memory.
    b_out = b_out.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + i_n * C + o_c, b_out, mask=m_c)
    tl.store(y + i_n * C + o_c, _normalised(b_out, norm, o_c, C, eps, y.dtype.element_ty), mask=m_c)


def merge(
    h: Tensor,
    fresh: Tensor,
    source: Tensor,
    cached: Tensor,
    row: Tensor,
    at: Tensor,
    norm: Tensor,
    eps: float,
    output: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `fastdllm.kernels.partial.reference.merge`."""
    h = h.contiguous()
    R, W, C = h.shape
    y, out, block = torch.empty_like(h), torch.empty_like(h), triton.next_power_of_2(C)
    _merge_kernel[(R * W,)](
        h,
        fresh.contiguous(),
        source.contiguous(),
        cached,
        row.contiguous(),
        at.contiguous(),
        norm,
        out,
        y,
        W,
        eps,
        *cached.stride()[:2],
        C=C,
        OUTPUT=output,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
        **LAUNCH,
    )
    return y, out

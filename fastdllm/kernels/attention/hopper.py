# SPDX-License-Identifier: Apache-2.0
"""Attention of few queries over long keys on Hopper, in Gluon.

The keys of a tile are the left operand of the matrix unit, which takes 64 rows at a time: queries on the left, 16 or 32 of
them, would be filled up to 64. The bulk copy engine fetches the tiles. The splits of the keys leave their results in memory,
and a second kernel joins them. It can hold all heads of a position, and then quantises them for a product in fp8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.device import multiprocessors
from fastdllm.kernels.gluon import GLUON, copyable, described, jit, usable
from fastdllm.kernels.linear.reference import FP8, FP8_MAX, Quantized
from fastdllm.kernels.linear.triton import scale_of
from fastdllm.kernels.pdl import LAUNCH
from fastdllm.kernels.pdl import wait as wait_in_triton

if GLUON:
    from fastdllm.kernels.gluon import fence_async_shared, gl, mbarrier, num_warps, tma, wait, warpgroup_mma

LOG2E = 1.4426950408889634
JOINED_HEADS = 8  # heads of a position that a program joins where it need not hold all
BLOCK_N = 64  # keys of a tile: the rows that the matrix unit takes at a time


@jit
def _fetch(k, v, k_s, v_s, bars, slot, i_row, i_k, j, pred, BYTES: gl.constexpr):
    """Start to copy the tiles of keys and values from slot j on."""
    mbarrier.expect(bars.index(slot), 2 * BYTES, pred)
    tma.async_copy_global_to_shared(k, [i_row, i_k, j, 0], bars.index(slot), k_s.index(slot), pred)
    tma.async_copy_global_to_shared(v, [i_row, i_k, j, 0], bars.index(slot), v_s.index(slot), pred)


@jit
def _attend_kernel(
    q,
    k,
    v,
    row,
    kv_len,
    hide,
    part,
    lse,
    W,
    max_kv_len,
    scale,
    H: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    HIDE: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    # Queries and channels are columns here: [keys, queries], then [channels, queries].
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps(), 1], [16, BLOCK_M, 16])
    row_l: gl.constexpr = gl.SliceLayout(0, acc_l)
    load_l: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps(), 1], [1, 0])
    BYTES: gl.constexpr = BLOCK_N * D * 2
    i_m, i_s = gl.program_id(0) // SPLITS, gl.program_id(0) % SPLITS
    i_k, i_r = gl.program_id(1), gl.program_id(2)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, D], k.layout)
    v_s = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, D], v.layout)
    q_s = gl.allocate_shared_memory(k.dtype, [BLOCK_M, D], gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], k.dtype))
    p_l: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], k.dtype)
    p_s = gl.allocate_shared_memory(k.dtype, [BLOCK_N, BLOCK_M], p_l)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    # Column m of a tile is query head m % G of position m // G.
    o_m = i_m * BLOCK_M + gl.arange(0, BLOCK_M, row_l)
    m_m = o_m < W * G
    o_q = i_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, load_l))
    i_q = (i_r * W + o_q // G) * H + i_k * G + o_q % G
    p_q = q + i_q[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, load_l))[None, :]

    wait()
    b_q = gl.load(p_q, mask=(o_q < W * G)[:, None], other=0.0)  # first: behind keys and values it would wait for them
    i_row = gl.load(row + i_r).to(gl.int32)
    b_len = gl.minimum(gl.load(kv_len + i_r * W + o_m // G, mask=m_m, other=0).to(gl.int32), max_kv_len)
    reach = gl.max(b_len, 0)
    hide_start, hide_stop = 0, 0
    if HIDE:
        hide_start = gl.load(hide + i_r * 2).to(gl.int32)
        hide_stop = gl.load(hide + i_r * 2 + 1).to(gl.int32)
    chunk = gl.cdiv(gl.cdiv(reach, SPLITS), 16) * 16
    start = i_s * chunk
    stop = gl.minimum(start + chunk, reach)
    tiles = gl.cdiv(gl.maximum(stop - start, 0), BLOCK_N)
    for s in gl.static_range(STAGES):
        _fetch(k, v, k_s, v_s, bars, s, i_row, i_k, start + s * BLOCK_N, s < tiles, BYTES)
    q_s.store(b_q)
    fence_async_shared()

    b_acc = gl.zeros((D, BLOCK_M), gl.float32, acc_l)
    b_sums = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, acc_l)  # added up over the keys once, at the end
    b_max = gl.full((BLOCK_M,), -float("inf"), gl.float32, row_l)
    for i in range(tiles):
        slot, j = i % STAGES, start + i * BLOCK_N
        mbarrier.wait(bars.index(slot), (i // STAGES) & 1)
        none = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, acc_l)
        b_s = warpgroup_mma(k_s.index(slot).reshape((BLOCK_N, D)), q_s.permute((1, 0)), none, use_acc=False)
        o_j = j + gl.arange(0, BLOCK_N, gl.SliceLayout(1, acc_l))
        m_j = o_j < stop
        if HIDE:
            m_j = m_j & ((o_j < hide_start) | (o_j >= hide_stop))
        b_s = gl.where(m_j[:, None] & (o_j[:, None] < b_len[None, :]), b_s * scale, -float("inf"))
        b_new = gl.maximum(b_max, gl.max(b_s, 0))
        # A query that has seen nothing yet has no maximum; any finite reference keeps its weights at zero.
        b_ref = gl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = gl.exp2(b_s - b_ref[None, :])
        b_keep = gl.exp2(b_max - b_ref)
        b_sums = b_sums * b_keep[None, :] + b_p
        b_max = b_new
        p_s.store(b_p.to(k.dtype))
        b_v = v_s.index(slot).reshape((BLOCK_N, D))
        unseen = j + BLOCK_N > reach
        if HIDE:
            unseen = unseen | ((j < hide_stop) & (j + BLOCK_N > hide_start) & (hide_start < hide_stop))
        if unseen:  # such a slot may hold anything, and a weight of zero does not hide NaN
            o_v = j + gl.arange(0, BLOCK_N, gl.SliceLayout(1, load_l))
            m_v = o_v < reach
            if HIDE:
                m_v = m_v & ((o_v < hide_start) | (o_v >= hide_stop))
            b_v.store(gl.where(m_v[:, None], b_v.load(load_l), 0.0))
        fence_async_shared()
        b_acc = warpgroup_mma(b_v.permute((1, 0)), p_s, b_acc * b_keep[None, :])
        _fetch(k, v, k_s, v_s, bars, slot, i_row, i_k, start + (i + STAGES) * BLOCK_N, i + STAGES < tiles, BYTES)
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(s))
    b_sum = gl.sum(b_sums, 0)
    b_one = gl.where(b_sum == 0.0, 1.0, b_sum)
    i_part = ((i_r * W + o_m // G) * H + i_k * G + o_m % G) * SPLITS + i_s
    o_d = gl.arange(0, D, gl.SliceLayout(1, acc_l))
    gl.store(part + i_part[None, :] * D + o_d[:, None], b_acc / b_one[None, :], mask=m_m[None, :])
    # log2(0) is not defined everywhere; an empty split weighs nothing.
    gl.store(lse + i_part, gl.where(b_sum == 0.0, -float("inf"), b_max + gl.log2(b_one)), mask=m_m)


@triton.jit
def _join_kernel(
    part,
    lse,
    out,
    of_token,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_h, o_d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, D)
    m_h = o_h < H
    i_part = (i_n * H + o_h) * SPLITS
    wait_in_triton()
    b_max = tl.full((BLOCK_H,), -float("inf"), dtype=tl.float32)
    for i_s in tl.static_range(SPLITS):
        b_max = tl.maximum(b_max, tl.load(lse + i_part + i_s, mask=m_h, other=-float("inf")))
    b_max = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_o = tl.zeros((BLOCK_H, D), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for i_s in tl.static_range(SPLITS):
        b_part = tl.load(part + (i_part + i_s)[:, None] * D + o_d[None, :], mask=m_h[:, None], other=0.0)
        b_w = tl.exp2(tl.load(lse + i_part + i_s, mask=m_h, other=-float("inf")) - b_max)
        b_o += b_w[:, None] * b_part
        b_sum += b_w
    b_o /= tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    if LARGEST is not None:
        b_o = b_o.to(ROUNDED).to(tl.float32)  # as another kernel would read it
        b_scale, b_inverse = scale_of(tl.max(tl.max(tl.abs(b_o), 1), 0), LARGEST)
        b_o = tl.clamp(b_o * b_inverse, -LARGEST, LARGEST)
        tl.store(of_token + i_n, b_scale)
    p_o = out + (i_n * H + o_h[:, None]) * D + o_d[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_h[:, None])


def tile_for(q: Tensor, k_store: Tensor, v_store: Tensor, max_kv_len: int) -> dict[str, int] | None:
    """The tile of these kernels, or None where others compute this attention: they are for few queries in 16 bits on Hopper,
    with heads of 64 or 128 channels."""
    if readable(q, k_store, v_store) and q.shape[-1] in (64, 128):
        return tiling(q.shape, k_store.shape[1], max_kv_len, q.device)
    return None


def readable(q: Tensor, k_store: Tensor, v_store: Tensor) -> bool:
    """Whether kernels in Gluon run here, and the bulk copy engine reads keys and values where they lie, in 16 bits."""
    return (
        usable(q.device)
        and q.dtype.itemsize == 2
        and q.dtype == k_store.dtype == v_store.dtype
        and copyable(k_store)
        and copyable(v_store)
    )


def base_2(scale: float | None, channels: int) -> float:
    """The scale of scores, by default that of heads of so many channels, for exponentials to the base 2."""
    return (channels**-0.5 if scale is None else scale) * LOG2E


def tiling(shape: torch.Size, kv_heads: int, max_kv_len: int, device: torch.device) -> dict[str, int] | None:
    """Tile of queries of this shape [R, W, H, D] and number of key splits, or None where keys are not split: where queries
    fill the device, or a few dozen keys are all.

    Timed on an H200 (torch 2.11, triton 3.6, 2026-11-30) in forwards, ms, as (block_m, splits, stages). LLaDA in fp8 at 16
    rows (16, 4, 3) 2.65, (16, 8, 2) 2.71; at 32 (16, 4, 2) 2.72, (16, 4, 3) 2.73, (32, 4, 3) 2.74; at 64 (16, 2, 3) 3.13,
    (32, 4, 2) 3.16. v2 in fp8 at 8 rows (16, 4, 1) 2.20, (16, 8, 1) 2.22, (32, 4, 1) 2.24; at 32, and at 4 x 8 alike,
    (16, 4, 1) 2.49, (16, 2, 1) 2.52, (32, 4, 1) 2.53, (64, 4, 1) 2.70. bf16 prefers the same.
    """
    R, W, H, _ = shape
    block_m = 16
    programs, room = R * kv_heads * triton.cdiv(W * H // kv_heads, block_m), multiprocessors(device)
    most = min(4, 2 * room // programs, triton.cdiv(max_kv_len, BLOCK_N // 2))
    if most < 2:
        return None
    splits = 2 if most < 4 else 8 if 8 * programs <= room and max_kv_len >= 8 * 2 * BLOCK_N else 4
    return {
        "block_m": block_m,
        "splits": splits,
        "num_stages": min(3, triton.cdiv(triton.cdiv(max_kv_len, splits), BLOCK_N)),
    }


def attention(
    q: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    row: Tensor,
    kv_len: Tensor,
    max_kv_len: int,
    hide: Tensor | None,
    scale: float | None,
    *,
    block_m: int,
    splits: int,
    num_stages: int,
) -> tuple[Tensor, Tensor]:
    """What each split of the keys gives for `attention.reference.attention`, fp32 [R * W, H, splits, D], and
    the logarithm (base 2) of its weight, fp32 [R * W, H, splits]."""
    R, W, H, D = q.shape
    K = k_store.shape[1]
    part = torch.empty((R * W, H, splits, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((R * W, H, splits), dtype=torch.float32, device=q.device)
    tile = (1, 1, BLOCK_N, D)
    _attend_kernel[(triton.cdiv(W * H // K, block_m) * splits, K, R)](
        q.contiguous(),
        described(k_store, tile),
        described(v_store, tile),
        row.contiguous(),
        kv_len.contiguous(),
        kv_len if hide is None else hide.contiguous(),
        part,
        lse,
        W,
        max_kv_len,
        base_2(scale, D),
        H=H,
        G=H // K,
        D=D,
        HIDE=hide is not None,
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        STAGES=num_stages,
        num_warps=4,
        **LAUNCH,
    )
    return part, lse


def join(part: Tensor, lse: Tensor, out: Tensor) -> Tensor:
    """The splits' results [M, H, S, D] weighed by lse [M, H, S], in out [M, H, D]."""
    H = part.shape[1]
    _launch_join(part, lse, out, None, out.dtype, min(JOINED_HEADS, triton.next_power_of_2(H)))
    return out


def join_fp8(part: Tensor, lse: Tensor, dtype: torch.dtype) -> Quantized:
    """`join` in fp8, as tokens [M, H * D] with one scale each. dtype: of what they stand for."""
    M, H, _, D = part.shape
    values = torch.empty((M, H * D), dtype=FP8, device=part.device)
    of_token = torch.empty((M,), dtype=torch.float32, device=part.device)
    _launch_join(part, lse, values, of_token, dtype, triton.next_power_of_2(H))
    return Quantized(values, of_token, dtype)


def join_warps(heads: int, splits: int, channels: int) -> int:
    """Warps of a program that joins so many heads: 32 numbers a thread."""
    return max(4, min(32, heads * splits * channels // 1024))


def _launch_join(part: Tensor, lse: Tensor, out: Tensor, of_token: Tensor | None, dtype: torch.dtype, heads: int) -> None:
    M, H, S, D = part.shape
    _join_kernel[(M, triton.cdiv(H, heads))](
        part,
        lse,
        out,
        lse if of_token is None else of_token,
        H=H,
        D=D,
        SPLITS=S,
        LARGEST=None if of_token is None else FP8_MAX,
        ROUNDED=tl.bfloat16 if dtype == torch.bfloat16 else tl.float16,
        BLOCK_H=heads,
        num_warps=join_warps(heads, S, D),
        **LAUNCH,
    )

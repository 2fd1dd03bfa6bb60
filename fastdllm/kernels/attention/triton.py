# SPDX-License-Identifier: Apache-2.0
"""Flash attention over the KV store, split over keys where the queries do not fill the device.

The query heads of one kv head are packed into the rows of a tile, so that the tile reads its keys once. Each split writes a
normalised partial output and its log-sum-exp, and the tile's last split to finish joins them, always in the same order.
`hopper.py` is for few queries on Hopper, `hopper_wide.py` for many. Lengths are read on the device, so that one captured
launch serves every length up to `max_kv_len`. Method: FlashAttention-2 (arXiv 2307.08691), split over keys as in
Flash-Decoding.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.attention import hopper, hopper_wide
from fastdllm.kernels.device import multiprocessors, reads_shared, stages
from fastdllm.kernels.dot import dot
from fastdllm.kernels.linear.reference import Quantized
from fastdllm.kernels.linear.triton import quantize_rows
from fastdllm.kernels.pdl import LAUNCH, wait

FEW_TILES = 8
SHORT = 256  # keys up to which tiles of 32 of them are faster
SHORT_SPLIT = 64  # keys for which one more split pays
LONG_SPLIT = 1024  # the same where tiles fill a quarter of the device


@triton.jit
def _attend_step(
    b_acc,
    b_sum,
    b_max,
    b_q,
    p_k,
    p_v,
    j,
    stop,
    b_len,
    hide_start,
    hide_stop,
    b_start,
    b_stop,
    b_instead,
    scale,
    stride_kt,
    stride_vt,
    MASKED: tl.constexpr,
    HIDE: tl.constexpr,
    SWAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of keys [j, j + BLOCK_N): the online softmax update of (acc, sum, max)."""
    o_j = j + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    # The tile's own offset has 64 bits: positions may lie far apart.
    p_kj = p_k + tl.cast(j, tl.int64) * stride_kt + o_n[None, :] * stride_kt + o_d[:, None]
    p_vj = p_v + tl.cast(j, tl.int64) * stride_vt + o_n[:, None] * stride_vt + o_d[None, :]
    if MASKED:
        m_j = o_j < stop
        if HIDE:
            m_j &= (o_j < hide_start) | (o_j >= hide_stop)
        # Slots that no query of the tile sees may hold anything, NaN included: they are not read.
        b_k = tl.load(p_kj, mask=m_j[None, :] & (o_d < D)[:, None], other=0.0)
        b_v = tl.load(p_vj, mask=m_j[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        b_k, b_v = tl.load(p_kj), tl.load(p_vj)
    else:
        b_k = tl.load(p_kj, mask=(o_d < D)[:, None], other=0.0)
        b_v = tl.load(p_vj, mask=(o_d < D)[None, :], other=0.0)
    b_s = dot(b_q, b_k, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)) * scale
    if MASKED:
        m_s = o_j[None, :] < b_len[:, None]
        if SWAP:
            m_s &= (o_j[None, :] < b_start[:, None]) | (o_j[None, :] >= b_stop[:, None])
            b_at = o_j[None, :] - b_instead[:, None]
            m_s |= (b_at >= 0) & (b_at < (b_stop - b_start)[:, None])
        b_s = tl.where(m_j[None, :] & m_s, b_s, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # A query that has seen nothing yet has no maximum; any finite reference keeps its weights at zero.
    b_ref = tl.where(b_new == -float("inf"), 0.0, b_new) if MASKED else b_new
    b_p = tl.exp2(b_s - b_ref[:, None])
    b_keep = tl.exp2(b_max - b_ref)
    b_sum = b_sum * b_keep + tl.sum(b_p, 1)
    b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None])
    return b_acc, b_sum, b_new


@triton.jit
def _join(
    part,
    lse,
    p_o,
    i_part,
    m_m,
    m_md,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weigh the splits' outputs by their share of the softmax. Read past the L1 cache, which does not see other programs."""
    o_d = tl.arange(0, BLOCK_D)
    b_max = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    for i_s in tl.static_range(SPLITS):
        b_max = tl.maximum(b_max, tl.load(lse + i_part + i_s, mask=m_m, other=-float("inf"), cache_modifier=".cg"))
    b_max = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_o = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for i_s in tl.static_range(SPLITS):
        b_lse = tl.load(lse + i_part + i_s, mask=m_m, other=-float("inf"), cache_modifier=".cg")
        b_w = tl.exp2(b_lse - b_max)
        b_sum += b_w
        p_part = part + (i_part + i_s)[:, None] * D + o_d[None, :]
        b_o += b_w[:, None] * tl.load(p_part, mask=m_md, other=0.0, cache_modifier=".cg")
    tl.store(p_o, b_o / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None], mask=m_md)


@triton.jit
def _attend_kernel(
    q,
    k_store,
    v_store,
    row,
    kv_len,
    hide,
    swap,
    together,
    out,
    part,
    lse,
    count,
    queries,
    W,
    max_kv_len,
    scale,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HIDE: tl.constexpr,
    SWAP: tl.constexpr,
    TOGETHER: tl.constexpr,
    FEW: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_m, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    i_k, i_r = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < W * G
    # Tile row m is query head m % G of position m // G.
    b_at = i_r * W + o_m // G

    wait()
    i_row = i_r
    if TOGETHER:
        i_row = tl.minimum(tl.load(together + i_r * W), queries - 1)
        b_at = tl.load(together + b_at, mask=m_m, other=queries)
        m_m &= b_at < queries
    m_md = m_m[:, None] & (o_d < D)[None, :]
    i_out = b_at * H + i_k * G + o_m % G
    b_q = tl.load(q + i_out[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
    b_row = tl.load(row + i_row)
    b_len = tl.load(kv_len + b_at, mask=m_m, other=0).to(tl.int32)
    b_len = tl.minimum(b_len, max_kv_len)
    reach = tl.max(b_len, 0)
    b_start, b_stop, b_instead = b_len, b_len, b_len
    if SWAP:
        p_swap = swap + b_at * 3
        b_start = tl.load(p_swap, mask=m_m, other=0).to(tl.int32)
        b_stop = tl.load(p_swap + 1, mask=m_m, other=0).to(tl.int32)
        b_instead = tl.load(p_swap + 2, mask=m_m, other=0).to(tl.int32)
        m_w = b_start < b_stop
        reach = tl.minimum(tl.maximum(reach, tl.max(tl.where(m_w, b_instead + b_stop - b_start, 0), 0)), max_kv_len)
    chunk = tl.cdiv(tl.cdiv(reach, SPLITS), 16) * 16
    start = i_s * chunk
    stop = tl.minimum(start + chunk, reach)
    p_k = k_store + b_row * stride_kb + i_k * stride_kh
    p_v = v_store + b_row * stride_vb + i_k * stride_vh
    hide_start, hide_stop = 0, 0
    if HIDE:
        hide_start = tl.load(hide + i_row * 2).to(tl.int32)
        hide_stop = tl.load(hide + i_row * 2 + 1).to(tl.int32)

    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    if not FEW:
        # Tiles that every query sees whole need no mask. They end where the shortest query does or where a slot is hidden or
        # swapped.
        shared = tl.minimum(tl.min(tl.where(m_m, b_len, reach), 0), stop)
        if HIDE:
            shared = tl.minimum(shared, tl.where(hide_start < hide_stop, hide_start, reach))
        if SWAP:
            shared = tl.minimum(shared, tl.min(tl.where(m_w, b_start, reach), 0))
        whole = start + tl.maximum(shared - start, 0) // BLOCK_N * BLOCK_N
        for j in range(start, whole, BLOCK_N):
            b_acc, b_sum, b_max = _attend_step(
                b_acc, b_sum, b_max, b_q, p_k, p_v, j, stop, b_len, hide_start, hide_stop,
                b_start, b_stop, b_instead, scale, stride_kt, stride_vt, False, HIDE, SWAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        start = whole
    for j in range(start, stop, BLOCK_N):
        b_acc, b_sum, b_max = _attend_step(
            b_acc, b_sum, b_max, b_q, p_k, p_v, j, stop, b_len, hide_start, hide_stop,
            b_start, b_stop, b_instead, scale, stride_kt, stride_vt, True, HIDE, SWAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    b_o = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    p_o = out + i_out[:, None] * D + o_d[None, :]
    if SPLITS == 1:
        tl.store(p_o, b_o, mask=m_md)
    else:
        i_part = i_out * SPLITS
        tl.store(part + (i_part + i_s)[:, None] * D + o_d[None, :], b_o, mask=m_md)
        # log2(0) is not defined everywhere; an empty split weighs nothing.
        b_lse = tl.where(b_sum == 0.0, -float("inf"), b_max + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))
        tl.store(lse + i_part + i_s, b_lse, mask=m_m)
        # All threads have stored before one of them tells; whoever is told last sees what all splits have stored.
        tl.debug_barrier()
        p_count = count + (i_r * tl.num_programs(1) + i_k) * (tl.num_programs(0) // SPLITS) + i_m
        if tl.atomic_add(p_count, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(p_count, 0)  # for the next launch
            _join(part, lse, p_o, i_part, m_m, m_md, D, SPLITS, BLOCK_M, BLOCK_D)


@cache
def _counters(device: torch.device, size: int) -> Tensor:
    """How many splits of each tile have finished: zero between launches, which run one at a time, as on one stream."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def tiling(tiles: int, packed: int, max_kv_len: int, channels: int, itemsize: int, device: torch.device) -> dict[str, int]:
    """Tile shape and number of key splits for `packed` queries of each of `tiles` (row, kv head) pairs, whose heads take so
    many channels, a power of two, of `itemsize` bytes.

    Splits make about one program a multiprocessor; with few of them, deep pipelines keep the memory busy. Where tiles fill a
    quarter of the device, only long keys are split. The queries of a kv head that many heads share fill several tiles, which
    read the same keys from the L2 cache. (Hopper takes `hopper.py` where its kernel splits keys.) Measured on an H200
    (torch 2.11, triton 3.6, 2026-11-28) in a captured chain of layers, us a layer at 1256 keys, as (rows, keys, splits,
    stages): LLaDA 1 x 32 queries (32, 64, 4, 6) 140.7, with 4 stages 143.8, with 8 splits 144.1; Dream 1 x 32 (32, 32, 8, 3)
    156.5, (64, 64, 8, 4) 157.5; v2 1 x 8 (32, 32, 8, 3) 146.9, (64, 32, 8, 3) 149.1.

    Where the matrix unit reads shared memory it takes 64 rows at a time, and a tile of 64 that is half empty is faster than
    one of 32. Measured on an H200 (2026-12-01), us of a launch over keys that no cache has, as (rows, keys, stages), with
    160, 384 and 1256 keys. LLaDA 32 x 32: (64, 32, 3) 32, 59, 164, (64, 64, 3) 38, 60, 162, (32, 128, 3) 65, 76, 191. LLaDA
    8 x 32: (64, 32, 3) 10.7, 18.7, 46.5, (64, 64, 3) 10.9, 18.0, 44.5, (32, 64, 3) 11.9, 18.0, 45.0. v2 32 x 32: (64, 32, 3)
    15.8, 25.8, 67.6, (64, 64, 3) 17.8, 23.7, 55.0; 32 x 8, one program a multiprocessor: (64, 64, 4) 7.4, 11.6, 26.3, (64,
    64, 3) 8.3, 12.6, 29.1; 16 x 8: (64, 64, 4) 7.1, 9.2, 22.0, in two splits 9.9, 11.4, 21.0. 32 rows of 8 queries, 32
    heads: (16, 32, 3) 27.1, 54.1, 157.2, (16, 64, 3) 30.4, 53.6, 160.0, (16, 128, 3) 50.9, 64.5, 166.7.

    Other cards, and what is wider than that (whose tiles of 64 rows spill), keep what an H100 preferred unsplit: LLaDA 32 x
    32 over 1256 keys 242 us with 128 keys a tile, 248 with 64.
    """
    room, few = multiprocessors(device), tiles < 8
    by_64 = reads_shared(device) and itemsize == 2 and channels <= 128 and not (few and packed <= 256)
    if by_64:
        block_m = 16 if packed <= 16 else 64
    else:
        block_m = min(32 if few and packed <= 256 else 64, max(16, triton.next_power_of_2(packed)))
    programs = tiles * triton.cdiv(packed, block_m)
    least = LONG_SPLIT if by_64 and 4 * programs > room else SHORT_SPLIT
    splits = max(1, min(room // programs, triton.cdiv(max_kv_len, least)))
    splits = 1 << (splits.bit_length() - 1)
    if splits > 1:
        block_n, depth = 64, 6
        if few and not by_64:
            block_n, depth, splits = 32, 3, 8
    elif not by_64:
        block_n, depth = 128 if block_m <= 32 else 64, 3
    elif programs <= room:
        block_n, depth = 64, 4
    else:
        block_n, depth = 32 if block_m == 16 or max_kv_len <= SHORT else 64, 3
    depth = stages(depth, 2 * block_n * channels * itemsize, device)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "SPLITS": splits, "num_warps": 4, "num_stages": depth}


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
    """See `fastdllm.kernels.attention.reference.attention`."""
    if (parts := _split(q, k_store, v_store, row, kv_len, max_kv_len, hide, scale, swap, together)) is not None:
        return hopper.join(*parts, torch.empty(q.shape, dtype=q.dtype, device=q.device))
    if swap is None and together is None and hopper_wide.applies(q, k_store, v_store, max_kv_len, scale):
        return hopper_wide.attention(q, k_store, v_store, row, kv_len, max_kv_len, hide, scale)
    R, W, H, D = q.shape
    K = k_store.shape[1]
    rows, queries = (R, W) if together is None else together.shape
    tile = tiling(rows * K, queries * H // K, max_kv_len, triton.next_power_of_2(D), k_store.itemsize, q.device)
    return launch(q, k_store, v_store, row, kv_len, max_kv_len, hide, scale, swap, together, **tile)


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
    """See `fastdllm.kernels.attention.reference.attention_fp8`."""
    if (parts := _split(q, k_store, v_store, row, kv_len, max_kv_len, hide, scale, swap, together)) is not None:
        tokens = hopper.join_fp8(*parts, q.dtype)
    else:
        y = attention(q, k_store, v_store, row, kv_len, max_kv_len, hide, scale, dense, swap, together)
        tokens = quantize_rows(y.flatten(2).flatten(0, 1))
    return Quantized(tokens.values.view(*q.shape[:2], -1), tokens.scale.view(q.shape[:2]), q.dtype)


def _split(
    q: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    row: Tensor,
    kv_len: Tensor,
    max_kv_len: int,
    hide: Tensor | None,
    scale: float | None,
    swap: Tensor | None,
    together: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """The parts that `hopper.join` joins, or None where other kernels compute this attention."""
    tile = hopper.tile_for(q, k_store, v_store, max_kv_len) if swap is None and together is None else None
    return None if tile is None else hopper.attention(q, k_store, v_store, row, kv_len, max_kv_len, hide, scale, **tile)


def launch(
    q: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    row: Tensor,
    kv_len: Tensor,
    max_kv_len: int,
    hide: Tensor | None,
    scale: float | None,
    swap: Tensor | None = None,
    together: Tensor | None = None,
    *,
    BLOCK_M: int,
    BLOCK_N: int,
    SPLITS: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """`attention` with a given tiling."""
    R, W, H, D = q.shape
    queries, K = R * W, k_store.shape[1]
    if together is not None:
        R, W = together.shape
    block_d = max(16, triton.next_power_of_2(D))
    q = q.contiguous()
    out = torch.empty_like(q)
    tiles = triton.cdiv(W * H // K, BLOCK_M)
    part, lse, count = out, out, row
    if SPLITS > 1:
        part = torch.empty((queries, H, SPLITS, D), dtype=torch.float32, device=q.device)
        lse = torch.empty((queries, H, SPLITS), dtype=torch.float32, device=q.device)
        count = _counters(q.device, triton.next_power_of_2(tiles * K * R))
    grid = (tiles * SPLITS, K, R)
    _attend_kernel[grid](
        q,
        k_store,
        v_store,
        row.contiguous(),
        kv_len.contiguous(),
        kv_len if hide is None else hide.contiguous(),
        kv_len if swap is None else swap.contiguous(),
        kv_len if together is None else together.contiguous(),
        out,
        part,
        lse,
        count,
        queries,
        W,
        max_kv_len,
        hopper.base_2(scale, D),
        *k_store.stride()[:3],
        *v_store.stride()[:3],
        H=H,
        G=H // K,
        D=D,
        HIDE=hide is not None,
        SWAP=swap is not None,
        TOGETHER=together is not None,
        # Few tiles are all masked: a second loop would wait for its first tile again, which took 0.8 us of 14.4 (H200).
        FEW=SPLITS > 1 and max_kv_len <= FEW_TILES * BLOCK_N * SPLITS,
        SPLITS=SPLITS,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=num_stages,
        **LAUNCH,
    )
    return out

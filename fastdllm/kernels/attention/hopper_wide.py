# SPDX-License-Identifier: Apache-2.0
"""Attention of many queries on Hopper, in Gluon: groups of warps share a tile of keys and divide the work.

A program has three partitions. One warp asks the bulk copy engine for queries, keys and values, as far ahead as there is
room. Two warpgroups have 64 queries of a head each. While one of them takes exponentials, the matrix unit works for the
other; and while a tile's exponentials are taken, the product with the values of the tile before it runs. A program goes
through several tiles of queries and fetches the next one's meanwhile. Method: FlashAttention-3 (arXiv 2407.08608).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastdllm.kernels.attention.hopper import base_2, readable
from fastdllm.kernels.device import cache_size, multiprocessors
from fastdllm.kernels.gluon import GLUON, copyable, described, jit
from fastdllm.kernels.pdl import LAUNCH

if GLUON:
    from fastdllm.kernels.gluon import (
        fence_async_shared,
        gl,
        mbarrier,
        num_warps,
        tma,
        wait,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    _HALF = gl.constexpr(64)  # queries of a warpgroup: the rows that the matrix unit takes at a time
    _RING = gl.constexpr(2)  # tiles of keys and of values that are here or on their way; of queries, for each warpgroup

BLOCK_M = 128  # queries of a tile, half for each warpgroup
BLOCK_N = 128  # keys of a tile
CHANNELS = 128
FEW_KEYS = 4 * BLOCK_N  # so few are not worth splitting


@jit
def _tile(i, per, tiles, H: gl.constexpr, LONGEST_FIRST: gl.constexpr):
    """Row, head and first query of tile i; of a head there are `per` tiles."""
    if LONGEST_FIRST:  # later queries may see more
        heads = tiles // per
        i_r, i_h, i_t = i % heads // H, i % heads % H, per - 1 - i // heads
    else:
        i_r, i_h, i_t = i // per // H, i // per % H, i % per
    return i_r, i_h, i_t * 2 * _HALF


@jit
def _seen(kv_len, i_r, i_m, W, max_kv_len, BLOCK_N: gl.constexpr):
    """Slots that some query of the tile sees, and how many tiles of keys they make: at least one."""
    o_m = i_m + gl.arange(0, 2 * _HALF, gl.BlockedLayout([1], [32], [num_warps()], [0]))
    b_len = gl.load(kv_len + i_r.to(gl.int64) * W + o_m, mask=o_m < W, other=0).to(gl.int32)
    reach = gl.minimum(gl.max(b_len, 0), max_kv_len)
    return reach, gl.maximum(gl.cdiv(reach, BLOCK_N), 1)


@jit
def _place(bars, i):
    """Where tile i lies in the ring, of which each place has a barrier, and the parity of how often it has gone round."""
    RING: gl.constexpr = bars.shape[0]
    return i % RING, i // RING & 1


@jit
def _arrived(ready, i):
    """Wait until tile i of a ring is here."""
    place, parity = _place(ready, i)
    mbarrier.wait(ready.index(place), parity)


@jit
def _ask(x, at, ring, ready, free, i):
    """Copy tile i of a ring, when nobody reads what is in its place."""
    place, parity = _place(ready, i)
    mbarrier.wait(free.index(place), parity ^ 1)
    mbarrier.expect(ready.index(place), x.block_type.nbytes)
    tma.async_copy_global_to_shared(x, at, ready.index(place), ring.index(place))


@jit
def _fetch(
    q,
    k,
    v,
    q_s,
    k_s,
    v_s,
    q_ready,
    q_free,
    k_ready,
    k_free,
    v_ready,
    v_free,
    row,
    kv_len,
    W,
    per,
    tiles,
    max_kv_len,
    H: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    LONGEST_FIRST: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """The partition that copies: all tiles of the program, in the order in which they are used."""
    n, m = 0, 0  # tiles of keys, and halves of tiles of queries, so far
    for i in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_r, i_h, i_m = _tile(i, per, tiles, H, LONGEST_FIRST)
        count = _seen(kv_len, i_r, i_m, W, max_kv_len, BLOCK_N)[1]
        i_row = gl.load(row + i_r).to(gl.int32)
        for part in gl.static_range(2):
            _ask(q, [i_r, i_m + part * _HALF, i_h, 0], q_s, q_ready, q_free, m + part)
        for j in range(count):
            _ask(k, [i_row, i_h // G, j * BLOCK_N, 0], k_s, k_ready, k_free, n + j)
            _ask(v, [i_row, i_h // G, j * BLOCK_N, 0], v_s, v_ready, v_free, n + j)
        n += count
        m += 2


@jit
def _masked(b_s, b_len, j, shared, hide_start, hide_stop, HIDE: gl.constexpr):
    """Scores of tile j of the keys, -inf where a query does not see the key. Before slot `shared` all are seen."""
    BLOCK_N: gl.constexpr = b_s.shape[1]
    if (j + 1) * BLOCK_N > shared:
        o_j = j * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, b_s.type.layout))
        m_s = o_j[None, :] < b_len[:, None]
        if HIDE:
            m_s = m_s & ((o_j < hide_start) | (o_j >= hide_stop))[None, :]
        b_s = gl.where(m_s, b_s, -float("inf"))
    return b_s


@jit
def _cleared(b_v, j, reach, shared, hide_start, hide_stop, HIDE: gl.constexpr):
    """Zeros for the values that nobody sees: such a slot may hold anything, and a weight of zero does not hide NaN. Both
    warpgroups write the same."""
    BLOCK_N: gl.constexpr = b_v.shape[0]
    D: gl.constexpr = b_v.shape[1]
    if (j + 1) * BLOCK_N > shared:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps(), 1], [1, 0])
        o_j = j * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT))
        m_j = o_j < reach
        if HIDE:
            m_j = m_j & ((o_j < hide_start) | (o_j >= hide_stop))
        b_v.store(gl.where(m_j[:, None], b_v.load(LAYOUT), 0.0))
        fence_async_shared()


@jit
def _attend(
    PART: gl.constexpr,
    out,
    q_s,
    k_s,
    v_s,
    q_ready,
    q_free,
    k_ready,
    k_free,
    v_ready,
    v_free,
    kv_len,
    hide,
    W,
    per,
    tiles,
    max_kv_len,
    scale,
    H: gl.constexpr,
    D: gl.constexpr,
    HIDE: gl.constexpr,
    LONGEST_FIRST: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """The partition of a warpgroup: the first (PART 0) or second half of each tile's queries."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    n, m = 0, PART  # the tiles of keys so far; which half of the tiles of queries is next
    for i in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_r, i_h, i_m = _tile(i, per, tiles, H, LONGEST_FIRST)
        reach, count = _seen(kv_len, i_r, i_m, W, max_kv_len, BLOCK_N)
        o_m = i_m + PART * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, SCORES))
        b_len = gl.load(kv_len + i_r.to(gl.int64) * W + o_m, mask=o_m < W, other=0).to(gl.int32)
        b_len = gl.minimum(b_len, max_kv_len)
        shared = gl.min(gl.where(o_m < W, b_len, reach), 0)
        hide_start, hide_stop = 0, 0
        if HIDE:
            hide_start = gl.load(hide + i_r * 2).to(gl.int32)
            hide_stop = gl.load(hide + i_r * 2 + 1).to(gl.int32)
            shared = gl.minimum(shared, gl.where(hide_start < hide_stop, hide_start, reach))
        i_q = _place(q_ready, m)[0]
        b_q = q_s.index(i_q).reshape((_HALF, D))
        none = gl.zeros((_HALF, BLOCK_N), gl.float32, SCORES)

        _arrived(q_ready, m)
        _arrived(k_ready, n)
        b_k = k_s.index(n % _RING).reshape((BLOCK_N, D))
        b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), none, use_acc=False)
        mbarrier.arrive(k_free.index(n % _RING), count=1)
        b_s = _masked(b_s, b_len, 0, shared, hide_start, hide_stop, HIDE)
        b_max = gl.max(b_s, 1)
        # A query that has seen nothing yet has no maximum; any finite reference keeps its weights at zero.
        b_ref = gl.where(b_max == -float("inf"), 0.0, b_max * scale)
        b_p = gl.exp2(b_s * scale - b_ref[:, None])
        b_sum = gl.sum(b_p, 1)
        b_w = gl.convert_layout(b_p.to(k_s.dtype), WEIGHTS)
        b_acc = gl.zeros((_HALF, D), gl.float32, SUMS)
        if count > 1:
            _arrived(k_ready, n + 1)
        for j in range(1, count):
            now, last = n + j, n + j - 1
            b_k = k_s.index(now % _RING).reshape((BLOCK_N, D))
            s_going = warpgroup_mma(b_q, b_k.permute((1, 0)), none, use_acc=False, is_async=True)
            _arrived(v_ready, last)
            b_v = v_s.index(last % _RING).reshape((BLOCK_N, D))
            if HIDE:
                _cleared(b_v, j - 1, reach, shared, hide_start, hide_stop, HIDE)
            acc_going = warpgroup_mma(b_w, b_v, b_acc, is_async=True)
            b_s = warpgroup_mma_wait(num_outstanding=1, deps=(s_going,))
            mbarrier.arrive(k_free.index(now % _RING), count=1)
            b_s = _masked(b_s, b_len, j, shared, hide_start, hide_stop, HIDE)
            b_new = gl.maximum(b_max, gl.max(b_s, 1))
            b_ref = gl.where(b_new == -float("inf"), 0.0, b_new * scale)
            b_p = gl.exp2(b_s * scale - b_ref[:, None])
            b_keep = gl.exp2(b_max * scale - b_ref)
            b_sum = b_sum * b_keep + gl.sum(b_p, 1)
            b_max = b_new
            # This wait is a loop, and so a border: without one the assembler moves the exponentials after the wait for the
            # products, where none runs.
            mbarrier.wait(k_ready.index((now + 1) % _RING), (now + 1) // _RING & 1, pred=j + 1 < count)
            b_next = gl.convert_layout(b_p.to(k_s.dtype), WEIGHTS)
            b_acc, b_w = warpgroup_mma_wait(num_outstanding=0, deps=(acc_going, b_next))
            mbarrier.arrive(v_free.index(last % _RING), count=1)
            b_acc = b_acc * gl.convert_layout(b_keep, gl.SliceLayout(1, SUMS))[:, None]
        last = n + count - 1
        _arrived(v_ready, last)
        b_v = v_s.index(last % _RING).reshape((BLOCK_N, D))
        _cleared(b_v, count - 1, reach, shared, hide_start, hide_stop, HIDE)
        b_acc = warpgroup_mma(b_w, b_v, b_acc)
        mbarrier.arrive(v_free.index(last % _RING), count=1)

        b_sum = gl.convert_layout(gl.where(b_sum == 0.0, 1.0, b_sum), gl.SliceLayout(1, SUMS))
        b_q.store((b_acc / b_sum[:, None]).to(k_s.dtype))  # nobody else reads these queries
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [i_r, i_m + PART * _HALF, i_h, 0], q_s.index(i_q))
        tma.store_wait(pendings=0)
        mbarrier.arrive(q_free.index(i_q), count=1)
        n += count
        m += 2


@jit
def _attend_kernel(
    q,
    k,
    v,
    out,
    row,
    kv_len,
    hide,
    W,
    per,
    tiles,
    max_kv_len,
    scale,
    H: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    HIDE: gl.constexpr,
    LONGEST_FIRST: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    q_s = gl.allocate_shared_memory(k.dtype, [2 * _RING, 1, _HALF, 1, D], q.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [_RING, 1, 1, BLOCK_N, D], k.layout)
    v_s = gl.allocate_shared_memory(k.dtype, [_RING, 1, 1, BLOCK_N, D], v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2 * _RING, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [_RING, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [_RING, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2 * _RING, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [_RING, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [_RING, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2 * _RING):
        mbarrier.init(q_ready.index(s), count=1)
        mbarrier.init(q_free.index(s), count=1)
    for s in gl.static_range(_RING):
        mbarrier.init(k_ready.index(s), count=1)
        mbarrier.init(v_ready.index(s), count=1)
        mbarrier.init(k_free.index(s), count=2)  # both warpgroups
        mbarrier.init(v_free.index(s), count=2)
    wait()
    # Tuples in variables would lose their constants.
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    gl.constexpr(0), out, q_s, k_s, v_s, q_ready, q_free, k_ready, k_free, v_ready, v_free, kv_len, hide, W,
                    per, tiles, max_kv_len, scale, H, D, HIDE, LONGEST_FIRST, BLOCK_N,
                ),
            ),
            (
                _attend,
                (
                    gl.constexpr(1), out, q_s, k_s, v_s, q_ready, q_free, k_ready, k_free, v_ready, v_free, kv_len, hide, W,
                    per, tiles, max_kv_len, scale, H, D, HIDE, LONGEST_FIRST, BLOCK_N,
                ),
            ),
            (
                _fetch,
                (
                    q, k, v, q_s, k_s, v_s, q_ready, q_free, k_ready, k_free, v_ready, v_free, row, kv_len, W, per, tiles,
                    max_kv_len, H, G, D, LONGEST_FIRST, BLOCK_N,
                ),
            ),
        ],
        [4, 1],  # warps of the second and the third partition
        [240, 24],  # registers of their threads
    )  # fmt: skip


def applies(q: Tensor, k_store: Tensor, v_store: Tensor, max_kv_len: int, scale: float | None) -> bool:
    """Whether this kernel computes attention of q [R, W, H, D]: on Hopper, in 16 bits, with heads of 128 channels. Its tiles
    of queries are at least two thirds full. It does not split keys, so its tiles are more than a quarter of the
    multiprocessors, or keys are few. The bulk copy engine reads queries, keys and values where they lie.

    Measured on an H200 (torch 2.11, triton 3.6, 2026-12-01), us in Triton and here. LLaDA-8B's 32 heads over 1,256 keys:
    1,256 queries 77 and 59, 4 x 1,256 257 and 188, 128 queries 16.5 and 20.2. v2-7B's 28 heads, which share 4 of keys: 1,256
    queries 73 and 57, 128 over 384 keys 21.8 and 9.3, 32 x 128 over 128 keys 48 and 29, 8 x 65 over 512 keys 13.7 and 19.0.
    1,256 queries of 16 heads with 64 channels: 24.3, and 32.7 in a first version.
    """
    R, W, H, D = q.shape
    per = triton.cdiv(W, BLOCK_M)
    return (
        readable(q, k_store, v_store)
        and (copyable(q) or not q.is_contiguous())  # a copy is aligned
        and D == CHANNELS
        and 2 * BLOCK_M * per <= 3 * W
        and (4 * per * H * R > multiprocessors(q.device) or max_kv_len <= FEW_KEYS)  # this kernel does not split keys
        and (scale is None or scale > 0)  # the maximum is taken before scores are scaled
    )


def longest_first(k_store: Tensor, rows: int, max_kv_len: int) -> bool:
    """Whether tiles go by their place in the sequence, the last ones first, and not head by head.

    Where later queries see more, that spreads the work more evenly (4 x 1,024 queries of 28 heads, causal in blocks of 32:
    75 us, head by head 95; H200). But all heads are then read at once, and keys and values have to fit the L2 cache beside
    other things (4 x 1,256 queries of 32 heads with as many keys: 233 us, head by head 189)."""
    _, K, _, D = k_store.shape
    return 2 * rows * K * max_kv_len * D * k_store.itemsize <= cache_size(k_store.device) // 4


def attention(
    q: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    row: Tensor,
    kv_len: Tensor,
    max_kv_len: int,
    hide: Tensor | None,
    scale: float | None,
) -> Tensor:
    """`attention.reference.attention` where `applies(q, k_store, v_store, max_kv_len, scale)`."""
    R, W, H, D = q.shape
    out = torch.empty((R, W, H, D), dtype=q.dtype, device=q.device)
    per = triton.cdiv(W, BLOCK_M)
    tiles = per * H * R
    half, keys = (1, BLOCK_M // 2, 1, D), (1, 1, BLOCK_N, D)
    _attend_kernel[(min(tiles, multiprocessors(q.device)),)](
        described(q.contiguous(), half),
        described(k_store, keys),
        described(v_store, keys),
        described(out, half),
        row.contiguous(),
        kv_len.contiguous(),
        kv_len if hide is None else hide.contiguous(),
        W,
        per,
        tiles,
        max_kv_len,
        base_2(scale, D),
        H=H,
        G=H // k_store.shape[1],
        D=D,
        HIDE=hide is not None,
        LONGEST_FIRST=longest_first(k_store, R, max_kv_len),
        BLOCK_N=BLOCK_N,
        num_warps=4,
        **LAUNCH,
    )
    return out

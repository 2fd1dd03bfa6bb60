# SPDX-License-Identifier: Apache-2.0
"""Softmax statistics of the top token in two stages: every program reduces one tile of the vocabulary, then a
second kernel joins a position's tiles in a fixed order.

Of a tile only (maximum, its id, sum of exponentials) is kept, plus the runner-up and the first moment where
margin and entropy are asked for. The tiles come from logits in memory (`confidence`) or straight from the
head's matrix product (`head_confidence`), in which case the logits are never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.confidence.reference import Confidence
from fastdllm.kernels.device import stages
from fastdllm.kernels.dot import dot
from fastdllm.kernels.linear.triton import linear
from fastdllm.kernels.pdl import LAUNCH, wait

BLOCK_V = 4096
HEAD_ROWS = 64


@triton.jit
def _store_tile(
    b_x,
    o_v,
    m_n,
    i_part,
    top,
    best,
    total,
    moment,
    second,
    V,
    ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr,
):
    """Reduce fp32 logits b_x along axis 0 (ids o_v, broadcastable; -inf where not allowed); store the tile's statistics."""
    b_max = tl.max(b_x, 0)
    # A tile of banned entries has no maximum; against any finite reference its weights are zero.
    b_ref = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_diff = b_x - b_ref
    b_exp = tl.exp(b_diff)
    b_top = tl.min(tl.where(b_x == b_max, o_v, V), 0)
    tl.store(top + i_part, b_top, mask=m_n)
    tl.store(best + i_part, b_max, mask=m_n)
    tl.store(total + i_part, tl.sum(b_exp, 0), mask=m_n)
    if ENTROPY:
        tl.store(moment + i_part, tl.sum(tl.where(b_exp > 0.0, b_exp * b_diff, 0.0), 0), mask=m_n)
    if MARGIN:
        b_rest = tl.where(o_v == b_top, -float("inf"), b_x)
        tl.store(second + i_part, tl.max(b_rest, 0), mask=m_n)


@triton.jit
def _tile_kernel(
    logits,
    banned,
    top,
    best,
    total,
    moment,
    second,
    V,
    stride_n,
    BANNED: tl.constexpr,
    ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_n, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = i_s * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    wait()
    b_x = tl.load(logits + i_n * stride_n + o_v, mask=m_v, other=-float("inf")).to(tl.float32)
    if BANNED:  # logits do not wait for what is allowed: both are read at once
        b_x = tl.where(tl.load(banned + o_v, mask=m_v, other=1) == 0, b_x, -float("inf"))
    i_part = i_n * tl.num_programs(1) + i_s
    _store_tile(b_x, o_v, None, i_part, top, best, total, moment, second, V, ENTROPY, MARGIN)


@triton.jit
def _head_kernel(
    hidden,
    weight,
    banned,
    top,
    best,
    total,
    moment,
    second,
    N,
    V,
    C,
    BANNED: tl.constexpr,
    ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_v, i_n = tl.program_id(0), tl.program_id(1)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_v, m_n = o_v < V, o_n < N
    p_w = weight + o_v.to(tl.int64)[:, None] * C
    p_h = hidden + o_n.to(tl.int64)[None, :] * C
    wait()
    b_x = tl.zeros((BLOCK_V, BLOCK_N), dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        if EVEN:
            b_w = tl.load(p_w + o_c[None, :], mask=m_v[:, None], other=0.0)
            b_h = tl.load(p_h + o_c[:, None], mask=m_n[None, :], other=0.0)
        else:
            b_w = tl.load(p_w + o_c[None, :], mask=m_v[:, None] & (o_c < C)[None, :], other=0.0)
            b_h = tl.load(p_h + o_c[:, None], mask=m_n[None, :] & (o_c < C)[:, None], other=0.0)
        b_x = dot(b_w, b_h, b_x)
    if BANNED:
        m_v &= tl.load(banned + o_v, mask=m_v, other=1) == 0
    # Rounded like logits in memory: which token leads must not depend on how many positions there are.
    b_x = tl.where(m_v[:, None], b_x.to(hidden.dtype.element_ty).to(tl.float32), -float("inf"))
    i_part = o_n.to(tl.int64) * tl.num_programs(0) + i_v
    _store_tile(b_x, o_v[:, None], m_n, i_part, top, best, total, moment, second, V, ENTROPY, MARGIN)


@triton.jit
def _join_kernel(
    top,
    best,
    total,
    moment,
    second,
    out_top,
    out_prob,
    out_lse,
    out_entropy,
    out_margin,
    V,
    TILES,
    ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < TILES
    p_s = i_n * TILES + o_s
    wait()
    b_best = tl.load(best + p_s, mask=m_s, other=-float("inf"))
    b_top = tl.load(top + p_s, mask=m_s, other=V)
    b_max = tl.max(b_best, 0)
    # NaN logits have no maximum: the id stays in range and the probability says NaN.
    first = tl.min(tl.where(b_best == b_max, b_top, V), 0)
    b_ref = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_shift = b_best - b_ref
    b_w = tl.where(m_s, tl.exp(b_shift), 0.0)
    b_total = tl.load(total + p_s, mask=m_s, other=0.0)
    b_sum = tl.sum(b_w * b_total, 0)
    tl.store(out_top + i_n, tl.minimum(first, V - 1).to(tl.int64))
    # Without an allowed entry there is no distribution.
    tl.store(out_prob + i_n, tl.where(b_sum == 0.0, float("nan"), 1.0 / b_sum))
    tl.store(out_lse + i_n, b_ref + tl.log(b_sum))
    if ENTROPY:
        b_moment = tl.load(moment + p_s, mask=m_s, other=0.0)
        b_moment += tl.where(b_w > 0.0, b_shift, 0.0) * b_total
        tl.store(out_entropy + i_n, tl.log(b_sum) - tl.sum(b_w * b_moment, 0) / b_sum)
    if MARGIN:
        b_second = tl.load(second + p_s, mask=m_s, other=-float("inf"))
        b_second = tl.max(tl.where(b_top == first, b_second, b_best), 0)
        tl.store(out_margin + i_n, (1.0 - tl.exp(b_second - b_ref)) / b_sum)


class _Tiles:
    """Scratch statistics of N positions times `tiles` vocabulary tiles, and their join."""

    def __init__(self, N: int, V: int, tiles: int, device: torch.device, entropy: bool, margin: bool) -> None:
        self.N, self.V, self.tiles, self.entropy, self.margin = N, V, tiles, entropy, margin
        self.device = device
        self.top = torch.empty((N, tiles), dtype=torch.int32, device=device)
        self.best, self.total = self._new(N, tiles), self._new(N, tiles)
        self.moment = self._new(N, tiles) if entropy else self.best
        self.second = self._new(N, tiles) if margin else self.best

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def pointers(self) -> tuple[Tensor, ...]:
        return self.top, self.best, self.total, self.moment, self.second

    def join(self) -> Confidence:
        top = torch.empty((self.N,), dtype=torch.int64, device=self.device)
        prob, lse = self._new(self.N), self._new(self.N)
        entropy = self._new(self.N) if self.entropy else None
        margin = self._new(self.N) if self.margin else None
        block = triton.next_power_of_2(self.tiles)
        _join_kernel[(self.N,)](
            *self.pointers(),
            top,
            prob,
            lse,
            prob if entropy is None else entropy,
            prob if margin is None else margin,
            self.V,
            self.tiles,
            ENTROPY=self.entropy,
            MARGIN=self.margin,
            BLOCK_S=block,
            num_warps=4 if block > 128 else 1,
            **LAUNCH,
        )
        return Confidence(top, prob, lse, entropy, margin)


def confidence(logits: Tensor, banned: Tensor | None = None, entropy: bool = False, margin: bool = False) -> Confidence:
    """See `fastdllm.kernels.confidence.reference.confidence`."""
    N, V = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    block = min(BLOCK_V, triton.next_power_of_2(V))
    tiles = _Tiles(N, V, triton.cdiv(V, block), logits.device, entropy, margin)
    _tile_kernel[(N, tiles.tiles)](
        logits,
        logits if banned is None else banned,
        *tiles.pointers(),
        V,
        logits.stride(0),
        BANNED=banned is not None,
        ENTROPY=entropy,
        MARGIN=margin,
        BLOCK_V=block,
        num_warps=4,
        **LAUNCH,
    )
    return tiles.join()


def head_confidence(
    hidden: Tensor,
    weight: Tensor,
    banned: Tensor | None = None,
    entropy: bool = False,
    margin: bool = False,
    scale: Tensor | None = None,
) -> Confidence:
    """See `fastdllm.kernels.confidence.reference.head_confidence`.

    Up to 64 positions the fused kernel reads the head once, at the memory's speed; more positions would read it more than
    once. LLaDA's head at 8, 32 and 64 positions: 241, 244 and 261 us, as two kernels 244, 257 and 286; Dream's 250, 255 and
    277 against 257, 268 and 305 (H200, torch 2.11, triton 3.6, 2026-11-28).
    """
    if scale is None and len(hidden) <= HEAD_ROWS and hidden.itemsize == 2:
        return launch_head(hidden, weight, banned, entropy, margin, *((64, 128) if len(hidden) <= 32 else (128, 64)))
    return confidence(linear(hidden, weight, scale), banned, entropy, margin)


def launch_head(
    hidden: Tensor,
    weight: Tensor,
    banned: Tensor | None,
    entropy: bool,
    margin: bool,
    block_v: int,
    block_c: int,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Confidence:
    """The fused `head_confidence` with a given tile."""
    (N, C), V = hidden.shape, weight.shape[0]
    tiles = _Tiles(N, V, triton.cdiv(V, block_v), hidden.device, entropy, margin)
    block_n = min(64, max(16, triton.next_power_of_2(N)))
    _head_kernel[(tiles.tiles, triton.cdiv(N, block_n))](
        hidden.contiguous(),
        weight,
        hidden if banned is None else banned,
        *tiles.pointers(),
        N,
        V,
        C,
        BANNED=banned is not None,
        ENTROPY=entropy,
        MARGIN=margin,
        EVEN=C % block_c == 0,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        BLOCK_C=block_c,
        num_warps=num_warps,
        num_stages=stages(num_stages, block_c * (block_v + block_n) * hidden.itemsize, hidden.device),
        **LAUNCH,
    )
    return tiles.join()

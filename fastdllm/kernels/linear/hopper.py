# SPDX-License-Identifier: Apache-2.0
"""Products of few rows on Hopper, in Gluon: the weights are on their way before the kernel's turn.

A kernel starts while the one before it drains (`pdl.py`), and waits for it before it reads x. Weights are constant, so their
first tiles need not wait: each program asks the bulk copy engine for as many as its ring of tiles holds, and waits then. So
the memory is busy while kernels change. Triton orders the copies of a loop itself and begins them behind the wait. That is
why the kernels here are written in Gluon, its language in which layouts, copies and barriers are written by hand.

The products are those of `skinny` in `linear/triton.py` and of `launch` in `silu_mul/triton.py`, bit by bit. Those remain
for other cards, for weights that are widened on the way, and for a Triton without Gluon.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastdllm.kernels.device import stages
from fastdllm.kernels.gluon import GLUON, copyable, described, jit, usable
from fastdllm.kernels.linear.reference import FP8
from fastdllm.kernels.pdl import LAUNCH

if GLUON:
    from fastdllm.kernels.gluon import gl, mbarrier, num_warps, tma, wait, warpgroup_mma


FEW_CHANNELS = 2 * 132 * 64  # of gate: programs of 64 rows fit twice on each of an H100's multiprocessors


@jit
def fetch(x, tiles, ready, slot, i, c, more):
    """Rows i on, channels c on, to a slot of the ring, if there are `more`; ready[slot] counts the bytes that arrive."""
    if len(x.block_shape) == 3:  # of both halves
        tma.async_copy_global_to_shared(x, [0, i, c], ready.index(slot), tiles.index(slot), more)
    else:
        tma.async_copy_global_to_shared(x, [i, c], ready.index(slot), tiles.index(slot), more)


@jit
def streamed(x, w, i_n, i_m, start, count, STAGES: gl.constexpr):
    """Rows i_n on of w times rows i_m on of x, over `count` tiles of channels from `start` on: [ROWS, BLOCK_M].

    x: a descriptor of x [M, C], in tiles [BLOCK_M, BLOCK_C].
    w: a descriptor of the weights [N, C], in tiles [ROWS, BLOCK_C]; or of [2, N / 2, C], in tiles [2, ROWS / 2, BLOCK_C].
    """
    BLOCK_M: gl.constexpr = x.block_shape[0]
    BLOCK_C: gl.constexpr = x.block_shape[1]
    ROWS: gl.constexpr = w.block_type.numel // BLOCK_C
    BYTES: gl.constexpr = (ROWS + BLOCK_M) * BLOCK_C * w.dtype.primitive_bitwidth // 8
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[num_warps(), 1],
        instr_shape=[16, BLOCK_M, 256 // w.dtype.primitive_bitwidth],
    )
    # The compiler knows no star within a list.
    w_s = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_shape, w.layout)  # noqa: RUF005
    x_s = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_shape, x.layout)  # noqa: RUF005
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.expect(ready.index(s), BYTES, s < count)
        fetch(w, w_s, ready, s, i_n, start + s * BLOCK_C, s < count)
    wait()  # everything above reads weights only
    for s in gl.static_range(STAGES):
        fetch(x, x_s, ready, s, i_m, start + s * BLOCK_C, s < count)
    acc = gl.zeros((ROWS, BLOCK_M), gl.float32, LAYOUT)
    for i in range(count):
        slot = i % STAGES
        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
        # The weight is the left operand: its many rows fill the matrix unit.
        acc = warpgroup_mma(w_s.index(slot).reshape((ROWS, BLOCK_C)), x_s.index(slot).permute((1, 0)), acc)
        more = i + STAGES < count
        c = start + (i + STAGES) * BLOCK_C
        mbarrier.expect(ready.index(slot), BYTES, more)
        fetch(w, w_s, ready, slot, i_n, c, more)
        fetch(x, x_s, ready, slot, i_m, c, more)
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(s))
    return acc


@jit
def share_of(tiles, i_s, SPLITS: gl.constexpr):
    """The first of the tiles of channels that split i_s adds up, and their number; none where those before it are all."""
    share = gl.cdiv(tiles, SPLITS)
    return i_s * share, gl.maximum(gl.minimum(share, tiles - i_s * share), 0)


@jit
def store_product(b_y, bias, y, i_n, i_m, i_s, M, N, BIAS: gl.constexpr):
    """b_y [BLOCK_N, BLOCK_M], plus bias [N] in the first split, to channels i_n on of rows i_m on of y [splits, M, N]."""
    o_n = i_n + gl.arange(0, b_y.shape[0], gl.SliceLayout(1, b_y.type.layout))
    o_m = i_m + gl.arange(0, b_y.shape[1], gl.SliceLayout(0, b_y.type.layout))
    m_n, m_m = o_n < N, o_m < M
    if BIAS:
        b_y += gl.load(bias + o_n, mask=m_n & (i_s == 0), other=0.0).to(gl.float32)[:, None]
    p_y = y + (i_s.to(gl.int64) * M + o_m[None, :]) * N + o_n[:, None]
    gl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_n[:, None] & m_m[None, :])


@jit
def store_gated(b_y, out, i_n, i_m, M, F):
    """silu(gate) * up to channels i_n on of rows i_m on of out [M, F]. b_y: rows of gate, then of up, [.., BLOCK_M]."""
    BLOCK_N: gl.constexpr = b_y.shape[0] // 2
    BLOCK_M: gl.constexpr = b_y.shape[1]
    # Each thread gets gate and up of the same channels.
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 1, 2], [32, 1, 1], [1, num_warps(), 1], [2, 0, 1])
    b_y = gl.convert_layout(gl.permute(gl.reshape(b_y, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)), PAIRS)
    b_gate, b_up = gl.split(b_y)
    o_n = i_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(2, PAIRS)))
    o_m = i_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(2, PAIRS)))
    p_out = out + o_m.to(gl.int64)[None, :] * F + o_n[:, None]
    b_act = b_gate * (1 / (1 + gl.exp(-b_gate))) * b_up
    gl.store(p_out, b_act.to(out.dtype.element_ty), mask=(o_n < F)[:, None] & (o_m < M)[None, :])


@jit
def _product_kernel(
    x,
    w,
    scale,
    token_scale,
    bias,
    y,
    M,
    N,
    C,
    BIAS: gl.constexpr,
    SCALE: gl.constexpr,
    TOKEN_SCALE: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr,
):
    i_n, i_s = gl.program_id(0) // SPLITS * BLOCK_N, gl.program_id(0) % SPLITS
    i_m = gl.program_id(1) * BLOCK_M
    first, count = share_of(gl.cdiv(C, BLOCK_C), i_s, SPLITS)
    b_y = streamed(x, w, i_n, i_m, first * BLOCK_C, count, STAGES)
    o_n = i_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, b_y.type.layout))
    o_m = i_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, b_y.type.layout))
    if SCALE:
        b_y *= gl.load(scale + o_n, mask=o_n < N, other=0.0)[:, None]
    if TOKEN_SCALE:
        b_y *= gl.load(token_scale + o_m, mask=o_m < M, other=0.0)[None, :]
    store_product(b_y, bias, y, i_n, i_m, i_s, M, N, BIAS)


@jit
def _gated_kernel(
    x,
    w,
    scale,
    token_scale,
    out,
    M,
    F,
    C,
    SCALE: gl.constexpr,
    TOKEN_SCALE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr,
):
    i_n, i_m = gl.program_id(0) * BLOCK_N, gl.program_id(1) * BLOCK_M
    b_y = streamed(x, w, i_n, i_m, 0, gl.cdiv(C, BLOCK_C), STAGES)
    o_r = gl.arange(0, 2 * BLOCK_N, gl.SliceLayout(1, b_y.type.layout))
    o_r = o_r // BLOCK_N * F + i_n + o_r % BLOCK_N  # rows of gate, then those of up
    o_t = i_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, b_y.type.layout))
    if SCALE:
        b_y *= gl.load(scale + o_r, mask=o_r < 2 * F, other=0.0)[:, None]
    if TOKEN_SCALE:
        b_y *= gl.load(token_scale + o_t, mask=o_t < M, other=0.0)[None, :]
    store_gated(b_y, out, i_n, i_m, M, F)


def applies(x: Tensor, w: Tensor) -> bool:
    """Whether these kernels multiply x [M, C] by weights w [N, C]: both are bf16, fp16 or fp8, and lie in a Hopper's memory
    where the bulk copy engine can read them."""
    return usable(x.device) and x.dtype == w.dtype and copyable(x) and w.is_contiguous() and copyable(w)


def tiling(M: int, N: int, C: int, dtype: torch.dtype) -> dict[str, int]:
    """What differs from `linear.triton.tiling` in the tile of `product`, for M rows, N output and C input channels.

    Timed on an H200 (torch 2.11, triton 3.6, 2026-11-30) as `scripts.benchmarks.tiles` does, ms of a forward in fp8, as
    (block_c, stages, splits). v2 at 8 rows: qkv (256, 2, 4) 2.280, (128, 5, 4) 2.279; out (512, 2, 3) 2.276, (512, 3, 2)
    2.299; down (256, 4, 4) 2.287, (512, 3, 2) 2.33. v2 at 32: qkv (256, 2, 4) 2.391, (256, 3, 4) 2.387, (256, 4, 3) 2.41;
    out and down (512, 3, 2) 2.38, others up to 2.46. LLaDA at 16 and 32 rows, and bf16 at 8 and 32, gain less than 1 %.
    """
    if dtype != FP8 or M > 32:
        return {}
    shape = None
    if 4096 < N <= 8192:
        shape = (256, 2, 4)
    elif N < 4096 and M <= 16:  # two splits leave many multiprocessors without a program
        shape = (256, 4, 4) if C > 2 * N else (512, 2, 3)
    return dict(zip(("block_c", "num_stages", "splits"), shape, strict=True)) if shape else {}


def gated_tiling(M: int, F: int, dtype: torch.dtype) -> dict[str, int]:
    """What differs from `silu_mul.triton.tiling` in the tile of `gated_product`, for M rows and F channels.

    Timed like the tiles of `tiling`, as (block_n, bytes of a weight's row, stages). v2 at 8 rows: fp8 (32, 256, 2) 2.308,
    (32, 256, 3) 2.333; bf16 (32, 256, 2) 3.760, (32, 256, 3) 3.802. v2 at 32: fp8 (32, 256, 3) 2.407, (32, 256, 2) 2.52.
    LLaDA at 16: fp8 (32, 256, 3) 2.622, (32, 256, 4) 2.679. LLaDA at 32: fp8 (32, 256, 3) 2.777, (32, 128, 6) 2.772; bf16
    (32, 256, 3) 4.298, (32, 128, 6) 4.340.
    """
    if M > 32:
        return {}
    return {"block_n": 32, "block_c": 256 // dtype.itemsize, "num_stages": 2 if M <= 16 and F > FEW_CHANNELS else 3}


def product(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    token_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    block_m: int,
    block_n: int,
    block_c: int,
    splits: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """`linear.triton.skinny` where `applies(x, w)`: x [M, C] times w [N, C] transposed, times scale [N] and token_scale [M],
    plus bias [N]: [splits, M, N], of `dtype` if there is one split and fp32 otherwise.

    w is read without waiting for the kernels that still run. None of them may write it: kernels of torch end before the next
    one begins, those of this package let it begin early (`pdl.py`)."""
    (M, C), N = x.shape, w.shape[0]
    y = torch.empty((splits, M, N), dtype=torch.float32 if splits > 1 else dtype or x.dtype, device=x.device)
    _product_kernel[(triton.cdiv(N, block_n) * splits, triton.cdiv(M, block_m))](
        described(x, (block_m, block_c)),
        described(w, (block_n, block_c)),
        y if scale is None else scale,
        y if token_scale is None else token_scale,
        y if bias is None else bias,
        y,
        M,
        N,
        C,
        BIAS=bias is not None,
        SCALE=scale is not None,
        TOKEN_SCALE=token_scale is not None,
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        STAGES=stages(num_stages, (block_n + block_m) * block_c * x.itemsize, x.device),
        num_warps=num_warps,
        **LAUNCH,
    )
    return y


def gated_product(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    token_scale: Tensor | None,
    dtype: torch.dtype,
    *,
    block_m: int,
    block_n: int,
    block_c: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """`silu_mul.triton.launch` where `applies(x, w)`: silu(first half) * second half of x [M, C] times w [2F, C] transposed,
    scaled by channel and token: [M, F]. w is read as `product` reads it."""
    (M, C), F = x.shape, w.shape[0] // 2
    out = torch.empty((M, F), dtype=dtype, device=x.device)
    _gated_kernel[(triton.cdiv(F, block_n), triton.cdiv(M, block_m))](
        described(x, (block_m, block_c)),
        described(w.view(2, F, C), (2, block_n, block_c)),
        out if scale is None else scale,
        out if token_scale is None else token_scale,
        out,
        M,
        F,
        C,
        SCALE=scale is not None,
        TOKEN_SCALE=token_scale is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        STAGES=stages(num_stages, (2 * block_n + block_m) * block_c * x.itemsize, x.device),
        num_warps=num_warps,
        **LAUNCH,
    )
    return out

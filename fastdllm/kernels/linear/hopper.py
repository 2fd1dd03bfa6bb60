# SPDX-License-Identifier: Apache-2.0
"""Products of few rows on Hopper, in Gluon: the weights are on their way before the kernel's turn.

A kernel starts while the one before it drains (`pdl.py`), and waits for it before it reads x. Weights are constant, so their
first tiles need not wait: each program asks the bulk copy engine for as many as its ring of tiles holds, and waits then. So
the memory is busy while kernels change. Triton orders the copies of a loop itself and begins them after the wait. That is
why the kernels here are written in Gluon, its language in which layouts, copies and barriers are written by hand.

The products are those of `skinny` in `linear/triton.py` and of `launch` in `silu_mul/triton.py`, bit by bit, but for int8,
whose sums are in another order. Those remain for other cards and for a Triton without Gluon.

Weights in int8 are read as words of two bytes and widened to bf16 in registers. A thread gets two neighbouring words at
once, and they go to different operands: the first of every two words to one, the second to the other. So x comes in that
order (`paired`) and is added up in it. A kernel that puts x in order is cheaper than moving bytes between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.device import stages
from fastdllm.kernels.gluon import ALIGNED, GLUON, copyable, described, jit, usable
from fastdllm.kernels.linear.reference import FP8
from fastdllm.kernels.pdl import LAUNCH
from fastdllm.kernels.pdl import wait as wait_in_triton

PAIRED = 256  # channels of x that `paired` puts in order: as many as two operands take

if GLUON:
    from fastdllm.kernels.gluon import gl, mbarrier, num_warps, tma, wait, warpgroup_mma, warpgroup_mma_wait

    _PAIRED, _HALF = gl.constexpr(PAIRED), gl.constexpr(PAIRED // 2)
    # Two words of int8 to two pairs in bf16. Below the exponent of 128 the low seven bits of a byte are a value, and its
    # eighth bit turns 128 into 256. The byte with its sign is the difference of the two.
    _WIDEN = gl.constexpr(
        "{ .reg .b32 a, b, c; prmt.b32 a, $2, 0x43434343, 0x4140; prmt.b32 b, $2, 0x43434343, 0x4342;"
        " and.b32 c, a, 0xff80ff80; and.b32 a, a, 0xff7fff7f; sub.rn.bf16x2 $0, a, c;"
        " and.b32 c, b, 0xff80ff80; and.b32 b, b, 0xff7fff7f; sub.rn.bf16x2 $1, b, c; }"
    )

FEW_CHANNELS = 2 * 132 * 64  # of gate: programs of 64 rows fit twice on each of an H100's multiprocessors


@jit
def fetch(x, tiles, ready, slot, i, c, more):
    """Rows i on, channels c on, to a slot of the ring, if there are `more`; ready[slot] counts the bytes that arrive."""
    if len(x.block_shape) == 3:  # of both halves
        tma.async_copy_global_to_shared(x, [0, i, c], ready.index(slot), tiles.index(slot), more)
    else:
        tma.async_copy_global_to_shared(x, [i, c], ready.index(slot), tiles.index(slot), more)


@jit
def multiplied(w_t, x_t, acc):
    """acc plus a tile w_t [ROWS, BLOCK_C] of weights, or of their words, times a tile x_t [BLOCK_M, BLOCK_C] of x."""
    if w_t.dtype == x_t.dtype:
        acc = warpgroup_mma(w_t, x_t.permute((1, 0)), acc)
    else:
        LEFT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
        BLOCK_C: gl.constexpr = x_t.shape[1]
        for c in gl.static_range(0, BLOCK_C, _PAIRED):
            b_w = w_t.slice(c // 2, _HALF, 1).load(LEFT)
            b_1, b_2 = gl.inline_asm_elementwise(
                _WIDEN, "=r,=r,r", [b_w], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
            )
            acc = warpgroup_mma(b_1, x_t.slice(c, _HALF, 1).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(b_2, x_t.slice(c + _HALF, _HALF, 1).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    return acc


@jit
def streamed(x, w, i_n, i_m, first, count, STAGES: gl.constexpr):
    """Rows i_n on of w times rows i_m on of x, over `count` tiles of channels from tile `first` on: [ROWS, BLOCK_M].

    x: a descriptor of x [M, C], in tiles [BLOCK_M, BLOCK_C].
    w: a descriptor of the weights [N, C], in tiles [ROWS, BLOCK_C]; or of [2, N / 2, C], in tiles [2, ROWS / 2, BLOCK_C].
        Of int8 it has words of two channels.
    """
    BLOCK_M: gl.constexpr = x.block_shape[0]
    X_C: gl.constexpr = x.block_shape[1]
    W_C: gl.constexpr = w.block_shape[len(w.block_shape) - 1]
    ROWS: gl.constexpr = w.block_type.numel // W_C
    BYTES: gl.constexpr = (ROWS * W_C * w.dtype.primitive_bitwidth + BLOCK_M * X_C * x.dtype.primitive_bitwidth) // 8
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[num_warps(), 1],
        instr_shape=[16, BLOCK_M, 256 // x.dtype.primitive_bitwidth],
    )
    # The compiler knows no star within a list.
    w_s = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_shape, w.layout)  # noqa: RUF005
    x_s = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_shape, x.layout)  # noqa: RUF005
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.expect(ready.index(s), BYTES, s < count)
        fetch(w, w_s, ready, s, i_n, (first + s) * W_C, s < count)
    wait()  # everything above reads weights only
    for s in gl.static_range(STAGES):
        fetch(x, x_s, ready, s, i_m, (first + s) * X_C, s < count)
    acc = gl.zeros((ROWS, BLOCK_M), gl.float32, LAYOUT)
    for i in range(count):
        slot = i % STAGES
        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
        # The weight is the left operand: its many rows fill the matrix unit.
        acc = multiplied(w_s.index(slot).reshape((ROWS, W_C)), x_s.index(slot), acc)
        more = i + STAGES < count
        mbarrier.expect(ready.index(slot), BYTES, more)
        fetch(w, w_s, ready, slot, i_n, (first + i + STAGES) * W_C, more)
        fetch(x, x_s, ready, slot, i_m, (first + i + STAGES) * X_C, more)
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
    b_y = streamed(x, w, i_n, i_m, first, count, STAGES)
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


@triton.jit
def _pair_kernel(x, y, C, stride_x, stride_y, PAIRED: tl.constexpr, BLOCK: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Where channel c of a unit goes: words of two channels, those at even places first.
    o_y = o_c // PAIRED * PAIRED + o_c // 2 % 2 * (PAIRED // 2) + o_c % PAIRED // 4 * 2 + o_c % 2
    wait_in_triton()
    tl.store(y + i_m * stride_y + o_y, tl.load(x + i_m * stride_x + o_c, mask=o_c < C, other=0.0), mask=o_c < stride_y)


def paired(x: Tensor) -> Tensor:
    """x [M, C], contiguous in its last dimension, filled up with zeros to [M, ceil(C / 256) * 256]. Of every 256 channels 0,
    1, 4, 5, 8, 9 and so on come first, then 2, 3, 6, 7, 10, 11."""
    M, C = x.shape
    y = torch.empty((M, triton.cdiv(C, PAIRED) * PAIRED), dtype=x.dtype, device=x.device)
    block = 4 * PAIRED
    _pair_kernel[(M, triton.cdiv(y.shape[1], block))](
        x, y, C, x.stride(0), y.shape[1], PAIRED=PAIRED, BLOCK=block, num_warps=4, **LAUNCH
    )
    return y


def operands(x: Tensor, w: Tensor, block_c: int) -> tuple[Tensor, Tensor, int, int]:
    """x and w as the kernels read them, and how many channels of x and elements of w a tile has."""
    if w.dtype != torch.int8:
        return x, w, block_c, block_c
    block_c = max(block_c, PAIRED)
    return paired(x), w.view(torch.int16), block_c, block_c // 2


def applies(x: Tensor, w: Tensor) -> bool:
    """Whether these kernels multiply x [M, C] by weights w [N, C]: both are bf16, fp16 or fp8, or w is int8 and x bf16. They
    lie in a Hopper's memory where the bulk copy engine can read them."""
    if not (usable(x.device) and copyable(x) and w.is_contiguous()):
        return False
    if w.dtype == torch.int8:
        return x.dtype == torch.bfloat16 and w.shape[1] % ALIGNED == 0 and copyable(w.view(torch.int16))
    return x.dtype == w.dtype and copyable(w)


def tiling(M: int, N: int, C: int, dtype: torch.dtype) -> dict[str, int]:
    """What differs from `linear.triton.tiling` in the tile of `product`, for M rows, N output and C input channels.

    Timed on an H200 (torch 2.11, triton 3.6, 2026-11-30) as `scripts.benchmarks.tiles` does, ms of a forward, as (block_c,
    stages, splits). fp8: v2 at 8 rows qkv (256, 2, 4) 2.280, (128, 5, 4) 2.279; out (512, 2, 3) 2.276, (512, 3, 2) 2.299;
    down (256, 4, 4) 2.287, (512, 3, 2) 2.33. v2 at 32: qkv (256, 2, 4) 2.391, (256, 3, 4) 2.387, (256, 4, 3) 2.41; out and
    down (512, 3, 2) 2.38, others up to 2.46. v2 at 64: qkv (256, 3, 2) 2.646, (256, 2, 2) 2.70. LLaDA at 64: qkv (256, 3, 1)
    3.09, (256, 3, 2) 3.18; down (256, 4, 2) 3.00, (512, 3, 2) 3.04. bf16, LLaDA at 64: out (256, 2, 2) 4.69, (256, 4, 2)
    4.77. For LLaDA at 16 and 32 rows, and in bf16 at 8 and 32, no other tile gained 1 %.

    int8, as (stages, splits) of 256 channels. LLaDA at 16 rows: qkv (3, 2) 2.97, (2, 2) 3.00; out (4, 4) 2.96, (3, 4) 2.97;
    down (4, 4) 2.84, (3, 4) 2.92. At 32: qkv (2, 2) 3.02, (3, 2) 3.29; out and down (3, 4) 3.01, (4, 4) 3.16. At 64: down
    (2, 4) 3.72, (3, 4) 3.92. v2 at 8: qkv (3, 4) 2.81, (4, 4) 2.86; down (4, 4) 2.52, (3, 4) 2.65. The head: 2 stages 3.60,
    4 stages 3.67 (in another order, before x was paired).
    """
    wide, narrow = 8192 < N <= 16384, N <= 4096
    if dtype == torch.int8:
        of_narrow, others = (4, 3) if M <= 16 else (3, 2) if M <= 32 else (2, 2)
        return {"block_c": PAIRED, "num_stages": of_narrow if narrow else others}
    if M <= 32:
        if dtype == FP8 and 4096 < N <= 8192:
            return {"block_c": 256, "num_stages": 2, "splits": 4}
        if dtype == FP8 and N < 4096 and M <= 16:  # two splits leave many multiprocessors without a program
            shape = (256, 4, 4) if C > 2 * N else (512, 2, 3)
            return dict(zip(("block_c", "num_stages", "splits"), shape, strict=True))
        return {}
    if dtype == FP8 and wide:
        return {"block_c": 256, "num_stages": 3, "splits": 1}
    if dtype == FP8 and not narrow and N <= 8192:
        return {"block_c": 256, "num_stages": 3, "splits": 2}
    if dtype == FP8 and narrow and C > 2 * N:
        return {"block_c": 256, "num_stages": 4, "splits": 2}
    if dtype != FP8 and narrow and C <= 2 * N:
        return {"block_c": 256, "num_stages": 2, "splits": 2}
    return {}


def gated_tiling(M: int, F: int, dtype: torch.dtype) -> dict[str, int]:
    """What differs from `silu_mul.triton.tiling` in the tile of `gated_product`, for M rows and F channels.

    Timed like the tiles of `tiling`, as (block_n, bytes of a weight's row, stages). v2 at 8 rows: fp8 (32, 256, 2) 2.308,
    (32, 256, 3) 2.333; bf16 (32, 256, 2) 3.760, (32, 256, 3) 3.802. v2 at 32: fp8 (32, 256, 3) 2.407, (32, 256, 2) 2.52.
    LLaDA at 16: fp8 (32, 256, 3) 2.622, (32, 256, 4) 2.679. LLaDA at 32: fp8 (32, 256, 3) 2.777, (32, 128, 6) 2.772; bf16
    (32, 256, 3) 4.298, (32, 128, 6) 4.340. LLaDA at 64: fp8 (32, 256, 2) 3.032, (64, 256, 2) 3.061, (64, 128, 4) 3.071; bf16
    (32, 256, 2) 4.614, (64, 256, 2) 4.674, (64, 128, 4) 4.697. int8: LLaDA at 16 (32, 256, 3) 2.92, (32, 256, 2) 2.98; at 32
    (32, 256, 2) 3.00, (32, 256, 3) 3.18; v2 at 8 (32, 256, 3) 2.65, (32, 256, 2) 2.80.
    """
    if dtype == torch.int8:
        return {"block_n": 32, "block_c": PAIRED, "num_stages": 3 if M <= 16 else 2}
    if M > 32:
        return {"block_n": 32, "block_c": 256 // dtype.itemsize, "num_stages": 2} if F <= FEW_CHANNELS else {}
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
    x, w, block_c, tile_c = operands(x, w, block_c)
    y = torch.empty((splits, M, N), dtype=torch.float32 if splits > 1 else dtype or x.dtype, device=x.device)
    _product_kernel[(triton.cdiv(N, block_n) * splits, triton.cdiv(M, block_m))](
        described(x, (block_m, block_c)),
        described(w, (block_n, tile_c)),
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
        STAGES=stages(num_stages, block_n * tile_c * w.itemsize + block_m * block_c * x.itemsize, x.device),
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
    x, w, block_c, tile_c = operands(x, w, block_c)
    out = torch.empty((M, F), dtype=dtype, device=x.device)
    _gated_kernel[(triton.cdiv(F, block_n), triton.cdiv(M, block_m))](
        described(x, (block_m, block_c)),
        described(w.view(2, F, -1), (2, block_n, tile_c)),
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
        STAGES=stages(num_stages, 2 * block_n * tile_c * w.itemsize + block_m * block_c * x.itemsize, x.device),
        num_warps=num_warps,
        **LAUNCH,
    )
    return out

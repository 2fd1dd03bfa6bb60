# SPDX-License-Identifier: Apache-2.0
"""Products of few rows with 4-bit weights on Hopper, in Gluon.

A group's zero is a whole number. A level less its zero is then exact in bf16, and one instruction subtracts it from two
levels. Channels come in units of 256 (`int4.py`), and the sum over half a unit is multiplied by the half's steps.
(`nibbles.py`, for other cards, does without the subtraction, and needs the sums of the activations for it.)

In Triton such a product waits most of its time: its programs take so many registers that few run at once, and each loads
steps and zeros for every unit. Here a program brings all of them to shared memory before the kernel's turn, as it does with
the first tiles of weights (`hopper.py`).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastdllm.kernels.device import stages
from fastdllm.kernels.gluon import GLUON, copyable, described, jit, usable
from fastdllm.kernels.linear.hopper import fetch, share_of, store_gated, store_product
from fastdllm.kernels.linear.int4 import HALF, PARTS, UNIT
from fastdllm.kernels.linear.nibbles import OF_WORD
from fastdllm.kernels.pdl import LAUNCH

if GLUON:
    from fastdllm.kernels.gluon import gl, mbarrier, num_warps, wait, warpgroup_mma, warpgroup_mma_wait

    _HALF, _UNIT, _WORDS = gl.constexpr(HALF), gl.constexpr(UNIT), gl.constexpr(UNIT // PARTS)
    _FIRST, _SECOND, _THIRD, _FOURTH = (gl.constexpr(code.replace(" }", " sub.rn.bf16x2 $0, $0, $2; }")) for code in OF_WORD)


MOST_HALVES = 64  # of a unit, whose steps a program holds


@jit
def _levels(b_w, zero, CODE: gl.constexpr):
    """Words b_w int16 [ROWS, 64] -> the levels of four of their bits less their rows' zeros, in bf16; zero: plus 128."""
    return gl.inline_asm_elementwise(CODE, "=&r,r,r", [b_w, zero[:, None]], dtype=gl.bfloat16, is_pure=True, pack=2)


@jit
def _half(b_y, b_p, step):
    """b_y plus the half of a unit whose levels gave b_p."""
    return b_y + step.to(gl.float32)[:, None] * b_p


@jit
def _streamed(
    x, w, scale, i_n, i_m, first, count, N, C, stride_g, stride_z,
    GROUP: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows i_n on of w times rows i_m on of x, over `count` units of channels from unit `first` on: [ROWS, BLOCK_M].

    x: a descriptor of x [M, C], in tiles [BLOCK_M, 256].
    w: a descriptor of the words [N, units * 64], in tiles [ROWS, 64]; or of [2, N / 2, ...], in tiles [2, ROWS / 2, 64].
    scale: [N, groups, 2], of which the rows lie side by side. HALVES: a power of two, no less than twice the units.
    """
    JOINT: gl.constexpr = len(w.block_shape) == 3
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps(), 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    LEFT_ROW: gl.constexpr = gl.SliceLayout(1, LEFT)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps(), 1], [1, 0])
    BYTES: gl.constexpr = ROWS * 2 * _WORDS + BLOCK_M * 2 * _UNIT
    w_s = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_shape, w.layout)  # noqa: RUF005
    x_s = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_shape, x.layout)  # noqa: RUF005
    step_s = gl.allocate_shared_memory(scale.dtype.element_ty, [HALVES, ROWS], PLAIN)
    zero_s = gl.allocate_shared_memory(gl.bfloat16, [HALVES, ROWS], PLAIN)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.expect(ready.index(s), BYTES, s < count)
        fetch(w, w_s, ready, s, i_n, (first + s) * _WORDS, s < count)
    o_h = 2 * first + gl.arange(0, HALVES, gl.SliceLayout(1, LOAD))
    o_r = gl.arange(0, ROWS, gl.SliceLayout(0, LOAD))
    m_r = i_n + o_r < N
    if JOINT:
        m_r = i_n + o_r % (ROWS // 2) < N // 2
        o_r = o_r // (ROWS // 2) * (N // 2) + o_r % (ROWS // 2)
    m_h = (o_h < 2 * (first + count)) & (o_h * _HALF < C)
    p_step = scale + (o_h * _HALF // GROUP)[:, None] * stride_g + (i_n + o_r)[None, :]
    step_s.store(gl.load(p_step, mask=m_h[:, None] & m_r[None, :], other=0.0))
    b_zero = gl.load(p_step + stride_z, mask=m_h[:, None] & m_r[None, :], other=0.0)
    zero_s.store((b_zero.to(gl.float32) + 128.0).to(gl.bfloat16))
    wait()  # everything above reads weights only
    for s in gl.static_range(STAGES):
        fetch(x, x_s, ready, s, i_m, (first + s) * _UNIT, s < count)
    # The same memory, of which a line can be indexed.
    step_s = step_s._reinterpret(scale.dtype.element_ty, [HALVES, ROWS], LINE)
    zero_s = zero_s._reinterpret(gl.bfloat16, [HALVES, ROWS], LINE)
    b_y = gl.zeros((ROWS, BLOCK_M), gl.float32, LAYOUT)
    none = gl.zeros((ROWS, BLOCK_M), gl.float32, LAYOUT)
    for i in range(count):
        slot = i % STAGES
        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
        b_w = w_s.index(slot).reshape((ROWS, _WORDS)).load(LEFT)
        x_t = x_s.index(slot)
        zero = zero_s.index(2 * i).load(LEFT_ROW)
        b_p = warpgroup_mma(
            _levels(b_w, zero, _FIRST), x_t.slice(0, _WORDS, 1).permute((1, 0)), none, use_acc=False, is_async=True
        )
        b_p = warpgroup_mma(_levels(b_w, zero, _SECOND), x_t.slice(_WORDS, _WORDS, 1).permute((1, 0)), b_p, is_async=True)
        # The second half is on its way before the first is added up.
        zero = zero_s.index(2 * i + 1).load(LEFT_ROW)
        b_q = warpgroup_mma(
            _levels(b_w, zero, _THIRD), x_t.slice(2 * _WORDS, _WORDS, 1).permute((1, 0)), none, use_acc=False, is_async=True
        )
        b_q = warpgroup_mma(
            _levels(b_w, zero, _FOURTH), x_t.slice(3 * _WORDS, _WORDS, 1).permute((1, 0)), b_q, is_async=True
        )
        b_p = warpgroup_mma_wait(num_outstanding=2, deps=(b_p,))
        b_y = _half(b_y, b_p, step_s.index(2 * i).load(ROW))
        b_q = warpgroup_mma_wait(num_outstanding=0, deps=(b_q,))
        more = i + STAGES < count
        mbarrier.expect(ready.index(slot), BYTES, more)
        fetch(w, w_s, ready, slot, i_n, (first + i + STAGES) * _WORDS, more)
        fetch(x, x_s, ready, slot, i_m, (first + i + STAGES) * _UNIT, more)
        b_y = _half(b_y, b_q, step_s.index(2 * i + 1).load(ROW))
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(s))
    return b_y


@jit
def _product_kernel(
    x,
    w,
    scale,
    bias,
    y,
    M,
    N,
    C,
    stride_g,
    stride_z,
    BIAS: gl.constexpr,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    i_n, i_s = gl.program_id(0) // SPLITS * BLOCK_N, gl.program_id(0) % SPLITS
    i_m = gl.program_id(1) * BLOCK_M
    first, count = share_of(gl.cdiv(C, _UNIT), i_s, SPLITS)
    b_y = _streamed(x, w, scale, i_n, i_m, first, count, N, C, stride_g, stride_z, GROUP, BLOCK_N, BLOCK_M, HALVES, STAGES)
    store_product(b_y, bias, y, i_n, i_m, i_s, M, N, BIAS)


@jit
def _gated_kernel(
    x,
    w,
    scale,
    out,
    M,
    F,
    C,
    stride_g,
    stride_z,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    i_n, i_m = gl.program_id(0) * BLOCK_N, gl.program_id(1) * BLOCK_M
    b_y = _streamed(
        x, w, scale, i_n, i_m, 0, gl.cdiv(C, _UNIT), 2 * F, C, stride_g, stride_z,
        GROUP, 2 * BLOCK_N, BLOCK_M, HALVES, STAGES,
    )  # fmt: skip
    store_gated(b_y, out, i_n, i_m, M, F)


def applies(x: Tensor, w: Tensor, scale: Tensor) -> bool:
    """Whether these kernels multiply x [M, C] by 4-bit weights w [N, ceil(C / 256) * 128]: x is bf16, and all lies in a
    Hopper's memory where the bulk copy engine can read it."""
    return (
        w.dtype == torch.uint8
        and x.dtype == torch.bfloat16
        and usable(x.device)
        and copyable(x)
        and w.is_contiguous()
        and copyable(w.view(torch.int16))
        and scale.dtype in (torch.bfloat16, torch.float16)  # of a checkpoint they may be fp16
        and scale.stride(0) == 1
    )


def gated_applies(x: Tensor, w: Tensor, scale: Tensor) -> bool:
    """`applies`, and a program can hold the steps of all channels."""
    return applies(x, w, scale) and 2 * triton.cdiv(x.shape[1], UNIT) <= MOST_HALVES


def tiling(M: int, N: int, C: int) -> dict[str, int]:
    """Tile of `product` for M rows, N output and C input channels.

    Timed on an H200 (torch 2.11, triton 3.6, 2026-11-30) in forwards, ms, as (splits, stages), one product after the other.
    LLaDA at 16 rows: qkv (2, 4) 2.20, (2, 2) 2.30; out (4, 2) 2.18, (4, 4) 2.18; down (4, 4) 2.18, (4, 3) 2.20. At 32: qkv
    (2, 2) 2.45, (2, 3) 2.62; out (4, 4) 2.46, (4, 2) 2.49; down (4, 4) and (4, 3) 2.46, (4, 2) 2.55. At 64: qkv (1, 2) 3.23,
    (2, 2) 3.24; out (2, 3) 3.18, (4, 2) 3.23; down (4, 2) 3.20, (2, 3) 3.28. v2 at 8 rows: qkv (4, 2) 1.92, (4, 3) 1.94; out
    (4, 4) 1.90, (4, 2) 1.93; down (4, 4) 1.90, (4, 3) 2.07. v2 at 32: qkv (3, 3) 2.19, (4, 3) 2.23; out (4, 4) 2.17, (2, 4)
    2.20; down (4, 4) 2.18, (2, 4) 2.28. Tiles of 128 rows of weights were no faster.
    """
    block_m = rows_of_tile(M)
    if N > 16384:
        splits, num_stages = 1, 2
    elif N > 8192:
        splits, num_stages = 2, 4 if block_m == 16 else 2
    elif N > 4096:
        splits, num_stages = (4, 2) if block_m == 16 else (3, 3)
    elif block_m < 64:
        splits, num_stages = 4, 4
    else:
        splits, num_stages = (4, 2) if C > 2 * N else (2, 3)
    splits = max(splits, triton.cdiv(2 * triton.cdiv(C, UNIT), MOST_HALVES))
    names = ("block_m", "block_n", "block_c", "splits", "num_warps", "num_stages")
    return dict(zip(names, (block_m, 64, UNIT, splits, 4, num_stages), strict=True))


def gated_tiling(M: int) -> dict[str, int]:
    """Tile of `gated_product` for M rows.

    Timed like the tiles of `tiling`, as (block_n, warps, stages). LLaDA at 16 rows: (32, 4, 4) 2.17, (32, 4, 3) 2.21,
    (32, 4, 2) 2.32; at 32: (32, 4, 2) 2.45, (32, 4, 3) 2.66; at 64: (32, 4, 2) 3.19, (32, 4, 3) 3.45, (64, 8, 3) 3.49. v2 at
    8: (32, 4, 4) 1.90, (32, 4, 2) 1.99, (64, 8, 3) 2.02; at 32: (32, 4, 2) 2.18, (64, 8, 3) 2.32.
    """
    block_m = rows_of_tile(M)
    names = ("block_m", "block_n", "block_c", "num_warps", "num_stages")
    return dict(zip(names, (block_m, 32, UNIT, 4, 4 if block_m == 16 else 2), strict=True))


def rows_of_tile(M: int) -> int:
    """Rows of x of a tile, of which the matrix unit takes no fewer than 16 here."""
    return min(64, max(16, triton.next_power_of_2(M)))


def product(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: int,
    *,
    block_m: int,
    block_n: int,
    block_c: int,
    splits: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """`linear.triton.skinny` of x [M, C] and words w int16 [N, units * 64] where `applies`: [splits, M, N], of x's dtype if
    there is one split and fp32 otherwise. group: channels that share a step, whose zeros are whole numbers."""
    (M, C), N = x.shape, w.shape[0]
    y = torch.empty((splits, M, N), dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    halves = triton.next_power_of_2(2 * triton.cdiv(triton.cdiv(C, UNIT), splits))
    _product_kernel[(triton.cdiv(N, block_n) * splits, triton.cdiv(M, block_m))](
        described(x, (block_m, block_c)),
        described(w, (block_n, block_c // PARTS)),
        scale,
        y if bias is None else bias,
        y,
        M,
        N,
        C,
        *scale.stride()[1:],
        BIAS=bias is not None,
        GROUP=group,
        HALVES=halves,
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages_of(num_stages, halves, block_n, block_m, x.device),
        num_warps=num_warps,
        **LAUNCH,
    )
    return y


def gated_product(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    group: int,
    *,
    block_m: int,
    block_n: int,
    block_c: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """`silu_mul.triton.launch` of x [M, C] and words w int16 [2F, units * 64] where `applies`: [M, F]."""
    (M, C), F = x.shape, w.shape[0] // 2
    out = torch.empty((M, F), dtype=x.dtype, device=x.device)
    halves = triton.next_power_of_2(2 * triton.cdiv(C, UNIT))
    _gated_kernel[(triton.cdiv(F, block_n), triton.cdiv(M, block_m))](
        described(x, (block_m, block_c)),
        described(w.view(2, F, -1), (2, block_n, block_c // PARTS)),
        scale,
        out,
        M,
        F,
        C,
        *scale.stride()[1:],
        GROUP=group,
        HALVES=halves,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages_of(num_stages, halves, 2 * block_n, block_m, x.device),
        num_warps=num_warps,
        **LAUNCH,
    )
    return out


def stages_of(wanted: int, halves: int, rows: int, block_m: int, device: torch.device) -> int:
    """Tiles on their way at a time, beside the steps and zeros."""
    tile, kept = rows * UNIT // 2 + block_m * UNIT * 2, halves * 4 * rows
    return stages(wanted, tile, device, kept)

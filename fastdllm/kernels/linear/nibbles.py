# SPDX-License-Identifier: Apache-2.0
"""Products of 4-bit weights, a unit of channels at a time: levels widened in registers, steps and zeros applied to the sums.

A unit is multiplied by halves, with bare levels. A half has one step s and one zero z. With t, the sum of its channels of x,
sum((level - z) * s * x) = s * (sum(level * x) - z * t), so neither touches a weight.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from fastdllm.kernels.dot import dot
from fastdllm.kernels.linear.int4 import HALF

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_HALF = tl.constexpr(HALF)


def _of_word(part: int) -> tl.constexpr:
    """Two words to the levels of their `part`-th four bits in bf16, plus 128: below the exponent of 128 a level's bits are
    its value, so that two instructions widen two weights. Written for one operand and one result: such code Triton moves
    behind the load from shared memory, which then brings words straight to where the matrix unit wants its left operand.
    """
    shift = f"shr.u32 t, $1, {4 * part};" if part else "mov.b32 t, $1;"
    return tl.constexpr("{ .reg .b32 t; " + shift + " lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }")


_FIRST, _SECOND, _THIRD, _FOURTH = (_of_word(part) for part in range(4))


@triton.jit
def _levels(b_w, CODE: tl.constexpr, SHIFT: tl.constexpr, PLUS: tl.constexpr, dtype: tl.constexpr):
    """Words b_w int16 [BLOCK_N, 64] -> the levels of four of their bits in `dtype`, plus 128 with PLUS."""
    if PLUS:
        return tl.inline_asm_elementwise(CODE, "=r,r", [b_w], dtype=tl.bfloat16, is_pure=True, pack=2)
    return ((b_w >> SHIFT) & 15).to(tl.float32 if _INTERPRETED else dtype)


@triton.jit
def _half(scale, sums, o_n, o_m, N, M, c, C, GROUP: tl.constexpr, stride_n, stride_g, stride_z):
    """Steps and zeros [BLOCK_N] of the half from channel c on of rows o_n, and the sums [BLOCK_M] of x there; 0 beyond C."""
    here = c < C
    p_step = scale + o_n.to(tl.int64) * stride_n + c // GROUP * stride_g
    b_step = tl.load(p_step, mask=(o_n < N) & here, other=0.0).to(tl.float32)
    b_zero = tl.load(p_step + stride_z, mask=(o_n < N) & here, other=0.0).to(tl.float32)
    return b_step, b_zero, tl.load(sums + c // _HALF * M + tl.minimum(o_m, M - 1), mask=here, other=0.0)


@triton.jit
def unit_product(
    b_y, b_w, x_0, x_1, x_2, x_3, scale, sums, o_n, o_m, N, M, c, C, GROUP: tl.constexpr, stride_n, stride_g, stride_z
):  # fmt: skip
    """b_y [BLOCK_N, BLOCK_M] plus the product of a unit from channel c on.

    b_w: int16 [BLOCK_N, 64], the unit's words of rows o_n. x_0 to x_3: [64, BLOCK_M], its quarters of rows o_m of x.
    scale: [N, groups, 2] with those strides. sums: fp32 [ceil(C / 128), M], of 128 channels of x each.
    """
    dtype: tl.constexpr = x_0.dtype
    PLUS: tl.constexpr = dtype == tl.bfloat16 and not _INTERPRETED
    MORE: tl.constexpr = 128.0 if PLUS else 0.0  # what the levels are too large by
    b_s, b_z, b_t = _half(scale, sums, o_n, o_m, N, M, c, C, GROUP, stride_n, stride_g, stride_z)
    b_p = tl.zeros(b_y.shape, dtype=tl.float32)
    b_p = dot(_levels(b_w, _FIRST, 0, PLUS, dtype), x_0, b_p)
    b_p = dot(_levels(b_w, _SECOND, 4, PLUS, dtype), x_1, b_p)
    b_y += b_s[:, None] * (b_p - (b_z + MORE)[:, None] * b_t[None, :])
    b_s, b_z, b_t = _half(scale, sums, o_n, o_m, N, M, c + _HALF, C, GROUP, stride_n, stride_g, stride_z)
    b_p = tl.zeros(b_y.shape, dtype=tl.float32)
    b_p = dot(_levels(b_w, _THIRD, 8, PLUS, dtype), x_2, b_p)
    b_p = dot(_levels(b_w, _FOURTH, 12, PLUS, dtype), x_3, b_p)
    b_y += b_s[:, None] * (b_p - (b_z + MORE)[:, None] * b_t[None, :])
    return b_y

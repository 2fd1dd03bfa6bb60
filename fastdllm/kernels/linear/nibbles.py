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


def _of_word(part: int) -> str:
    """Two words to the levels of their `part`-th four bits in bf16, plus 128: below the exponent of 128 a level's bits are
    its value, so that two instructions widen two weights. Written for one operand and one result: such code Triton moves
    behind the load from shared memory, which then brings words straight to where the matrix unit wants its left operand.
    """
    shift = f"shr.u32 t, $1, {4 * part};" if part else "mov.b32 t, $1;"
    return "{ .reg .b32 t; " + shift + " lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }"


OF_WORD = tuple(_of_word(part) for part in range(4))
_FIRST, _SECOND, _THIRD, _FOURTH = (tl.constexpr(code) for code in OF_WORD)


@triton.jit
def _levels(b_w, CODE: tl.constexpr, SHIFT: tl.constexpr, PLUS: tl.constexpr, dtype: tl.constexpr):
    """Words b_w int16 [BLOCK_N, 64] -> the levels of four of their bits in `dtype`, plus 128 with PLUS."""
    if PLUS:
        return tl.inline_asm_elementwise(CODE, "=r,r", [b_w], dtype=tl.bfloat16, is_pure=True, pack=2)
    return ((b_w >> SHIFT) & 15).to(tl.float32 if _INTERPRETED else dtype)


@triton.jit
def unit_steps(scale, o_n, N, c, C, GROUP: tl.constexpr, stride_n, stride_g, stride_z):
    """Steps and zeros [BLOCK_N] of rows o_n in the first and the second half of the unit from channel c on; 0 beyond C.

    scale: [N, groups, 2] with those strides.
    """
    p_row = scale + o_n.to(tl.int64) * stride_n
    p_1, p_2 = p_row + c // GROUP * stride_g, p_row + (c + _HALF) // GROUP * stride_g
    m_1, m_2 = (o_n < N) & (c < C), (o_n < N) & (c + _HALF < C)
    s_1, z_1 = tl.load(p_1, mask=m_1, other=0.0), tl.load(p_1 + stride_z, mask=m_1, other=0.0)
    s_2, z_2 = tl.load(p_2, mask=m_2, other=0.0), tl.load(p_2 + stride_z, mask=m_2, other=0.0)
    return s_1, z_1, s_2, z_2


@triton.jit
def unit_sums(sums, o_m, M, c, C):
    """Sums [BLOCK_M] of rows o_m of x in both halves of the unit from channel c on; 0 beyond C.

    sums: fp32 [ceil(C / 128), M], of 128 channels of x each.
    """
    p_t = sums + c // _HALF * M + tl.minimum(o_m, M - 1)
    return tl.load(p_t, mask=c < C, other=0.0), tl.load(p_t + M, mask=c + _HALF < C, other=0.0)


@triton.jit
def unit_product(b_y, b_w, x_1, x_2, x_3, x_4, s_1, z_1, s_2, z_2, t_1, t_2):
    """b_y [BLOCK_N, BLOCK_M] plus the product of a unit.

    b_w: int16 [BLOCK_N, 64], the unit's words. x_1 to x_4: [64, BLOCK_M], its quarters of rows of x. The rest: `unit_steps`
    and `unit_sums`.
    """
    dtype: tl.constexpr = x_1.dtype
    PLUS: tl.constexpr = dtype == tl.bfloat16 and not _INTERPRETED
    MORE: tl.constexpr = 128.0 if PLUS else 0.0  # what the levels are too large by
    b_p = tl.zeros(b_y.shape, dtype=tl.float32)
    b_p = dot(_levels(b_w, _FIRST, 0, PLUS, dtype), x_1, b_p)
    b_p = dot(_levels(b_w, _SECOND, 4, PLUS, dtype), x_2, b_p)
    b_y += s_1.to(tl.float32)[:, None] * (b_p - (z_1.to(tl.float32) + MORE)[:, None] * t_1[None, :])
    b_p = tl.zeros(b_y.shape, dtype=tl.float32)
    b_p = dot(_levels(b_w, _THIRD, 8, PLUS, dtype), x_3, b_p)
    b_p = dot(_levels(b_w, _FOURTH, 12, PLUS, dtype), x_4, b_p)
    b_y += s_2.to(tl.float32)[:, None] * (b_p - (z_2.to(tl.float32) + MORE)[:, None] * t_2[None, :])
    return b_y

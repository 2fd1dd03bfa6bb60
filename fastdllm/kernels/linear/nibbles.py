# SPDX-License-Identifier: Apache-2.0
"""Tiles of 4-bit weights in registers: from bytes to the two halves of a tile, ready to be multiplied."""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Four bytes to four low and four high levels in bf16. A level's bits below the exponent of 128 are the number 128 + level;
# less (128 + zero), exact in bf16, and times the step that takes one instruction a level, where a conversion of integers
# takes four. Operands: the bytes; -(128 + zero) and step of the low half, then of the high half, two of each a register.
_WIDEN = tl.constexpr("""
{
.reg .b32 a, b, c, d, one, null;
mov.b32 one, 0x3f803f80;
mov.b32 null, 0x80008000;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.u32 c, a, 4;
shr.u32 d, b, 4;
lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
lop3.b32 c, c, 0x000f000f, 0x43004300, 0xea;
lop3.b32 d, d, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 a, a, one, $5;
fma.rn.bf16x2 b, b, one, $6;
fma.rn.bf16x2 c, c, one, $9;
fma.rn.bf16x2 d, d, one, $10;
fma.rn.bf16x2 $0, a, $7, null;
fma.rn.bf16x2 $1, b, $8, null;
fma.rn.bf16x2 $2, c, $11, null;
fma.rn.bf16x2 $3, d, $12, null;
}
""")


@triton.jit
def load_steps(scale, o_n, N, c, C, GROUP: tl.constexpr, UNIT: tl.constexpr):
    """Steps and zeros, fp32 [BLOCK_N] each, of rows o_n of scale [N, groups, 2]: of the group of channel c, and of that half
    a unit on. 0 beyond the rows and channels."""
    p_low = scale + (o_n.to(tl.int64) * tl.cdiv(C, GROUP) + c // GROUP) * 2
    p_high = scale + (o_n.to(tl.int64) * tl.cdiv(C, GROUP) + (c + UNIT // 2) // GROUP) * 2
    m_low, m_high = (o_n < N) & (c < C), (o_n < N) & (c + UNIT // 2 < C)
    low_step, low_zero = tl.load(p_low, mask=m_low, other=0.0), tl.load(p_low + 1, mask=m_low, other=0.0)
    high_step, high_zero = tl.load(p_high, mask=m_high, other=0.0), tl.load(p_high + 1, mask=m_high, other=0.0)
    return low_step.to(tl.float32), low_zero.to(tl.float32), high_step.to(tl.float32), high_zero.to(tl.float32)


@triton.jit
def widen_bytes(b_w, low_step, low_zero, high_step, high_zero, dtype: tl.constexpr):
    """Bytes b_w [BLOCK_N, CHANNELS] as two tiles of weights of `dtype`, (level - zero) * step; steps and zeros [BLOCK_N]."""
    if dtype == tl.bfloat16 and not _INTERPRETED:
        low_bias, low_step = (-128.0 - low_zero).to(tl.bfloat16), low_step.to(tl.bfloat16)
        high_bias, high_step = (-128.0 - high_zero).to(tl.bfloat16), high_step.to(tl.bfloat16)
        return tl.inline_asm_elementwise(
            _WIDEN,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [b_w, low_bias[:, None], low_step[:, None], high_bias[:, None], high_step[:, None]],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        b_low = ((b_w & 15).to(tl.float32) - low_zero[:, None]) * low_step[:, None]
        b_high = ((b_w >> 4).to(tl.float32) - high_zero[:, None]) * high_step[:, None]
        return b_low.to(dtype), b_high.to(dtype)

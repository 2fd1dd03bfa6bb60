# SPDX-License-Identifier: Apache-2.0
"""SwiGLU's activation in one read and one write."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.overlap import LAUNCH, begin

BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up, out, F, BLOCK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < F
    begin()
    b_gate = tl.load(gate_up + i_n * 2 * F + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_up = tl.load(gate_up + i_n * 2 * F + F + o_f, mask=m_f, other=0.0).to(tl.float32)
    # Rounded before the product, as two separate torch operations do.
    b_act = (b_gate * tl.sigmoid(b_gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + i_n * F + o_f, b_act * b_up, mask=m_f)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `fastdllm.kernels.silu_mul`."""
    gate_up = gate_up.contiguous()
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], F))
    grid = (out.numel() // F, triton.cdiv(F, BLOCK))
    _silu_mul_kernel[grid](gate_up, out, F, BLOCK=BLOCK, num_warps=4, **LAUNCH)
    return out

# SPDX-License-Identifier: Apache-2.0
"""Quantised linear layers on a GPU.

A few rows (a block of a few sequences) are bound by reading the weight: one kernel streams it, widens it in
registers and multiplies it with x as it is. Many rows are bound by arithmetic: fp8 then goes through cuBLAS's
row-wise scaled product with x quantised per token; int8 uses the streaming kernel with wide tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.dot import dot
from fastdllm.kernels.linear.reference import FP8, FP8_MAX, WIDE_ROWS


@triton.jit
def _stream_kernel(
    x,
    w,
    scale,
    bias,
    y,
    M,
    N,
    C,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n, m_m = o_n < N, o_m < M
    p_w = w + o_n.to(tl.int64)[:, None] * C
    p_x = x + o_m.to(tl.int64)[None, :] * C
    # The weight is the left operand: its many rows fill the matrix unit, and it is widened on the way from registers.
    b_y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        if EVEN:
            b_w = tl.load(p_w + o_c[None, :], mask=m_n[:, None], other=0.0)
            b_x = tl.load(p_x + o_c[:, None], mask=m_m[None, :], other=0.0)
        else:
            b_w = tl.load(p_w + o_c[None, :], mask=m_n[:, None] & (o_c < C)[None, :], other=0.0)
            b_x = tl.load(p_x + o_c[:, None], mask=m_m[None, :] & (o_c < C)[:, None], other=0.0)
        b_y = dot(b_w, b_x, b_y)
    if SCALE:
        b_y *= tl.load(scale + o_n, mask=m_n, other=0.0)[:, None]
    if BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    p_y = y + o_m.to(tl.int64)[None, :] * N + o_n[:, None]
    tl.store(p_y, b_y, mask=m_n[:, None] & m_m[None, :])


@triton.jit
def _quantize_kernel(x, xq, scale, C, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    b_x = tl.load(x + i_m * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_scale = tl.div_rn(tl.maximum(tl.max(tl.abs(b_x), 0), 1e-12), LARGEST)
    b_q = tl.clamp(tl.div_rn(b_x, b_scale), -LARGEST, LARGEST)
    tl.store(xq + i_m * C + o_c, b_q.to(xq.dtype.element_ty), mask=o_c < C)
    tl.store(scale + i_m, b_scale)


def linear(x: Tensor, wq: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `fastdllm.kernels.linear`."""
    rows = x.reshape(-1, x.shape[-1])
    if wq.dtype == FP8 and len(rows) >= WIDE_ROWS:
        y = wide_fp8(rows, wq, scale, bias)
    else:
        y = stream(rows, wq, scale, bias, **tiling(len(rows), wq.shape[0]))
    return y.view(*x.shape[:-1], -1)


def tiling(M: int, N: int) -> dict[str, int]:
    """Tile shape of the streaming kernel for M rows and N output channels."""
    block_m = min(128, max(16, triton.next_power_of_2(M)))
    if block_m == 128:
        return {"block_m": 128, "block_n": 128, "block_c": 64, "num_warps": 8, "num_stages": 3}
    return {"block_m": block_m, "block_n": 64 if N >= 8192 else 32, "block_c": 128, "num_warps": 4, "num_stages": 4}


def stream(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    block_m: int,
    block_n: int,
    block_c: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """x [M, C] times w [N, C] transposed, w widened to x's dtype on the way, times scale [N], plus bias [N]."""
    (M, C), N = x.shape, w.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    _stream_kernel[(triton.cdiv(N, block_n), triton.cdiv(M, block_m))](
        x.contiguous(),
        w,
        y if scale is None else scale,
        y if bias is None else bias,
        y,
        M,
        N,
        C,
        BIAS=bias is not None,
        SCALE=scale is not None,
        EVEN=C % block_c == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return y


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, C] to fp8 with one scale a row: (xq [M, C], scale [M] fp32)."""
    M, C = x.shape
    xq = torch.empty((M, C), dtype=FP8, device=x.device)
    scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    _quantize_kernel[(M,)](x.contiguous(), xq, scale, C, LARGEST=FP8_MAX, BLOCK=triton.next_power_of_2(C), num_warps=8)
    return xq, scale


def wide_fp8(x: Tensor, wq: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, C], quantised per token, times wq [N, C] transposed in fp8. cuBLAS's row-wise product writes bf16."""
    xq, token_scale = quantize_rows(x)
    y = torch._scaled_mm(
        xq,
        wq.t(),
        scale_a=token_scale.unsqueeze(1),
        scale_b=scale.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return (y if bias is None else y + bias).to(x.dtype)

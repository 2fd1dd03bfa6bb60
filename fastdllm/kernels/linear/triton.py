# SPDX-License-Identifier: Apache-2.0
"""Linear layers on a GPU.

A few rows (a block of one or two sequences) are bound by reading the weight: one kernel streams it through the left operand
of the matrix unit, widening int8 in registers. Many rows are bound by arithmetic and belong to cuBLAS; so does fp8 at any
width, with x quantised per token.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.dot import dot
from fastdllm.kernels.linear.reference import FP8, FP8_MAX
from fastdllm.kernels.overlap import LAUNCH, begin

# Most rows of the streaming kernel, with weights in 16 bits and in int8; more go to cuBLAS (int8 as a widened copy).
STREAM_ROWS = (64, 256)


@triton.jit
def _stream_kernel(
    x,
    w,
    scale,
    token_scale,
    bias,
    y,
    M,
    N,
    C,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    TOKEN_SCALE: tl.constexpr,
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
    begin()
    # The weight is the left operand: its many rows fill the matrix unit, and it can be widened in registers.
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
    if TOKEN_SCALE:
        b_y *= tl.load(token_scale + o_m, mask=m_m, other=0.0)[None, :]
    if BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    p_y = y + o_m.to(tl.int64)[None, :] * N + o_n[:, None]
    tl.store(p_y, b_y, mask=m_n[:, None] & m_m[None, :])


@triton.jit
def _quantize_kernel(x, xq, scale, C, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    begin()
    b_x = tl.load(x + i_m * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_scale = tl.div_rn(tl.maximum(tl.max(tl.abs(b_x), 0), 1e-12), LARGEST)
    b_q = tl.clamp(tl.div_rn(b_x, b_scale), -LARGEST, LARGEST)
    tl.store(xq + i_m * C + o_c, b_q.to(xq.dtype.element_ty), mask=o_c < C)
    tl.store(scale + i_m, b_scale)


def linear(x: Tensor, wq: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """See `fastdllm.kernels.linear`."""
    rows = x.reshape(-1, x.shape[-1])
    count, (N, C) = len(rows), wq.shape
    if wq.dtype == FP8:
        xq, token_scale = quantize_rows(rows)
        # The library's row-wise product writes bf16 only, and wants multiples of 16.
        library = x.is_cuda and x.dtype == torch.bfloat16 and N % 16 == 0 and C % 16 == 0
        product = scaled_mm if library else partial(stream, dtype=x.dtype, **tiling(count, N, wq.itemsize))
        y = product(xq, wq, scale, bias, token_scale)
    elif x.itemsize == 2 and count <= STREAM_ROWS[wq.dtype == torch.int8]:
        y = stream(rows, wq, scale, bias, **tiling(count, N, wq.itemsize))
    elif scale is None:
        y = F.linear(rows, wq, bias)
    else:
        y = F.linear(rows, wq.to(x.dtype)).mul_(scale)
        y = y if bias is None else y.add_(bias)
    return y.view(*x.shape[:-1], -1)


def tiling(M: int, N: int, itemsize: int) -> dict[str, int]:
    """Tile shape of the streaming kernel for M rows and N output channels, weights of `itemsize` bytes.

    Measured on an H100 (torch 2.11, triton 3.6, 2026-11-24) in us, cuBLAS bf16 / this in bf16 / this in int8: at 32 rows of
    LLaDA, qkv 40.6 / 37.2 / 25.3, out 14.8 / 14.7 / 14.7, gate_up 74.8 / 71.1 / 47.0, down 40.5 / 38.6 / 38.4; of Dream,
    15.0 / 15.0 / 19.6, 12.0 / 12.3 / 12.8, 100.4 / 95.9 / 60.5, 53.7 / 52.4 / 56.7. Narrow outputs need narrow tiles to
    occupy the device. At 64 rows LLaDA's gate_up takes 76.2 / 73.9 / 54.2, at 128 and 256 rows 78.4 and 84.1 / - / 68.2
    and 133.8.
    """
    block_m = min(128, max(16, triton.next_power_of_2(M)))
    if block_m == 128:
        shape = (64, 128, 4, 3)
    elif block_m == 64:
        shape = (32, 256, 4, 4) if N <= 8192 else (64, 128, 4, 4)
    elif N <= 4224:
        shape = (16, 256, 4, 5)
    elif itemsize == 1:
        shape = (32, 256, 4, 4)
    elif N <= 8192:
        shape = (64, 256, 4, 3)
    else:
        shape = (128, 128, 4, 3) if N <= 16384 else (64, 128, 4, 4)
    return dict(zip(("block_n", "block_c", "num_warps", "num_stages"), shape, strict=True)) | {"block_m": block_m}


def stream(
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
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """x [M, C] times w [N, C] transposed, w widened to x's dtype on the way, times scale [N] and token_scale [M], plus bias
    [N]; written as `dtype`."""
    (M, C), N = x.shape, w.shape[0]
    y = torch.empty((M, N), dtype=dtype or x.dtype, device=x.device)
    _stream_kernel[(triton.cdiv(N, block_n), triton.cdiv(M, block_m))](
        x.contiguous(),
        w,
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
        EVEN=C % block_c == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=num_warps,
        num_stages=num_stages,
        **LAUNCH,
    )
    return y


def scaled_mm(xq: Tensor, wq: Tensor, scale: Tensor, bias: Tensor | None, token_scale: Tensor) -> Tensor:
    """The library's fp8 product of xq [M, C] and wq [N, C] transposed, scaled by row and channel; bf16."""
    y = torch._scaled_mm(
        xq,
        wq.t(),
        scale_a=token_scale.unsqueeze(1),
        scale_b=scale.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y if bias is None else y.add_(bias)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, C] to fp8 with one scale a row: (xq [M, C], scale [M] fp32)."""
    M, C = x.shape
    xq = torch.empty((M, C), dtype=FP8, device=x.device)
    scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    _quantize_kernel[(M,)](
        x.contiguous(), xq, scale, C, LARGEST=FP8_MAX, BLOCK=triton.next_power_of_2(C), num_warps=8, **LAUNCH
    )
    return xq, scale

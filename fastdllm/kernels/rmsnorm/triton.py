# SPDX-License-Identifier: Apache-2.0
"""RMS norm in one read of each row: one program a row, the row in registers.

After a product over few positions the same kernel adds up the product's partial sums, so that many programs can share the
reading of a narrow weight without another launch. Before an fp8 product it also quantises the row that it holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.linear.reference import FP8, FP8_MAX, Activations, Quantized
from fastdllm.kernels.linear.triton import scale_of, split_k_partials
from fastdllm.kernels.pdl import LAUNCH, wait


@triton.jit
def _rmsnorm_kernel(
    x,
    residual,
    weight,
    y,
    h,
    scale,
    eps,
    rows,
    C,
    PARTS: tl.constexpr,
    ADD: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0)
    wait()
    b_x = tl.load(x + i_n * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        b_x += tl.load(x + (part * rows + i_n) * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    if ADD:
        b_x += tl.load(residual + i_n * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        # The sum is rounded before its statistics are taken: h, not more than h, is what the next layer sees.
        b_x = b_x.to(h.dtype.element_ty).to(tl.float32)
        tl.store(h + i_n * C + o_c, b_x, mask=m_c)
    b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / C + eps)
    b_y = b_y.to(h.dtype.element_ty).to(tl.float32) * b_w.to(tl.float32)
    if LARGEST is not None:
        b_y = b_y.to(h.dtype.element_ty).to(tl.float32)  # as another kernel would read it
        b_scale, b_inverse = scale_of(tl.max(tl.abs(b_y), 0), LARGEST)
        b_y = tl.clamp(b_y * b_inverse, -LARGEST, LARGEST)
        tl.store(scale + i_n, b_scale)
    tl.store(y + i_n * C + o_c, b_y.to(y.dtype.element_ty), mask=m_c)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `fastdllm.kernels.rmsnorm.reference.rmsnorm`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    h = x if residual is None else torch.empty_like(x)
    _launch(x[None], weight, eps, residual, y, h)
    return y, h


def linear_rmsnorm(
    x: Activations,
    weight: Tensor,
    norm: Tensor,
    eps: float,
    residual: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastdllm.kernels.rmsnorm.reference.linear_rmsnorm`."""
    y, h = torch.empty_like(residual), torch.empty_like(residual)
    _launch(split_k_partials(x, weight, scale, bias), norm, eps, residual, y, h)
    return y, h


def linear_rmsnorm_fp8(
    x: Activations,
    weight: Tensor,
    norm: Tensor,
    eps: float,
    residual: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Quantized, Tensor]:
    """See `fastdllm.kernels.rmsnorm.reference.linear_rmsnorm_fp8`."""
    y, h = torch.empty_like(residual, dtype=FP8), torch.empty_like(residual)
    of_token = torch.empty(residual.shape[:-1], dtype=torch.float32, device=residual.device)
    _launch(split_k_partials(x, weight, scale, bias), norm, eps, residual, y, h, of_token)
    return Quantized(y, of_token, residual.dtype), h


def _launch(
    parts: Tensor, weight: Tensor, eps: float, residual: Tensor | None, y: Tensor, h: Tensor, scale: Tensor | None = None
) -> None:
    """Normalise the sum of parts [S, ..., C] and residual into y, and write that sum to h where there is a residual. With
    `scale`, y is fp8, and the tokens' scales go there."""
    C = y.shape[-1]
    rows, block = y.numel() // C, triton.next_power_of_2(C)
    _rmsnorm_kernel[(rows,)](
        parts,
        y if residual is None else residual.contiguous(),
        weight,
        y,
        h,
        h if scale is None else scale,
        eps,
        rows,
        C,
        PARTS=len(parts),
        ADD=residual is not None,
        LARGEST=None if scale is None else FP8_MAX,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
        **LAUNCH,
    )

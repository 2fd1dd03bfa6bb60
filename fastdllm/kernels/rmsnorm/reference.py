# SPDX-License-Identifier: Apache-2.0
"""RMS norm in plain torch: what every faster version must compute."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdllm.kernels.linear.reference import Activations, Quantized, linear, quantize_tokens


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., C], plus `residual` [..., C] if given, over its root mean square. Returns (y, h) with h = x + residual.

    Statistics in fp32; the result is cast back to x.dtype before the product with weight [C], as transformers does.
    """
    h = x if residual is None else x + residual
    h32 = h.float()
    normalised = h32 * torch.rsqrt(h32.pow(2).mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight, h


def linear_rmsnorm(
    x: Activations,
    weight: Tensor,
    norm: Tensor,
    eps: float,
    residual: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rmsnorm` of `linear(x, weight, scale, bias)` plus `residual` [..., N], weight `norm` [N]: (y, h), [..., N] each."""
    return rmsnorm(linear(x, weight, scale, bias), norm, eps, residual)


def linear_rmsnorm_fp8(
    x: Activations,
    weight: Tensor,
    norm: Tensor,
    eps: float,
    residual: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Quantized, Tensor]:
    """`linear_rmsnorm`, its y in fp8 for the product that reads it."""
    y, h = linear_rmsnorm(x, weight, norm, eps, residual, scale, bias)
    return quantize_tokens(y), h

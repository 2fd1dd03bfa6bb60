# SPDX-License-Identifier: Apache-2.0
"""RMS norm in plain torch: what every faster version must compute."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdllm.kernels.linear.reference import linear


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `fastdllm.kernels.rmsnorm`."""
    h = x if residual is None else x + residual
    h32 = h.float()
    normalised = h32 * torch.rsqrt(h32.pow(2).mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight, h


def linear_rmsnorm(
    x: Tensor,
    wq: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastdllm.kernels.linear_rmsnorm`."""
    return rmsnorm(linear(x, wq, scale, bias), weight, eps, residual)

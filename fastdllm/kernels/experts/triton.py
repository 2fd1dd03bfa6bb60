# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts on a GPU: for few positions the kernels of a dense feed-forward, over all experts side by side."""

from __future__ import annotations

from torch import Tensor

from fastdllm.kernels.experts.reference import FEW, mixed, weighted
from fastdllm.kernels.linear.triton import linear
from fastdllm.kernels.rmsnorm.triton import linear_rmsnorm, rmsnorm
from fastdllm.kernels.silu_mul.triton import linear_silu_mul


def experts_rmsnorm(
    x: Tensor,
    chosen: Tensor,
    share: Tensor,
    gate_up: Tensor,
    down: Tensor,
    count: int,
    inner: int,
    norm: Tensor,
    eps: float,
    residual: Tensor,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastdllm.kernels.experts.reference.experts_rmsnorm`."""
    if x.shape[0] * x.shape[1] > FEW:
        y = mixed(
            x, chosen, share, gate_up, down, count, inner, gate_up_scale, down_scale, first=linear_silu_mul, second=linear
        )
        return rmsnorm(y, norm, eps, residual)
    act = linear_silu_mul(x.flatten(0, 1), gate_up, gate_up_scale)
    act = weighted(act, chosen.flatten(0, 1), share.flatten(0, 1), count, inner)
    return linear_rmsnorm(act, down, norm, eps, residual, down_scale)

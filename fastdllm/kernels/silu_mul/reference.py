# SPDX-License-Identifier: Apache-2.0
"""SwiGLU's activation in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdllm.kernels.linear.reference import linear


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `fastdllm.kernels.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_silu_mul(x: Tensor, wq: Tensor, scale: Tensor | None = None) -> Tensor:
    """See `fastdllm.kernels.linear_silu_mul`."""
    return silu_mul(linear(x, wq, scale))

# SPDX-License-Identifier: Apache-2.0
"""SwiGLU's activation in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdllm.kernels.linear.reference import linear


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [..., 2F], the gates first: [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_silu_mul(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """SwiGLU: `silu_mul` of `linear(x, weight, scale)` with weight [2F, C]; returns [..., F]."""
    return silu_mul(linear(x, weight, scale))

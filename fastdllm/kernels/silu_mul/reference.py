# SPDX-License-Identifier: Apache-2.0
"""SwiGLU's activation in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdllm.kernels.linear.reference import Activations, Quantized, linear, quantize_tokens


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [..., 2F], the gates first: [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_silu_mul(x: Activations, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """SwiGLU: `silu_mul` of `linear(x, weight, scale)` with weight [2F, C]; returns [..., F]."""
    return silu_mul(linear(x, weight, scale))


def linear_silu_mul_fp8(x: Activations, weight: Tensor, scale: Tensor | None = None) -> Quantized:
    """`linear_silu_mul` in fp8, for the product that reads it."""
    return quantize_tokens(linear_silu_mul(x, weight, scale))

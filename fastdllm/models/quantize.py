# SPDX-License-Identifier: Apache-2.0
"""Quantised projections: fp8 for Hopper and later, int8 weights for older cards.

A block step at batch 1 is bound by reading the weights, so halving their bytes is worth up to a factor of two. Every output
channel keeps its own scale. Norms, the embedding and a tied head stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdllm import kernels

KINDS = ("fp8", "int8")


class QuantLinear(nn.Module):
    """A linear layer whose weight [N, C] is stored in 8 bits with one fp32 scale per row."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        weight, scale = kernels.quantize_weight(linear.weight.data, kind)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.scale, self.bias)


def quantize(network: nn.Module, kind: str) -> None:
    """Replace the projections of every layer, and an untied head, in place and one at a time.

    Raises ValueError for an unknown kind, or for fp8 on a card before Hopper (compute capability 9.0).
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r} is unknown; allowed are {', '.join(KINDS)}")
    device = next(network.parameters()).device
    if kind == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise ValueError("quantize='fp8' needs compute capability 9.0 (Hopper) or later; use quantize='int8'")
    for name, module in list(network.named_modules()):
        tied = name == "head" and network.spec.tied_head
        if isinstance(module, nn.Linear) and not tied:
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, QuantLinear(module, kind))

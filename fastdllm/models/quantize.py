# SPDX-License-Identifier: Apache-2.0
"""Quantised projections: fp8 for Hopper and later, int8 weights for accuracy and older cards, int4 for small memories.

A block step at batch 1 is bound by reading the weights, so halving their bytes is worth up to a factor of two. In 8 bits
every output channel keeps its own scale, in 4 every group of 128 input channels a step and a zero; a head takes 8 bits then,
because it decides between tokens that are near each other. Norms, the embedding and a tied head stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from fastdllm import kernels

KINDS = ("fp8", "int8", "int4")


def quantize(network: nn.Module, kind: str) -> None:
    """Quantise the projections of every layer, and an untied head, in place and one at a time.

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
            of_head = "int8" if kind == "int4" else kind
            weight, module.scale = kernels.quantize_weight(module.weight.data, of_head if name == "head" else kind)
            module.weight = nn.Parameter(weight, requires_grad=False)

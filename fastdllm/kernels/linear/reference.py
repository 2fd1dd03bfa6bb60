# SPDX-License-Identifier: Apache-2.0
"""Quantised linear layers in plain torch: weights have one scale per output channel, wide fp8 activations one per token."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# From this many rows on a product is bound by arithmetic, and fp8 activations pay; below, by reading the weight.
WIDE_ROWS = 128
KINDS = {"fp8": (FP8, FP8_MAX), "int8": (torch.int8, 127.0)}


def quantize_weight(w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """See `fastdllm.kernels.quantize_weight`."""
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r} is not one of {', '.join(KINDS)}")
    dtype, largest = KINDS[kind]
    scaled, scale = _scaled(w, largest)
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scale


def linear(x: Tensor, wq: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `fastdllm.kernels.linear`."""
    rows = x.numel() // x.shape[-1]
    if wq.dtype == FP8 and rows >= WIDE_ROWS:
        scaled, token_scale = _scaled(x, FP8_MAX)
        y = scaled.to(FP8).float() @ wq.float().T * token_scale.unsqueeze(-1) * scale
    else:
        y = x.float() @ wq.float().T * scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _scaled(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """`x` with each row stretched to a largest magnitude of `largest`, and the scale [...] that undoes it; fp32."""
    x = x.float()
    # A row of zeros has no magnitude; any positive scale represents it.
    scale = x.abs().amax(dim=-1).clamp(min=1e-12) / largest
    return (x / scale.unsqueeze(-1)).clamp(-largest, largest), scale

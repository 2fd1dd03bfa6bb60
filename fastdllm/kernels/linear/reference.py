# SPDX-License-Identifier: Apache-2.0
"""Linear layers in plain torch. 8-bit weights have one scale per output channel, fp8 activations one per token, and 4-bit
weights a step and a zero per group of input channels (`int4.py`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm.kernels.linear import int4

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
EIGHT_BITS = {"fp8": (FP8, FP8_MAX), "int8": (torch.int8, 127.0)}
KINDS = (*EIGHT_BITS, "int4")


def quantize_weight(w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """w [N, C] in fewer bits, as (weight, scale).

    kind: "fp8" (e4m3) or "int8": weight [N, C] and scale [N] fp32, w close to weight * scale[:, None]; "int4": see
        `fastdllm.kernels.linear.int4.quantize`.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r} is not one of {', '.join(KINDS)}")
    if kind == "int4":
        return int4.quantize(w)
    dtype, largest = EIGHT_BITS[kind]
    scaled, scale = _scaled(w, largest)
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scale


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x [..., C] times the transpose of weight [N, C], plus bias [N]: [..., N].

    scale: of a quantised weight (`quantize_weight`), whose products accumulate in fp32. [N] fp32: products are scaled by
        output channel; fp8 weights meet fp8 activations, quantised here with one scale per token, int8 weights x as it is.
        [N, groups, 2], the steps and zeros of 4-bit weights [N, ceil(C / 256) * 128] uint8, which meet x as it is too.
    """
    if scale is None:
        return F.linear(x, weight, bias)
    if weight.dtype == FP8:
        scaled, token_scale = _scaled(x, FP8_MAX)
        y = scaled.to(FP8).float() @ weight.float().T * token_scale.unsqueeze(-1) * scale
    elif weight.dtype == torch.uint8:
        y = x.float() @ int4.widen(weight, scale, x.shape[-1]).T
    else:
        y = x.float() @ weight.float().T * scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _scaled(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """`x` with each row stretched to a largest magnitude of `largest`, and the scale [...] that undoes it; fp32."""
    x = x.float()
    # A row of zeros has no magnitude; any positive scale represents it.
    magnitude = x.abs().amax(dim=-1).clamp(min=1e-12)
    # By a tensor: torch divides by a number on a GPU as it multiplies by its inverse, and halves then round the other way.
    scale = magnitude / torch.full_like(magnitude, largest)
    return (x * scale.reciprocal().unsqueeze(-1)).clamp(-largest, largest), scale

# SPDX-License-Identifier: Apache-2.0
"""Linear layers in plain torch. 8-bit weights have one scale per output channel, fp8 activations one per token, and 4-bit
weights a step and a zero per group of input channels (`int4.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm.kernels.linear import int4

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
TINY = torch.finfo(torch.float32).tiny  # the least scale: its inverse is still a number
EIGHT_BITS = {"fp8": (FP8, FP8_MAX), "int8": (torch.int8, 127.0)}
KINDS = (*EIGHT_BITS, "int4")


@dataclass(frozen=True)
class Quantized:
    """Activations in fp8, as a product with fp8 weights takes them: what other kernels hand over to it.

    values: [..., C] fp8.
    scale: [...] fp32, of each token; values * scale is what they stand for.
    dtype: of what they stand for, and of the product.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    is_cuda = property(lambda self: self.values.is_cuda)
    requires_grad = property(lambda self: False)
    shape = property(lambda self: self.values.shape)


Activations = Tensor | Quantized


def quantize_tokens(x: Tensor) -> Quantized:
    """x [..., C] in fp8, with one scale a token."""
    scaled, scale = _scaled(x, FP8_MAX)
    return Quantized(scaled.to(FP8), scale, x.dtype)


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


def linear(x: Activations, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x [..., C] times the transpose of weight [N, C], plus bias [N]: [..., N].

    x: quantised already only where the weights are fp8.

    scale: of a quantised weight (`quantize_weight`), whose products accumulate in fp32. [N] fp32: products are scaled by
        output channel; fp8 weights meet fp8 activations, quantised here with one scale per token, int8 weights x as it is.
        [N, groups, 2], the steps and zeros of 4-bit weights [N, ceil(C / 256) * 128] uint8, which meet x as it is too; a
        zero is a whole number in 0..15.
    """
    if weight.dtype == FP8 and scale is not None:
        tokens = quantize_tokens(x) if isinstance(x, Tensor) else x
        y = tokens.values.float() @ weight.float().T * tokens.scale.unsqueeze(-1) * scale
        return (y if bias is None else y + bias.float()).to(tokens.dtype)
    if isinstance(x, Quantized):
        raise TypeError(f"activations in fp8 need weights in fp8, not {weight.dtype}")
    if scale is None:
        return F.linear(x, weight, bias)
    if weight.dtype == torch.uint8:
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
    magnitude = x.abs().amax(dim=-1).clamp(min=largest * TINY)
    # By a tensor: torch divides by a number on a GPU as it multiplies by its inverse, and halves then round the other way.
    scale = magnitude / torch.full_like(magnitude, largest)
    return (x * scale.reciprocal().unsqueeze(-1)).clamp(-largest, largest), scale

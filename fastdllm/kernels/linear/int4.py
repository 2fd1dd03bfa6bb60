# SPDX-License-Identifier: Apache-2.0
"""Weights in 4 bits: w = (q - zero) * step, with q in 0..15 and one (step, zero) for each group of an output row's channels.
A zero is a whole number in 0..15.

The layout is that of the product's tiles. Channels are packed in units of 256, as 64 words of 16 bits: word j holds the
channels j, 64 + j, 128 + j and 192 + j, from its low bits on. So a tile of words is four tiles of adjacent channels, and no
element has to move. The last unit is filled up with zeros. Steps lie in memory group by group, and so do zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT = 256
HALF = UNIT // 2
PARTS = 4  # levels of a word
GROUP = 128
LEVELS = 15
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # ranges that a group may be clipped to, as shares of its own
CHUNK = 1 << 24  # weights that are quantised at a time, which bounds the memory taken on the way


def quantize(w: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """w [N, C] -> (weight [N, ceil(C / 256) * 128] uint8, scale [N, ceil(C / group), 2] bf16, step and zero).

    Of a few ranges each group takes the one with the least squared error. A weight of zero stays zero.
    """
    parts = [_quantize(part, group) for part in w.split(max(1, CHUNK // w.shape[1]))]
    weight, scale = zip(*parts, strict=True)
    return torch.cat(weight), by_group(torch.cat(scale))


def by_group(scale: Tensor) -> Tensor:
    """scale [N, groups, 2] with the rows' steps of a group side by side in memory, which is how a product reads them."""
    return scale.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _quantize(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    N, C = w.shape
    x = F.pad(w.float(), (0, -C % group)).view(N, -1, group)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    full = torch.where(high > low, (high - low) / LEVELS, 1.0)
    least = torch.full_like(full, torch.nan)  # so that the first range is taken even if its error is beyond fp32
    step, zero, q = torch.ones_like(full), torch.zeros_like(full), torch.zeros_like(x)
    for share in SHRINK:
        # The step is rounded as it will be stored before anything is divided by it.
        s = (full * share).bfloat16().float().clamp(min=torch.finfo(torch.bfloat16).tiny)
        z = (-low * share / s).round().clamp(0, LEVELS)
        t = (x / s + z).round().clamp(0, LEVELS)
        error = ((t - z) * s - x).square().sum(-1, keepdim=True)
        better = ~(error >= least)  # what is no number stays so, and is seen
        least, step, zero, q = (torch.where(better, a, b) for a, b in ((error, least), (s, step), (z, zero), (t, q)))
    return pack(q.flatten(1)[:, :C]), torch.cat([step, zero], -1).bfloat16()


def pack(q: Tensor) -> Tensor:
    """Levels q [N, C] in 0..15 of any dtype -> bytes [N, ceil(C / 256) * 128]."""
    q = F.pad(q.to(torch.uint8), (0, -q.shape[1] % UNIT)).view(len(q), -1, 2, 2, UNIT // PARTS)
    return (q[:, :, :, 0] | (q[:, :, :, 1] << 4)).transpose(2, 3).flatten(1)  # a word's bytes, the low one first


def unpack(weight: Tensor, channels: int) -> Tensor:
    """The levels [N, channels] uint8 of bytes from `pack`."""
    parts = weight.view(len(weight), -1, UNIT // PARTS, 2).transpose(2, 3)
    return torch.stack([parts & 15, parts >> 4], 3).flatten(1)[:, :channels]


def group_size(scale: Tensor, channels: int) -> int:
    """Channels that share a step: the power of two that makes scale [N, groups, 2] cover `channels`."""
    groups = scale.shape[1]
    return 1 << (-(-channels // groups) - 1).bit_length()


def widen(weight: Tensor, scale: Tensor, channels: int) -> Tensor:
    """The weights [N, channels] in fp32."""
    step, zero = scale.float().repeat_interleave(group_size(scale, channels), 1)[:, :channels].unbind(-1)
    return (unpack(weight, channels).float() - zero) * step

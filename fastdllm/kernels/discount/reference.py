# SPDX-License-Identifier: Apache-2.0
"""The utility of the Attention-Discounted Adaptive Sampler (ADAS, arXiv 2606.10829), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def discount(conf: Tensor, masked: Tensor, attention: Tensor, weight: float) -> Tensor:
    """Confidences [R, Q] of masked positions as candidates for one set, which takes the best of them one after another.

    Candidate i is worth conf[i] - weight * sum over s in the set of attention[i, s] * (1 - conf[s]) when it is taken. That
    never rises from one to the next: in falling order of the result, positions stand as they were taken.

    conf: [R, Q] fp32; of equal ones the first position is taken first, NaN after every number.
    masked: [R, Q] bool, the candidates; other positions keep their confidence.
    attention: [R, Q, Q] fp32, of any strides: how much i attends to s.
    weight: at least 0.
    """
    position = torch.arange(conf.shape[1], device=conf.device)
    left, worth = masked, conf
    for _ in range(conf.shape[1]):
        key = worth.nan_to_num(nan=torch.finfo(conf.dtype).min).masked_fill(~left, -torch.inf)
        best = torch.where(key == key.amax(1, keepdim=True), position, conf.shape[1] - 1).amin(1, keepdim=True)
        left = left & (position != best)
        doubt = (1 - conf.gather(1, best)).clamp(0, 1)
        toward = attention.gather(2, best[:, None].expand(-1, conf.shape[1], -1))[..., 0]
        worth = torch.where(left, worth - weight * toward * doubt, worth)
    return worth

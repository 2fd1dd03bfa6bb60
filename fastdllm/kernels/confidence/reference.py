# SPDX-License-Identifier: Apache-2.0
"""Logits to (top token, its probability) in plain torch, fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdllm.kernels.linear.reference import linear


class Confidence(NamedTuple):
    """Per position: `top` [N] int64 the likeliest token, `prob` [N] its probability, `lse` [N] the
    log-sum-exp of the logits, `entropy` [N] in nats and `margin` [N] (best minus second-best probability)
    where asked for; fp32."""

    top: Tensor
    prob: Tensor
    lse: Tensor
    entropy: Tensor | None
    margin: Tensor | None


def confidence(logits: Tensor, banned: Tensor | None = None, entropy: bool = False, margin: bool = False) -> Confidence:
    """Top token and softmax statistics of logits [N, V], in fp32.

    banned: [V] bool; these tokens have probability 0. Of equal logits the one with the smaller id is the top.
    entropy, margin: whether to compute them.
    """
    x = logits.float()
    if banned is not None:
        x = x.masked_fill(banned, -torch.inf)
    best, top = x.max(dim=-1)
    lse = x.logsumexp(dim=-1)
    prob = (best - lse).exp()
    h = None
    if entropy:
        log_p = x - lse.unsqueeze(-1)
        # 0 log 0 = 0: a banned entry is -inf and must not turn the sum into NaN.
        h = -(log_p.exp() * log_p.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    gap = None
    if margin:
        second = x.scatter(-1, top.unsqueeze(-1), -torch.inf).amax(dim=-1)
        gap = prob - (second - lse).exp()
    return Confidence(top, prob, lse, h, gap)


def head_confidence(
    hidden: Tensor,
    weight: Tensor,
    banned: Tensor | None = None,
    entropy: bool = False,
    margin: bool = False,
    scale: Tensor | None = None,
) -> Confidence:
    """`confidence` of `linear(hidden, weight, scale)`, hidden [N, C] and weight [V, C]: the logits may stay in registers."""
    return confidence(linear(hidden, weight, scale), banned, entropy, margin)

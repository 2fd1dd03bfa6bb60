# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules in plain torch with static shapes: sort, compare, scatter; nothing is read on the host.

Sources: threshold and factor, Fast-dLLM (arXiv 2505.22618) section 3.3 and Theorem 1; quota, LLaDA's
low-confidence remasking (arXiv 2502.09992).
"""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("threshold", "threshold_strict", "quota", "factor", "factor_published")


def accept(ids: Tensor, top: Tensor, conf: Tensor, masked: Tensor, rule: str, value: Tensor) -> Tensor:
    """The block's next ids [R, Q]: `top` [R, Q] where it is committed, `ids` elsewhere.

    masked: [R, Q] bool; only these positions are committed, and in each row that has one at least the most confident.
    conf: [R, Q] fp32; ties go by position, and NaN comes after every number.
    rule, with value [R] fp32: threshold: conf >= value; threshold_strict: conf > value; quota: the `value` most confident;
        factor: the n most confident, n the largest with (n + 1)(1 - c_(n)) < value; factor_published: that rule as the
        published code scans it, >= and the last position included when the scan stops there.
    """
    return torch.where(_chosen(conf, masked, rule, value.unsqueeze(-1)), top, ids)


def _chosen(conf: Tensor, masked: Tensor, rule: str, value: Tensor) -> Tensor:
    """[R, Q] bool: the committed positions."""
    if rule in ("threshold", "threshold_strict"):  # ask for the first rank only, which needs no sort
        best = torch.arange(conf.shape[-1], device=conf.device) == _key(conf, masked).argmax(-1, keepdim=True)
        return ((conf >= value if rule == "threshold" else conf > value) | best) & masked
    ranked, order = _key(conf, masked).sort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    count = masked.sum(-1, keepdim=True)
    n = torch.arange(1, conf.shape[-1] + 1, device=conf.device)
    valid = n <= count
    if rule == "quota":
        chosen = rank < value
    elif rule == "factor":
        # (n + 1)(1 - c_(n)) never falls with n, so the number of n that satisfy it is the largest such n.
        chosen = rank < (valid & ((n + 1) * (1 - ranked) < value)).sum(-1, keepdim=True)
    elif rule == "factor_published":
        # The published scan stops at the first failure, but commits the last masked position if it stops there.
        passes = valid & ((n == 1) | (ranked >= 1 - value / (n + 1)))
        first = passes.long().cumprod(-1).sum(-1, keepdim=True)
        chosen = rank < torch.where(first >= count - 1, count, first)
    else:
        raise ValueError(f"rule={rule!r} is not one of {', '.join(RULES)}")
    return (chosen | (rank == 0)) & masked


def _key(conf: Tensor, masked: Tensor) -> Tensor:
    """What ranks positions: the confidence, the lowest number where it is NaN, and below that what is not masked."""
    lowest = torch.finfo(conf.dtype).min
    return torch.where(conf.isnan(), lowest, conf.clamp(min=lowest)).masked_fill(~masked, -torch.inf)

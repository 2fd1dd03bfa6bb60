# SPDX-License-Identifier: Apache-2.0
"""Which experts work for a position: the rules of `Experts.score`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm.models.spec import Experts


def route(y: Tensor, router: Tensor, bias: Tensor | None, experts: Experts) -> tuple[Tensor, Tensor]:
    """The experts of each y [..., C], and what their results are times: int64 and at least fp32, [..., active] each.

    router: [count, C]. bias: [count], with the rule "sigmoid" only.
    """
    if bias is None:
        best = F.linear(y, router).float().softmax(-1).topk(experts.active, -1)
        return best.indices, best.values
    score = F.linear(y.to(router.dtype), router).sigmoid()
    wanted = score + bias
    if experts.active_groups < experts.groups:
        grouped = wanted.unflatten(-1, (experts.groups, -1))
        best_groups = grouped.topk(2, -1).values.sum(-1).topk(experts.active_groups, -1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best_groups, False)
        wanted = grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(-2)
    chosen = wanted.topk(experts.active, -1).indices
    weight = score.gather(-1, chosen)
    if experts.active > 1:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return chosen, weight * experts.scale

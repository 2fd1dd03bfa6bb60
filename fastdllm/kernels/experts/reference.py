# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in plain torch.

A block of 32 positions that choose 8 experts each reads most of them. So few positions go through all experts, side by
side in two products, whose weights may have any number of bits. Many positions are bound by arithmetic: they are sorted by
expert, and the library multiplies each expert's share. Either way no shape depends on what is chosen, nothing is read on
the host of a GPU, and a graph may capture it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm.kernels.linear.reference import linear
from fastdllm.kernels.rmsnorm.reference import rmsnorm
from fastdllm.kernels.silu_mul.reference import linear_silu_mul, silu_mul

FEW = 64  # positions for which all experts compute; it is also up to where the products are bound by reading weights
CHUNK, SORTED_CHUNK = 1024, 8192  # positions at a time, which bounds the memory of what lies between the products
GROUPED = getattr(F, "grouped_mm", None)  # older versions of torch have none


def experts_rmsnorm(
    x: Tensor,
    chosen: Tensor,
    share: Tensor,
    gate_up: Tensor,
    down: Tensor,
    count: int,
    inner: int,
    norm: Tensor,
    eps: float,
    residual: Tensor,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the chosen experts make of x [R, W, C], added up; plus `residual`, and normalised as by `rmsnorm`: (y, h).

    chosen: [R, W, k] int64, the experts of each position, all different. share: [R, W, k], what their results are times.
    gate_up: [2F, C], the gates of `count` experts of `inner` channels each, one expert after the other, then the gates of
        the F - count * inner channels that work for every position; then the up projections, likewise.
    down: [C, F], the second projection. norm: [C]. gate_up_scale, down_scale: see `fastdllm.kernels.linear`.
    """
    y = mixed(x, chosen, share, gate_up, down, count, inner, gate_up_scale, down_scale)
    return rmsnorm(y, norm, eps, residual)


def mixed(
    x: Tensor,
    chosen: Tensor,
    share: Tensor,
    gate_up: Tensor,
    down: Tensor,
    count: int,
    inner: int,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    first: Callable[..., Tensor] = linear_silu_mul,
    second: Callable[..., Tensor] = linear,
) -> Tensor:
    """`experts_rmsnorm` without residual and norm, [R, W, C]. first, second: the two products of all experts."""
    given = [t.flatten(0, 1) for t in (x, chosen, share)]
    if is_sorted(given[0], gate_up, gate_up_scale, inner):
        parts = zip(*(t.split(SORTED_CHUNK) for t in given), strict=True)
        return torch.cat([by_expert(*part, gate_up, down, count, inner) for part in parts]).view_as(x)
    out = []
    for rows, which, shares in zip(*(t.split(CHUNK) for t in given), strict=True):
        act = weighted(first(rows, gate_up, gate_up_scale), which, shares, count, inner)
        out.append(second(act, down, down_scale))
    return torch.cat(out).view_as(x)


def weighted(act: Tensor, chosen: Tensor, share: Tensor, count: int, inner: int) -> Tensor:
    """act [N, F], what all experts compute side by side, times each one's share, in place; 0 where it was not chosen. Their
    second products add up then, and one product over F does all of them."""
    shares = share.new_zeros(len(act), count).scatter_(1, chosen, share).to(act.dtype).unsqueeze(-1)
    apart = act[:, : count * inner].unflatten(1, (count, inner)).mul_(shares)
    if act.dtype == torch.float16:  # what nobody asked for may overflow, and 0 * inf is not 0
        apart.masked_fill_(shares == 0, 0)
    return act


def is_sorted(rows: Tensor, gate_up: Tensor, scale: Tensor | None, inner: int) -> bool:
    """Whether rows [N, C] are sorted by expert: many of them, and a grouped product of the library for their numbers."""
    if GROUPED is None or scale is not None or len(rows) <= FEW or rows.dtype != gate_up.dtype:
        return False
    if not rows.is_cuda:
        return rows.dtype in (torch.float32, torch.bfloat16)
    # Other cards and numbers take a path of the library that reads the groups on the host.
    fits = rows.dtype == torch.bfloat16 and not any(n % 8 for n in (inner, rows.shape[1], len(gate_up) // 2))
    return fits and torch.cuda.get_device_capability(rows.device)[0] in (9, 10)


def by_expert(x: Tensor, chosen: Tensor, share: Tensor, gate_up: Tensor, down: Tensor, count: int, inner: int) -> Tensor:
    """`mixed` of x [N, C] by grouped products over the pairs of a position and an expert, sorted by expert."""
    (N, k), channels = chosen.shape, down.shape[1]
    expert, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(count, device=x.device), right=True).to(torch.int32)
    gate, up = gate_up.split(channels)
    rows = x[order.div(k, rounding_mode="floor")]
    gated, raised = (
        GROUPED(rows, part[: count * inner].unflatten(0, (count, inner)).transpose(1, 2), offs=ends) for part in (gate, up)
    )
    second = down[:, : count * inner].unflatten(1, (count, inner)).permute(1, 2, 0)  # [count, inner, C]
    out = GROUPED(F.silu(gated) * raised, second, offs=ends)
    apart = torch.empty_like(out).index_copy_(0, order, out).unflatten(0, (N, k))
    y = (share.to(x.dtype).unsqueeze(1) @ apart).squeeze(1)
    if channels == count * inner:
        return y
    always = silu_mul(torch.cat([x @ part[count * inner :].T for part in (gate, up)], -1))
    return y + always @ down[:, count * inner :].T

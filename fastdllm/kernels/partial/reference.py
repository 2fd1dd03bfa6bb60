# SPDX-License-Identifier: Apache-2.0
"""Layers that run for some positions only, in plain torch.

`drift` says how far each position has moved since a layer last ran for it, `pick` gathers those that moved most, and `merge`
puts what the layers made of them back and gives the others what the layers added last time. A run of layers that all skip
the same positions needs one `pick` and one `merge`: what it added to a position is its output less its input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm.kernels.rmsnorm.reference import rmsnorm


class Picked(NamedTuple):
    """The positions that run, in P pieces of n.

    h, y: [P, n, C], their states, and these normalised. row: [P] int64, of each piece. pos, kv_len: [P, n] int64.
    source: [R, W] int32, where each position of the pass is among the P * n, or -1.
    """

    h: Tensor
    y: Tensor
    row: Tensor
    pos: Tensor
    kv_len: Tensor
    source: Tensor


def drift(x: Tensor, kept: Tensor, row: Tensor, at: Tensor, bonus: Tensor | None = None, still: float = 0.0) -> Tensor:
    """1 - cosine of x [R, W, K * D] and what is kept of its positions, in fp32: [R, W].

    kept: [S, K, T, D], contiguous in D; position (r, w) is compared with kept[row[r], :, at[r, w]]. A vector of zeros has a
        cosine of 0 with any other.
    row, at: [R] and [R, W] int64.
    bonus: [R, W] fp32, added to the result. still: a drift below it counts as 0, before the bonus.
    """
    found = 1 - F.cosine_similarity(x.float(), kept[row[:, None], :, at].flatten(2).float(), dim=-1)
    found = torch.where(found < still, 0.0, found)
    return found if bonus is None else found + bonus


def pick(
    h: Tensor,
    score: Tensor,
    quota: Tensor,
    pieces: int,
    n: int,
    pos: Tensor,
    kv_len: Tensor,
    scratch: Tensor,
    norm: Tensor,
    eps: float,
    row: Tensor | None = None,
    at: Tensor | None = None,
    entry: Tensor | None = None,
    ids: Tensor | None = None,
    seen: Tensor | None = None,
) -> Picked:
    """The positions of h [R, W, C] that run through the next layers: of row r the quota[r] with the highest score.

    score: [R, W] fp32; ties go by position, NaN comes last. quota: [R] int64, at most W.
    pieces: P, at least as many as the rows need, which have ceil(quota[r] / n) of n positions each, row after row and the
        best first. What a piece holds beyond its row's quota fills the shape: its result is dropped, and its keys go to slot
        scratch[r] ([R] int64). Pieces beyond those of the rows are the last row's.
    pos, kv_len: [R, W] int64, handed on. norm [C], eps: of the first layer's `rmsnorm`.
    entry, ids, seen: [S, D, C], [R, W] and [S, D] int64, all or none; the states and ids of the positions that run are
        written to entry and seen at [row[r], at[r, w]]. row: [R] int64; at: [R, W] int64, distinct within a row.
    """
    R, W, _ = h.shape
    rank = torch.where(score.isnan(), -torch.inf, score).sort(dim=-1, descending=True, stable=True).indices
    each = -(-quota // n)
    ends, piece = each.cumsum(0), torch.arange(pieces, device=h.device)
    row_of = torch.searchsorted(ends, piece, right=True).clamp(max=R - 1)
    r, i = row_of[:, None], ((piece - (ends - each)[row_of]) * n)[:, None] + torch.arange(n, device=h.device)
    mine, chosen = i < quota[r], rank[r, i.clamp(max=W - 1)]
    states = h[r, chosen]
    source = torch.full((R, W + 1), -1, dtype=torch.int32, device=h.device)
    index = torch.arange(i.numel(), dtype=torch.int32, device=h.device).view_as(i)
    source[r, torch.where(mine, chosen, W)] = index
    source = source[:, :W].contiguous()
    if entry is not None:
        there, ran = (row[:, None], at), source >= 0
        entry[there] = torch.where(ran[..., None], h, entry[there])
        seen[there] = torch.where(ran, ids, seen[there])
    y, _ = rmsnorm(states, norm, eps)
    return Picked(states, y, row_of, torch.where(mine, pos[r, chosen], scratch[r]), kv_len[r, chosen], source)


def merge(
    h: Tensor,
    fresh: Tensor,
    source: Tensor,
    cached: Tensor,
    row: Tensor,
    at: Tensor,
    norm: Tensor,
    eps: float,
    output: bool = False,
) -> tuple[Tensor, Tensor]:
    """All positions after layers that ran for some: (y, h) [R, W, C] each, y normalised by norm [C].

    h: [R, W, C], the states before the layers. fresh: [P, n, C], those that ran, after them; source [R, W]: see `Picked`.
    cached: [S, D, C], contiguous in C; what the layers added to a position when they last ran for it, at [row[r], at[r, w]].
        Positions that ran write it, the others add it to h. With `output` it is the layers' output, taken as it is.
    row, at: [R] and [R, W] int64, `at` distinct within a row.
    """
    there, ran = (row[:, None], at), (source >= 0)[..., None]
    kept, new = cached[there], fresh.flatten(0, 1)
    if len(new):
        new = new[source.clamp(min=0).long()]
        cached[there] = torch.where(ran, new if output else new - h, kept)
    else:
        new = h
    return rmsnorm(torch.where(ran, new, kept if output else h + kept), norm, eps)

# SPDX-License-Identifier: Apache-2.0
"""How the network is called: as it stands, for one branch of each row, in pieces, or with layers that reuse.

A request may take several rows of the canvas and the store, its lanes: the branches of a decoder, or the two sides of
guidance. Tensors of a step hold the lanes of a row as neighbours, [R * lanes, ...]. Lane 0 is the request's content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdllm.decoding import Decoding
from fastdllm.forward import PIECE, Look, Plan, Shape, Window
from fastdllm.reuse.base import Work
from fastdllm.store import Canvas, KVStore
from fastdllm.view import repeat

if TYPE_CHECKING:
    from fastdllm.models import Model
    from fastdllm.models.transformer import LayerRule

Network = Callable[..., Tensor]


def of_first(x: Tensor, lanes: int) -> Tensor:
    """x [R * lanes, ...] with lane 0 in the place of all lanes of its row."""
    return repeat(x[::lanes], lanes) if lanes > 1 else x


def fan_out(table: Tensor, lanes: int) -> Tensor:
    """table [R, n] of plans -> that of every lane, [R * lanes, n]."""
    if lanes == 1:
        return table
    row, apart = table[:, :1], table[:, 1:2]
    row = row + torch.arange(lanes, device=table.device) * apart
    return torch.cat([row.reshape(-1, 1), repeat(table[:, 1:], lanes)], 1)


def forward(
    model: Model, canvas: Canvas, run: Decoding, plan: Plan, window: Window, ids: Tensor, shape: Shape
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [R, N, C] of ids [R, N], and with layer reuse how many positions of each row drifted [R]."""

    def network(ids: Tensor, window: Window, *rule: LayerRule) -> Tensor:
        return model.network(ids, window, canvas.store, *rule)

    if shape.fresh is not None:
        memory = canvas.state(run.reuse, partial(run.reuse.allocate, model))
        asked = needed(model.spec.shift, canvas, plan, window.pos)
        work = Work(plan.slot, window, ids, asked, plan.fresh, plan.scratch, shape.fresh, shape.pieces)
        return network(ids, window, run.reuse.layers_of(memory, work)), memory.drifted[plan.slot]
    if shape.branches < run.decoder.branches:
        return first_branch(network, ids, window, canvas.store, run.decoder.branches), None
    if shape.pieces:
        return packed(network, ids, window, plan.stop - plan.start, shape.pieces, plan.scratch), None
    return network(ids, window), None


def needed(shift: int, canvas: Canvas, plan: Plan, pos: Tensor) -> Tensor:
    """pos [R, W] -> bool: the positions whose output predicts an open mask of the block."""
    target = pos + shift
    inside = (target >= plan.first[:, None]) & (target < plan.end[:, None])
    return canvas.masked[plan.row[:, None], torch.minimum(target, plan.scratch[:, None])] & inside


def first_branch(network: Network, ids: Tensor, window: Window, store: KVStore, lanes: int) -> Tensor:
    """The forward of branches that all hold the same: the first runs, the others get its hidden states, keys and values."""
    lead = slice(None, None, lanes)
    hide = None if window.hide is None else window.hide[lead]
    row, pos = window.row[lead], window.pos[lead]
    look = window.look and lead_of(window.look, lanes, pos.shape[1])
    hidden = network(ids[lead], Window(row, pos, window.kv_len[lead], window.max_kv_len, window.dense, hide, look=look))
    if window.look is not None:
        window.look.out.copy_(of_first(window.look.out, lanes))
    for branch in range(1, lanes):
        for kv in (store.k, store.v):
            kv[:, window.row[branch::lanes, None], :, pos] = kv[:, row[:, None], :, pos]
    return repeat(hidden, lanes)


def lead_of(look: Look, lanes: int, width: int) -> Look:
    """What is asked of the first lane of each row, in a forward of only those."""
    lead = slice(None, None, lanes)
    row, source, slot, out = look.row[lead], look.source[lead], look.slot[lead], look.out[lead]
    hide = None if look.hide is None else look.hide[lead]
    return Look(row, torch.arange(len(row), device=row.device) * width, source, slot, hide, out)


def packed(network: Network, ids: Tensor, window: Window, lengths: Tensor, count: int, scratch: Tensor) -> Tensor:
    """network(ids, window) [R, W, C], computed for the first `lengths` [R] positions of each row only, in `count` pieces.

    Passes are cut into pieces of PIECE positions, which run as the rows of one forward: attention reads the store after
    every position has written to it, so a piece sees the rest of its pass there. Pieces beyond those of the lengths write to
    scratch [R]; what the result holds after a row's length means nothing.
    """
    rows, width = ids.shape
    each = (lengths + PIECE - 1).div(PIECE, rounding_mode="floor")
    ends = each.cumsum(0)
    first = ends - each
    piece = torch.arange(count, device=ids.device)
    member = torch.searchsorted(ends, piece, right=True).clamp(max=rows - 1)  # the row of a piece
    at = ((piece - first[member]) * PIECE)[:, None] + torch.arange(PIECE, device=ids.device)  # [count, PIECE]
    index = member[:, None], at.clamp(max=width - 1)
    pos = torch.where(at < lengths[member, None], window.pos[index], scratch[member, None])
    hide = None if window.hide is None else window.hide[member]
    kv_len = window.kv_len[index]
    look = window.look and replace(window.look, first=first * PIECE)
    hidden = network(ids[index], Window(window.row[member], pos, kv_len, window.max_kv_len, window.dense, hide, look=look))
    back = (first * PIECE)[:, None] + torch.arange(width, device=ids.device)
    return hidden.flatten(0, 1)[back.clamp(max=count * PIECE - 1)]

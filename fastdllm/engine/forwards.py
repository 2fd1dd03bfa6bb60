# SPDX-License-Identifier: Apache-2.0
"""How the network is called: as it stands, for one branch of each row, packed, or with layers that reuse.

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
    if shape.packed:
        return packed(network, ids, window, plan.stop - plan.start, shape.packed, plan.scratch), None
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
    """network(ids, window) [R, W, C], computed for the first `lengths` [R] positions of each row only, `count` in all.

    The positions run one after the other, as rows of one position each, so that only those of some pass are computed, and
    those that fill up `count`. Attention reads the store after every position has written to it, and takes up to PIECE
    positions of a row together. What fills up belongs to the last row and writes to its scratch [R]; what the result holds
    after a row's length means nothing.
    """
    width, device = ids.shape[1], ids.device
    ends = lengths.cumsum(0)
    first = ends - lengths
    ends[-1:].fill_(count)  # a number assigned is a copy from the host, which no graph may capture
    position = torch.arange(count, device=device)
    member = torch.searchsorted(ends, position, right=True)  # the row of a position
    at = position - first[member]
    index = member, at.clamp(max=width - 1)
    pos = torch.where(at < lengths[member], window.pos[index], scratch[member]).unsqueeze(1)
    kv_len, row = window.kv_len[index].unsqueeze(1), window.row[member]
    hide = None if window.hide is None else window.hide[member]
    look = window.look and replace(window.look, first=first)
    together = groups(first, ends - first, count)
    flat = Window(row, pos, kv_len, window.max_kv_len, window.dense, hide, look=look, together=together)
    hidden = network(ids[index].unsqueeze(1), flat)
    back = first[:, None] + torch.arange(width, device=device)
    return hidden.squeeze(1)[back.clamp(max=count - 1)]


def groups(first: Tensor, lengths: Tensor, count: int) -> Tensor:
    """[G, PIECE]: `count` positions, of which each row has `lengths` [R] from `first` [R] on, up to PIECE of a row together;
    `count` where there is none. G is the most that any lengths can ask for."""
    each = (lengths + PIECE - 1).div(PIECE, rounding_mode="floor")
    ends = each.cumsum(0)
    group = torch.arange(count // PIECE + len(lengths), device=lengths.device)
    member = torch.searchsorted(ends, group, right=True).clamp(max=len(lengths) - 1)  # beyond them there is nothing
    at = ((group - (ends - each)[member]) * PIECE)[:, None] + torch.arange(PIECE, device=lengths.device)
    return torch.where(at < lengths[member, None], first[member, None] + at, count)

# SPDX-License-Identifier: Apache-2.0
"""Branches: several contents of a row's block, run in one forward.

The branches of a row are neighbours on the canvas and in the store (`lanes` of them): branch 0 is the row's content, the
others are what a decoder tries. Tensors of a step hold them as [R * lanes, ...].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdllm.store import KVStore, Window


def repeat(x: Tensor, lanes: int) -> Tensor:
    """x [R, ...] -> [R * lanes, ...], each row once for every branch."""
    return x[:, None].expand(-1, lanes, *x.shape[1:]).flatten(0, 1)


def first_of(x: Tensor, lanes: int) -> Tensor:
    """x [R * lanes, ...] with branch 0 in the place of all branches of its row."""
    return repeat(x[::lanes], lanes)


def fan_out(plan: Tensor, lanes: int, rows: int) -> Tensor:
    """plan [R, N], its first column the row of the canvas -> the plan of every branch, [R * lanes, N].

    `rows` counts the rows of the canvas. A row that pads a graph is the last of them and has no neighbours; its branches
    all use it.
    """
    row = (plan[:, :1] + torch.arange(lanes, device=plan.device)).clamp(max=rows - 1)
    return torch.cat([row.reshape(-1, 1), repeat(plan[:, 1:], lanes)], 1)


def forward_first(network: Callable[..., Tensor], ids: Tensor, window: Window, store: KVStore, lanes: int) -> Tensor:
    """The forward of branches that all hold the same, [R * lanes, W, C]: branch 0 runs, the others get its hidden states
    and its keys and values."""
    hide = None if window.hide is None else window.hide[::lanes]
    row, pos = window.row[::lanes], window.pos[::lanes]
    hidden = network(ids[::lanes], Window(row, pos, window.limit[::lanes], window.keys, window.uniform, hide), store)
    for branch in range(1, lanes):
        for kv in (store.k, store.v):
            kv[:, window.row[branch::lanes, None], :, pos] = kv[:, row[:, None], :, pos]
    return repeat(hidden, lanes)

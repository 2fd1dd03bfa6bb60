# SPDX-License-Identifier: Apache-2.0
"""Reuse by values (dLLM-Cache, arXiv 2506.06295): each layer runs for the positions whose values moved most.

The value that a position would store is cheap to project and says whether its input changed. In a pass that does not
recompute all, every layer compares it with the stored one by cosine and runs for a fixed number of the least similar
positions; the others keep their keys and values, and what the layer added to them when it last ran is added again. Of
positions that did not move, those that predict an open mask go first: what they attend to did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm.forward import Window
from fastdllm.reuse.base import Cursor, Work, part, take, whole
from fastdllm.store import KVStore

if TYPE_CHECKING:
    from fastdllm.models import Model
    from fastdllm.models.transformer import Layer, LayerHook

STILL = 1e-4  # a drift below it is rounding: the projection of the same input in another shape


@dataclass
class ValueState:
    """cached [S, L, D + 1, C]: what each layer last added, by request and position in the block (the last place is
    padding's). drifted [S]: see `ReuseState`; the number of positions is fixed here, and it stays 0."""

    cached: Tensor
    drifted: Tensor


@dataclass(frozen=True)
class ValueReuse:
    """period: every period-th pass recomputes all. layers: all of the model's. ratio: share of a pass's positions that run
    in each layer of the other passes. size: most positions of a pass, D."""

    period: int
    layers: tuple[int, ...]
    ratio: float
    size: int

    def allocate(self, model: Model, rows: int) -> ValueState:
        """Empty state for `rows` canvas rows."""
        shape = (rows, len(self.layers), self.size + 1, model.spec.width)
        return ValueState(
            torch.zeros(shape, dtype=model.dtype, device=model.device),
            torch.zeros(rows, dtype=torch.long, device=model.device),
        )

    def cursor(self) -> Cursor:
        return Cursor(self)

    def fresh(self, width: int, since: int, committed: int, remaining: int, drifted: int = 0) -> int:
        """See `base.Reuse`; the layers with reuse are all of them."""
        return width if since < 0 or since + 1 >= self.period else math.ceil(self.ratio * width)

    def hook(self, state: ValueState, work: Work) -> LayerHook:
        """Runs the layers of one pass."""
        pos, row, rows, mine = work.window.pos, work.window.row[:, None], work.slot[:, None], work.mine
        padding = pos == work.scratch[:, None]
        at = torch.where(padding, self.size, pos % self.size)

        def run(layer: Layer, index: int, h: Tensor, window: Window, store: KVStore, cos: Tensor, sin: Tensor) -> Tensor:
            if work.most == work.width:
                out = whole(layer, index, h, window, store, cos, sin)
                state.cached[rows, index, at] = out - h
                return out
            stored = store.v[index][row, :, pos].flatten(2)  # [R, W, K * D]
            drift = 1 - F.cosine_similarity(layer.values(h).float(), stored.float(), dim=-1)
            drift = torch.where(drift < STILL, STILL / 2 * work.needed, drift).masked_fill(padding, -1)
            chosen = drift.argsort(dim=1, descending=True, stable=True)[:, : work.most]
            inputs, cached = take(h, chosen), state.cached[rows, index, at]
            out = h + cached
            fresh = whole(layer, index, inputs, part(work, chosen), store, cos, sin)
            fresh = torch.where(mine, fresh, take(out, chosen))
            state.cached[rows, index, at.gather(1, chosen)] = torch.where(mine, fresh - inputs, take(cached, chosen))
            return out.scatter(1, chosen[..., None].expand_as(fresh), fresh)

        return run

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
from torch import Tensor

from fastdllm import kernels
from fastdllm.reuse.base import Cursor, Work

if TYPE_CHECKING:
    from fastdllm.models import Model
    from fastdllm.models.transformer import LayerRule, Stack

STILL = 1e-4  # a drift below it is rounding: the projection of the same input in another shape


@dataclass
class ValueState:
    """What each layer last added.

    cached: [S, L, D + 1, C], by request and position in the block (the last place is padding's).
    drifted: [S], see `ReuseState`; the number of positions is fixed here, and it stays 0.
    """

    cached: Tensor
    drifted: Tensor


@dataclass(frozen=True)
class ValueReuse:
    """The rule by which each layer chooses its positions.

    period: every period-th pass recomputes all.
    layers: all of the model's.
    ratio: share of a pass's positions that run in each layer of the other passes.
    size: the most positions of a pass, D.
    """

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

    def layers_of(self, state: ValueState, work: Work) -> LayerRule:
        """See `base.Reuse`."""
        window, rows = work.window, work.slot[:, None]
        at = torch.where(work.padding, self.size, window.pos % self.size)
        # Among positions that stand still those that predict an open mask go first; padding comes last.
        bonus = STILL / 2 * work.needed - 4.0 * work.padding
        places = (window.pos, window.kv_len, work.scratch)

        def rule(stack: Stack, y: Tensor, h: Tensor) -> Tensor:
            eps = stack.spec.rms_eps
            for index, layer in enumerate(stack.layers):
                before, norm = h, stack.norms[index + 1]
                if work.whole:
                    y, h = stack.run(index, y, h, window)
                    state.cached[rows, index, at] = h - before
                    continue
                score = kernels.drift(layer.values(y), stack.store.v[index], window.row, window.pos, bonus, STILL)
                picked = kernels.pick(h, score, work.fresh, work.count, work.size, *places, layer.attn_norm, eps)
                _, fresh = stack.run(index, picked.y, picked.h, work.part(picked))
                y, h = kernels.merge(h, fresh, picked.source, state.cached[:, index], work.slot, at, norm, eps)
            return y

        return rule

# SPDX-License-Identifier: Apache-2.0
"""Layer reuse and TRIM: within a block of a block-causal model, do not run some layers for positions that hardly change.

Between two steps of a block most positions keep their token, and what a layer adds to them changes little. On passes that
are not a multiple of `reuse_k`, the layers of `layer_subset` are not run for reusable positions: the *residual delta* they
added when they last ran there, h_out - h_in, is added again. What the other layers saw anew still flows through, unlike with
a reused output, which throws away everything computed before it (`reuse_mode="output"`, kept as an ablation).

TRIM (token-level reuse minimisation) chooses the positions that are recomputed all the same: those whose token changed since
their last recompute, those that predict an open mask of the current sub-block, then those that drifted most. These fill up
`trim_ratio` of the window, or are as many as drifted by `trim_drift` or more in the pass before (counted one pass late, so
that the host knows the shape without another read).

Never in prefill, commit or likelihood; nothing crosses a block, a row or a sub-block's whole pass. `values.py` holds the
other rule, by which each layer chooses for itself (the cache `top_rho`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

MODES = ("delta", "output")


def subset_layers(subset: str | Sequence[int], layers: int) -> tuple[int, ...]:
    """The layers that `layer_subset` names: "first", "middle", "last" third of layers 1..layers-1, or indices.

    Layer 0 always runs: it turns tokens into states, so its delta has no meaning for another token.
    Raises ValueError for an unknown name or an index outside 1..layers-1.
    """
    third = max(1, (layers - 1) // 3)
    starts = {"first": 1, "middle": 1 + (layers - 1 - third) // 2, "last": layers - third}
    if isinstance(subset, str) and subset in starts:
        return tuple(range(starts[subset], min(starts[subset] + third, layers)))
    try:
        chosen = tuple(sorted({int(i) for i in (subset.split("+") if isinstance(subset, str) else subset)}))
    except ValueError as error:
        raise ValueError(
            f"layer_subset={subset!r} is unknown; allowed are first, middle, last or layer indices such as '2+3+4'"
        ) from error
    if any(not 1 <= i < layers for i in chosen):
        raise ValueError(f"layer_subset={subset!r} must name layers of 1..{layers - 1} (layer 0 always runs)")
    return chosen


@dataclass
class ReuseState:
    """What the reused layers last computed, by request and position in the block.

    cached [S, n, D, C]: delta (or output) of each reused layer; entry [S, D, C]: input of the first one; ids [S, D]: token.
    drifted [S]: positions of the row's last pass over the drift threshold.
    """

    cached: Tensor
    entry: Tensor
    ids: Tensor
    drifted: Tensor


@dataclass(frozen=True)
class LayerReuse:
    """period: every period-th pass recomputes all (reuse_k). layers: the subset. size: block size D. ratio: TRIM's share of
    the window; drift: TRIM's threshold on 1 - cosine of the subset's input (one of the two; with neither every position is
    reused). whole_refreshes: a pass over the whole block recomputes all (sub-block cache)."""

    period: int
    layers: tuple[int, ...]
    mode: str
    ratio: float | None
    drift: float | None
    size: int
    whole_refreshes: bool

    def allocate(self, model: Model, rows: int) -> ReuseState:
        """Empty state for `rows` canvas rows."""
        width, make = model.spec.width, {"dtype": model.dtype, "device": model.device}
        return ReuseState(
            torch.zeros(rows, len(self.layers), self.size, width, **make),
            torch.zeros(rows, self.size, width, **make),
            torch.full((rows, self.size), -1, dtype=torch.long, device=model.device),
            torch.zeros(rows, dtype=torch.long, device=model.device),
        )

    def cursor(self) -> Cursor:
        return Cursor(self)

    def fresh(self, width: int, since: int, committed: int, remaining: int, drifted: int = 0) -> int:
        """See `base.Reuse`."""
        if since < 0 or since + 1 >= self.period or (self.whole_refreshes and width == self.size):
            return width
        if self.ratio is None and self.drift is None:
            return 0
        wanted = drifted if self.ratio is None else math.ceil(self.ratio * width)
        return min(width, max(wanted, committed + remaining))

    def hook(self, state: ReuseState, work: Work) -> LayerHook:
        """Runs the layers of one pass."""
        at, rows, mine, ids = work.window.pos % self.size, work.slot[:, None], work.mine, work.ids
        chosen: Tensor | None = None

        def run(layer: Layer, index: int, h: Tensor, window: Window, store: KVStore, cos: Tensor, sin: Tensor) -> Tensor:
            nonlocal chosen
            if index not in self.layers:
                return whole(layer, index, h, window, store, cos, sin)
            j = self.layers.index(index)
            if j == 0 and self.drift is not None:
                state.drifted[work.slot] = (_drift(h, state, rows, at) >= self.drift).sum(1)
            if work.most == work.width:
                out = whole(layer, index, h, window, store, cos, sin)
                state.cached[rows, j, at] = out - h if self.mode == "delta" else out
                if j == 0:
                    state.entry[rows, at], state.ids[rows, at] = h, ids
                return out
            cached = state.cached[rows, j, at]
            out = h + cached if self.mode == "delta" else cached
            if work.most == 0:
                return out
            if j == 0:
                chosen = self._choose(h, state, rows, at, work)
            picked, inputs = at.gather(1, chosen), take(h, chosen)
            if j == 0:
                state.entry[rows, picked] = torch.where(mine, inputs, state.entry[rows, picked])
                state.ids[rows, picked] = torch.where(mine[..., 0], ids.gather(1, chosen), state.ids[rows, picked])
            fresh = whole(layer, index, inputs, part(work, chosen), store, cos, sin)
            fresh = torch.where(mine, fresh, take(out, chosen))
            value = fresh - inputs if self.mode == "delta" else fresh
            state.cached[rows, j, picked] = torch.where(mine, value, take(cached, chosen))
            return out.scatter(1, chosen[..., None].expand_as(fresh), fresh)

        return run

    def _choose(self, h: Tensor, state: ReuseState, rows: Tensor, at: Tensor, work: Work) -> Tensor:
        """The positions [R, most] to recompute first: the mandatory ones, then by drift of the input."""
        mandatory = work.needed | (work.ids != state.ids[rows, at])
        return (_drift(h, state, rows, at) + 4.0 * mandatory).topk(work.most, 1).indices


def _drift(h: Tensor, state: ReuseState, rows: Tensor, at: Tensor) -> Tensor:
    """How far the subset's input is from the one it last ran on: 1 - cosine, in [0, 2], [R, W] fp32."""
    return 1 - F.cosine_similarity(h.float(), state.entry[rows, at].float(), dim=-1)

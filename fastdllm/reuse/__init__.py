# SPDX-License-Identifier: Apache-2.0
"""Layer reuse and TRIM: within a block of a block-causal model, do not run some layers for positions that hardly change.

Between two steps of a block most positions keep their token, and what a layer adds to them changes little. Every
`reuse_k`-th pass runs all layers for all positions. In the other passes the layers of `layer_subset` are left out for
reusable positions: the *residual delta* that they added when they last ran there, h_out - h_in, is added again. What the
other layers saw anew still flows through. A reused output (`reuse_mode="output"`, kept as an ablation) would throw it away.

TRIM (token-level reuse minimisation) chooses the positions that are recomputed all the same, in this order: those whose
token changed since their last recompute, those that predict an open mask of the current sub-block, those that drifted most.
With `trim_ratio` they fill up that share of the window. With `trim_drift` there are as many of them as positions drifted by
that much in the pass before. The count is one pass old, so that the host knows the shape without another read.

Layers are never left out in prefill, commit or likelihood, and nothing is reused in another block, row or sub-block's whole
pass. `values.py` holds the other rule, by which each layer chooses for itself (the cache `top_rho`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdllm import kernels
from fastdllm.fields import shown
from fastdllm.reuse.base import Cursor, Work

if TYPE_CHECKING:
    from fastdllm.kernels import Activations
    from fastdllm.models import Model
    from fastdllm.models.transformer import LayerRule, Stack

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
            f"layer_subset={shown(subset)} is unknown; allowed are first, middle, last or layer indices such as '2+3+4'"
        ) from error
    if any(not 1 <= i < layers for i in chosen):
        raise ValueError(f"layer_subset={shown(subset)} must name layers of 1..{layers - 1} (layer 0 always runs)")
    return chosen


@dataclass
class ReuseState:
    """What the layers with reuse last computed, by request and position in the block (the last place, D - 1, is padding's).

    cached: [S, n, D, C], what each run of neighbouring layers added, or its output.
    entry: [S, D, C], the input of the first one.
    ids: [S, D], the token.
    drifted: [S], positions of the row's last pass over the drift threshold.
    """

    cached: Tensor
    entry: Tensor
    ids: Tensor
    drifted: Tensor


@dataclass(frozen=True)
class Reused:
    """A pass and its state. at: [R, W], places in the block."""

    state: ReuseState
    work: Work
    at: Tensor


@dataclass(frozen=True)
class LayerReuse:
    """The rule of layer reuse with TRIM.

    period: every period-th pass recomputes all (`reuse_k`).
    layers: those that are left out otherwise.
    size: block size D.
    ratio: TRIM's share of the window.
    drift: TRIM's threshold on 1 - cosine of the input of these layers. One of `ratio` and `drift` is given; with neither
        every position is reused.
    whole_refreshes: whether a pass over the whole block recomputes all (sub-block cache).
    """

    period: int
    layers: tuple[int, ...]
    mode: str
    ratio: float | None
    drift: float | None
    size: int
    whole_refreshes: bool

    @property
    def runs(self) -> list[range]:
        """The layers as runs of neighbours, which skip the same positions and are remembered by one difference."""
        starts = [i for i in self.layers if i - 1 not in self.layers]
        return [range(i, next(j for j in range(i, i + len(self.layers) + 1) if j not in self.layers)) for i in starts]

    def allocate(self, model: Model, rows: int) -> ReuseState:
        """Empty state for `rows` requests."""
        width, make, places = model.spec.width, {"dtype": model.dtype, "device": model.device}, self.size + 1
        return ReuseState(
            torch.zeros(rows, len(self.runs), places, width, **make),
            torch.zeros(rows, places, width, **make),
            torch.full((rows, places), -1, dtype=torch.long, device=model.device),
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

    def layers_of(self, state: ReuseState, work: Work) -> LayerRule:
        """See `base.Reuse`."""
        at = torch.where(work.padding, self.size, work.window.pos % self.size)
        now = Reused(state, work, at)
        starts = {run.start: (j, run) for j, run in enumerate(self.runs)}

        def rule(stack: Stack, y: Tensor, h: Tensor) -> Tensor:
            index, score = 0, torch.empty(0)
            while index < len(stack.layers):
                if index not in starts:
                    y, h = stack.run(index, y, h, work.window)
                    index += 1
                    continue
                j, run = starts[index]
                if j == 0 and (not work.whole or self.drift is not None):
                    score = self._score(state, work, at, h)
                if work.whole:
                    y, h = self._run_all(stack, now, y, h, j, run)
                else:
                    y, h = self._run_some(stack, now, h, j, run, score)
                index = run.stop
            return y

        return rule

    def _score(self, state: ReuseState, work: Work, at: Tensor, h: Tensor) -> Tensor:
        """[R, W] fp32: the higher, the sooner a position is recomputed. Those whose token changed and those that predict an
        open mask first, then by drift of the input; padding last. Counts what drifted for the next pass."""
        if self.ratio is None and self.drift is None:
            return torch.zeros(at.shape, device=at.device).masked_fill(work.padding, -torch.inf)
        drift = kernels.drift(h, state.entry[:, None], work.slot, at)
        if self.drift is not None:
            state.drifted[work.slot] = ((drift >= self.drift) & ~work.padding).sum(1)
        mandatory = work.needed | (work.ids != state.ids[work.slot[:, None], at])
        return (drift + 4.0 * mandatory).masked_fill(work.padding, -torch.inf)

    def _run_all(self, stack: Stack, now: Reused, y: Activations, h: Tensor, j: int, run: range) -> tuple[Any, Tensor]:
        """The j-th run of layers for every position."""
        state, work, at, rows, before = now.state, now.work, now.at, now.work.slot[:, None], h
        if j == 0:
            state.entry[rows, at], state.ids[rows, at] = h, work.ids
        for index in run:
            y, h = stack.run(index, y, h, work.window)
        state.cached[rows, j, at] = h - before if self.mode == "delta" else h
        return y, h

    def _run_some(self, stack: Stack, now: Reused, h: Tensor, j: int, run: range, score: Tensor) -> tuple[Tensor, Tensor]:
        """The j-th run of layers for the `work.fresh` positions of each row with the highest score."""
        state, work, at = now.state, now.work, now.at
        eps, entry = stack.spec.rms_eps, {} if j else {"entry": state.entry, "ids": work.ids, "seen": state.ids}
        window, before, after = work.window, stack.norms[run.start], stack.norms[run.stop]
        picked = kernels.pick(
            h, score, work.fresh, work.count, work.size, window.pos, window.kv_len, work.scratch, before, eps,
            row=work.slot, at=at, **entry,
        )  # fmt: skip
        y, fresh, part = picked.y, picked.h, work.part(picked)
        for index in run if work.count else ():
            y, fresh = stack.run(index, y, fresh, part)
        output = self.mode == "output"
        return kernels.merge(h, fresh, picked.source, state.cached[:, j], work.slot, at, after, eps, output)

# SPDX-License-Identifier: Apache-2.0
"""What every rule of layer reuse offers the engine, and what these rules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastdllm import kernels
from fastdllm.forward import Window
from fastdllm.store import KVStore

if TYPE_CHECKING:
    from fastdllm.models import Model
    from fastdllm.models.transformer import Layer

    LayerHook = Callable[[Layer, int, Tensor, Window, KVStore, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """A pass of which some layers run for some positions only.

    slot [R]: where each row's state lies. window: of the pass. ids [R, W]: its tokens. needed [R, W] bool: positions whose
    output predicts an open mask. most: the shape, the most positions of any row that run through the layers with reuse.
    fresh [R]: each row's own number of them. scratch [R]: the position that padding writes to.
    """

    slot: Tensor
    window: Window
    ids: Tensor
    needed: Tensor
    most: int
    fresh: Tensor
    scratch: Tensor

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    @property
    def mine(self) -> Tensor:
        """[R, most, 1] bool: where it is false, a row only fills the shape."""
        return (torch.arange(self.most, device=self.ids.device) < self.fresh[:, None])[..., None]


class Reuse(Protocol):
    """A rule of layer reuse; hashable, since it shapes a step. layers: those that reuse."""

    @property
    def layers(self) -> tuple[int, ...]: ...

    def cursor(self) -> Cursor:
        """Where a new request stands."""

    def fresh(self, width: int, since: int, committed: int, remaining: int, drifted: int) -> int:
        """How many positions of a denoising pass run through the layers with reuse; `width` means all.

        since: passes since everything was recomputed (negative: never in this block). committed: tokens the row's last
        forward wrote. remaining: open masks of its sub-block. drifted: positions over the drift threshold in its last pass.
        All are known to the host, so that shapes are.
        """

    def allocate(self, model: Model, rows: int) -> Any:
        """Empty state for so many requests, with a tensor `drifted` [rows]."""

    def hook(self, state: Any, work: Work) -> LayerHook:
        """Runs the layers of one pass."""


@dataclass
class Cursor:
    """Where a request stands. since: passes since reuse last recomputed everything, -1 before it did in this outer block.
    drifted: positions that moved away from what it reuses in the last pass."""

    rule: Reuse
    since: int = -1
    drifted: int = 0

    def fresh(self, width: int, committed: int, remaining: int) -> int:
        return self.rule.fresh(width, self.since, committed, remaining, self.drifted)

    def took(self, everything: bool, drifted: int) -> None:
        """Take in a pass. What an earlier block left behind says nothing of this one's first pass."""
        self.drifted = drifted if self.since >= 0 else 0
        self.since = 0 if everything else self.since + 1

    def restart(self) -> None:
        """A new outer block."""
        self.since = -1


def whole(layer: Layer, index: int, h: Tensor, window: Window, store: KVStore, cos: Tensor, sin: Tensor) -> Tensor:
    """The layer's output [R, W, C] for its input h [R, W, C]; its norm for the next layer is not needed."""
    y, _ = kernels.rmsnorm(h, layer.attn_norm, layer.spec.rms_eps)
    return layer(y, h, layer.attn_norm, index, window, store, cos, sin)[1]


def part(work: Work, chosen: Tensor) -> Window:
    """The window of the positions at chosen [R, n]; those that only fill the shape write to the scratch position."""
    window = work.window
    pos = torch.where(work.mine[..., 0], window.pos.gather(1, chosen), work.scratch[:, None])
    return Window(window.row, pos, window.kv_len.gather(1, chosen), window.max_kv_len, window.dense, window.hide)


def take(h: Tensor, index: Tensor) -> Tensor:
    """h [R, W, C] at index [R, n]: [R, n, C]."""
    return h.gather(1, index[..., None].expand(-1, -1, h.shape[-1]))

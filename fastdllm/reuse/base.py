# SPDX-License-Identifier: Apache-2.0
"""What every rule of layer reuse offers the engine, and what these rules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fastdllm import kernels
from fastdllm.forward import Window

if TYPE_CHECKING:
    from fastdllm.models import Model
    from fastdllm.models.transformer import LayerRule


@dataclass(frozen=True)
class Work:
    """A pass in which some layers run for some positions only.

    slot: [R], where each row's state lies.
    window: of the pass.
    ids: [R, W], its tokens.
    needed: [R, W] bool, positions whose output predicts an open mask.
    fresh: [R], how many positions of each row run through the layers with reuse.
    scratch: [R], the position that padding writes to.
    size, count: these positions run in `count` pieces of `size`; a size of 0 says that all of them run.
    """

    slot: Tensor
    window: Window
    ids: Tensor
    needed: Tensor
    fresh: Tensor
    scratch: Tensor
    size: int
    count: int

    @property
    def whole(self) -> bool:
        return self.size == 0

    @property
    def padding(self) -> Tensor:
        """[R, W] bool."""
        return self.window.pos == self.scratch[:, None]

    def part(self, picked: kernels.Picked) -> Window:
        """The window of the positions that were picked."""
        window, row = self.window, picked.row
        hide = None if window.hide is None else window.hide[row]
        return Window(window.row[row], picked.pos, picked.kv_len, window.max_kv_len, window.dense, hide)


class Reuse(Protocol):
    """A rule of layer reuse; hashable, since it shapes a step. layers: those that reuse."""

    @property
    def layers(self) -> tuple[int, ...]: ...

    def cursor(self) -> Cursor:
        """Where a new request stands."""

    def fresh(self, width: int, since: int, committed: int, remaining: int, drifted: int) -> int:
        """How many positions of a denoising pass run through the layers with reuse; `width` means all.

        width: positions of the pass.
        since: passes since everything was recomputed; negative: never in this block.
        committed: tokens that the row's last forward wrote.
        remaining: open masks of its sub-block.
        drifted: positions over the drift threshold in its last pass.

        The host knows all of them, and so it knows the shapes.
        """

    def allocate(self, model: Model, rows: int) -> Any:
        """Empty state for so many requests, with a tensor `drifted` [rows]."""

    def layers_of(self, state: Any, work: Work) -> LayerRule:
        """What runs the layers of one pass."""


@dataclass
class Cursor:
    """Where a request stands.

    since: passes since reuse last recomputed everything; -1 before it did in this outer block.
    drifted: positions that, in the last pass, had moved away from what is reused.
    """

    rule: Reuse
    since: int = -1
    drifted: int = 0

    def fresh(self, width: int, committed: int, remaining: int) -> int:
        return self.rule.fresh(width, self.since, committed, remaining, self.drifted)

    def took(self, everything: bool, drifted: int) -> None:
        """Take in a pass. The counts of an earlier block say nothing about the first pass of this one."""
        self.drifted = drifted if self.since >= 0 else 0
        self.since = 0 if everything else self.since + 1

    def restart(self) -> None:
        """A new outer block."""
        self.since = -1

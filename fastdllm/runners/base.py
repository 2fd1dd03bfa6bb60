# SPDX-License-Identifier: Apache-2.0
"""What executes the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

from fastdllm.forward import Plan, Shape
from fastdllm.store import Canvas, Room

if TYPE_CHECKING:
    from fastdllm.models import Model


class Outcome(Protocol):
    """What a step returns: tensors whose first dimension are the rows."""

    def head(self, rows: int) -> Any:
        """The first `rows` rows."""


Result = TypeVar("Result", bound=Outcome)
Step = Callable[[Tensor, "Tensor | None", Shape], Result]


class Runner(Protocol):
    """Lends canvases and executes steps on them. Runs that take turns, or run in several threads, get a canvas each.

    `packs`: narrow passes of several widths share a forward. That saves reading the weights once more, and costs time where
    arithmetic is the limit, as on a CPU (a fifth for tiny-fast-dllm-v2 in batches of 16).
    """

    @property
    def packs(self) -> bool: ...

    def canvas(self, model: Model, room: Room) -> AbstractContextManager[Canvas]:
        """A canvas with that room, nobody else's until the context ends."""

    def __call__(
        self, canvas: Canvas, step: Step[Result], key: Hashable, plans: list[Plan], noise: Tensor | None, shape: Shape
    ) -> Result:
        """step(table of the plans on the device, noise, shape). key: of the run; steps of equal keys do the same. The result
        is valid until the next call with this canvas."""

# SPDX-License-Identifier: Apache-2.0
"""Run each step as it stands: one kernel launch after the other. The reference for the captured runners."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fastdllm.forward import Plan, Shape
from fastdllm.runners.base import Result, Step
from fastdllm.store import Canvas, Room, new_canvas

if TYPE_CHECKING:
    from fastdllm.models import Model


class Runner:
    """Allocates a canvas per run and calls the step function on it."""

    packs: ClassVar[bool] = False

    @contextmanager
    def canvas(self, model: Model, room: Room) -> Iterator[Canvas]:
        yield new_canvas(room, model.network.new_store, model.device)

    def __call__(
        self, canvas: Canvas, step: Step[Result], key: Hashable, plans: list[Plan], noise: Tensor | None, shape: Shape
    ) -> Result:
        return step(torch.tensor(plans, dtype=torch.long, device=canvas.x.device), noise, shape)

# SPDX-License-Identifier: Apache-2.0
"""Run each step as it stands: one kernel launch after the other. The reference for the captured runners."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdllm.store import Canvas


class Runner:
    """Allocates a canvas per run and calls the step function on it.

    `packs`: narrow passes of several widths share a forward. That saves reading the weights once more, and costs time where
    arithmetic is the limit, as on a CPU (a fifth for tiny-fast-dllm-v2 in batches of 16).
    """

    packs: ClassVar[bool] = False

    def bind(self, key: Hashable) -> Runner:
        """Names what shapes the step function; nothing is kept between steps here."""
        return self

    def canvas(self, model: Any, rows: int, length: int, shadows: int = 0) -> Canvas:
        """Room for `rows` sequences of `length` positions and the scratch column, and in the store for `shadows` slots."""
        shape = (rows, length + 1)
        return Canvas(
            torch.zeros(shape, dtype=torch.long, device=model.device),
            torch.zeros(shape, dtype=torch.bool, device=model.device),
            torch.zeros(shape, dtype=torch.bool, device=model.device),
            model.network.new_store(rows, length + 1 + shadows),
        )

    def __call__(self, step: Callable[..., Any], plan: list[list[int]], noise: Tensor | None, **static: Any) -> Any:
        """step(plan [R, 14] int64 on the device, noise, **static)."""
        device = step.args[0].device
        return step(torch.tensor(plan, dtype=torch.long, device=device), noise, **static)

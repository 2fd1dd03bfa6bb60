# SPDX-License-Identifier: Apache-2.0
"""Dual cache that also recomputes the block's neighbours (dInfer, arXiv 2510.08666).

Stale keys hurt most where they lie next to the tokens that change; a margin on both sides is kept fresh at every step.
"""

from dataclasses import dataclass
from typing import Annotated

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches import dual


@dataclass(frozen=True)
class Cache(dual.Cache):
    """When stale keys next to the block cost accuracy, for more positions per forward."""

    before: Annotated[int, "Positions recomputed before the block."] = 16
    after: Annotated[int, "Positions recomputed after the block."] = 16

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")

    def step(self, block: Block, progress: Progress) -> Pass:
        start, stop = max(0, block.start - self.before), min(block.total, block.stop + self.after)
        return Pass(start, stop, block.total)

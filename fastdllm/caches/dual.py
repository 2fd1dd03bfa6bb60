# SPDX-License-Identifier: Apache-2.0
"""Dual cache (Fast-dLLM, arXiv 2505.22618): refresh everything when a block opens, then recompute only the block."""

from dataclasses import dataclass

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches.base import CachePlan


@dataclass(frozen=True)
class Cache(CachePlan):
    """The default of LLaDA and Dream."""

    def open(self, block: Block) -> Pass | None:
        return Pass(0, block.total, block.total)

    def step(self, block: Block, progress: Progress) -> Pass:
        return Pass(block.start, block.stop, block.total)

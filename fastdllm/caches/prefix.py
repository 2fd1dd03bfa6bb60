# SPDX-License-Identifier: Apache-2.0
"""Prefix cache (Fast-dLLM, arXiv 2505.22618): refresh everything when a block opens, then recompute from the block on."""

from dataclasses import dataclass

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches.base import CachePlan


@dataclass(frozen=True)
class Cache(CachePlan):
    """What follows the block is fresh at every step; Fast-dLLM's published setting (preset paper)."""

    def open(self, block: Block) -> Pass | None:
        return Pass(0, block.total, block.total)

    def step(self, block: Block, progress: Progress) -> Pass:
        return Pass(block.start, block.total, block.total)

# SPDX-License-Identifier: Apache-2.0
"""Cache of families that read their context causally (Nemotron-Labs-Diffusion, arXiv 2607.05722): finished blocks are exact
and are never recomputed.

Opening a block reads what came before it from left to right: the prompt first, then the block before, whose keys are still
those of its last denoising pass. The last row of that pass predicts the new block's first token.
"""

from dataclasses import dataclass

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches.base import CachePlan


@dataclass(frozen=True)
class Cache(CachePlan):
    """The default of Nemotron."""

    causal = True

    def open(self, block: Block) -> Pass | None:
        return Pass(block.reread or 0, block.start, block.start, causal=True) if block.opens else None

    def step(self, block: Block, progress: Progress) -> Pass:
        return Pass(block.outer_start, block.outer_stop, block.outer_stop)

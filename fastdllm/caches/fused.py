# SPDX-License-Identifier: Apache-2.0
"""Sub-block cache with fewer positions: the pass that commits a block is the first step of the next one.

The network is read once for both, and the new block's positions see the clean keys of the old one in the same forward, as
they would afterwards. When a sub-block begins, `sub_block` recomputes the whole block. `fused` recomputes only the sub-block
before it, whose last tokens are new. While the first token is masked, it also recomputes the position before it, which
predicts that token. Other positions of the block keep the keys of their last pass.
"""

from dataclasses import dataclass
from typing import ClassVar

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches import block as block_cache


@dataclass(frozen=True)
class Cache(block_cache.Cache):
    """Fast-dLLM v2 in large batches, where positions are what a forward costs (its presets balanced and fast)."""

    pure = False
    begins: ClassVar[bool] = True

    def open(self, block: Block) -> Pass | None:
        if not block.opens or block.index == 0:
            return block_cache.Cache.open(self, block)
        return Pass(block.outer_start - block.grid, block.outer_stop, block.outer_stop)

    def step(self, block: Block, progress: Progress) -> Pass:
        if block.index == 0 and progress.outer_step == 0:
            return block_cache.Cache.step(self, block, progress)
        start = max(0, block.start - progress.first_masked)
        if progress.step == 0 and not block.opens:
            start = max(block.outer_start, block.start - block.sub)
        return Pass(start, block.stop, block.outer_stop)

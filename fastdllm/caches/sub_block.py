# SPDX-License-Identifier: Apache-2.0
"""Block cache plus sub-block cache of Fast-dLLM v2 (`use_block_cache`): an approximation inside the block.

The whole block is recomputed while the sub-block's first token is masked, because the row that predicts it lies in the
sub-block before. Afterwards only the sub-block's rows are. The other rows of the block keep the keys of the last whole pass.
"""

from dataclasses import dataclass

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches import block as block_cache


@dataclass(frozen=True)
class Cache(block_cache.Cache):
    """Fast-dLLM v2 in batches on a GPU."""

    pure = False

    def step(self, block: Block, progress: Progress) -> Pass:
        if progress.outer_step == 0 or progress.first_masked:
            return block_cache.Cache.step(self, block, progress)
        # To the grid, also where the answer ends before: the block's other rows see the masks after the end.
        return Pass(block.start, max(block.stop, min(block.start + block.sub, block.outer_stop)), block.outer_stop)

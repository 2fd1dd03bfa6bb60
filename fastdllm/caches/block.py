# SPDX-License-Identifier: Apache-2.0
"""Block cache of Fast-dLLM v2 (arXiv 2509.26328): finished blocks are exact and are never recomputed.

Opening a block commits what came before it: the prompt's whole blocks first, then one block at a time, recomputed from its
clean tokens. The commit's last row predicts the new block's first token.
"""

from dataclasses import dataclass

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches.base import CachePlan


@dataclass(frozen=True)
class Cache(CachePlan):
    """The default of Fast-dLLM v2."""

    block_causal = True

    def open(self, block: Block) -> Pass | None:
        if not block.opens or block.outer_start == 0:
            return None
        committed = 0 if block.index == 0 else block.outer_start - block.grid
        return Pass(committed, block.outer_start, block.outer_start)

    def step(self, block: Block, progress: Progress) -> Pass:
        return Pass(block.outer_start, block.outer_stop, block.outer_stop)

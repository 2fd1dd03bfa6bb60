# SPDX-License-Identifier: Apache-2.0
"""No cache: every forward recomputes everything that the block may see. The reference for the others."""

from dataclasses import dataclass

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches.base import CachePlan


@dataclass(frozen=True)
class Cache(CachePlan):
    """The reference, and the cache for classifier-free guidance."""

    block_causal = None

    def open(self, block: Block) -> Pass | None:
        """A block-causal or causal model learns a block's first token from what lies before it, with or without a cache."""
        if block.reread is not None:
            return Pass(0, block.start, block.start, causal=True) if block.opens else None
        if not block.grid or not block.opens or block.outer_start == 0:
            return None
        return Pass(0, block.outer_start, block.outer_start)

    def step(self, block: Block, progress: Progress) -> Pass:
        end = block.visible_end if block.reread is None else block.outer_stop
        return Pass(0, end, end)

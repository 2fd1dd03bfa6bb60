# SPDX-License-Identifier: Apache-2.0
"""Dual cache with a lazily refreshed prompt: the prompt's keys change little from block to block, so most openings skip it.

The idea is dLLM-Cache's (arXiv 2506.06295), which refreshes the prompt by steps; counted in blocks, a forward still depends
only on the block's content.
"""

from dataclasses import dataclass
from typing import Annotated

from fastdllm.blocks import Block, Pass
from fastdllm.caches import dual


@dataclass(frozen=True)
class Cache(dual.Cache):
    """Long prompts: most blocks open without recomputing the prompt."""

    refresh_blocks: Annotated[int, "The prompt is recomputed when every so many blocks open; 1 is cache dual."] = 4

    def __post_init__(self) -> None:
        if self.refresh_blocks < 1:
            raise ValueError(f"refresh_blocks={self.refresh_blocks} must be at least 1")

    def open(self, block: Block) -> Pass | None:
        return Pass(0 if block.index % self.refresh_blocks == 0 else block.prompt, block.total, block.total)

# SPDX-License-Identifier: Apache-2.0
"""Dual cache whose far masks are invisible (DPad, arXiv 2508.14148; Streaming-dLLM, arXiv 2601.17917).

Masks far beyond the block tell the model little, yet every query attends to them. Only the `suffix` nearest and the last
one stay visible; the last marks where the answer ends.
"""

from dataclasses import dataclass, replace

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches import dual


@dataclass(frozen=True)
class Cache(dual.Cache):
    """suffix: visible positions after the block; gen_length or more is the dual cache."""

    suffix: int = 64

    def __post_init__(self) -> None:
        if self.suffix < 0:
            raise ValueError(f"suffix={self.suffix} must be at least 0")

    def open(self, block: Block) -> Pass | None:
        return self._hidden(dual.Cache.open(self, block), block)

    def step(self, block: Block, progress: Progress) -> Pass:
        return self._hidden(dual.Cache.step(self, block, progress), block)

    def _hidden(self, p: Pass, block: Block) -> Pass:
        first, last = block.stop + self.suffix, block.total - 1
        return replace(p, hide=(first, last)) if first < last else p

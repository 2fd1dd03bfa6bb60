# SPDX-License-Identifier: Apache-2.0
"""Dual cache whose far masks are left out (DPad, arXiv 2508.14148; Streaming-dLLM, arXiv 2601.17917).

Masks far beyond the block tell the model little, yet every query attends to them, and every opening recomputes them. Here
only the `suffix` nearest are seen, and the answer's last position, which marks where it ends. The others are computed and
hidden. With `keep_last=False` the last position is not seen, and none of them is computed.
"""

from dataclasses import dataclass
from typing import Annotated

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches import dual, lazy


@dataclass(frozen=True)
class Cache(lazy.Cache):
    """Long answers: masks far from the block are left out (presets balanced and fast, not of Fast-dLLM v2)."""

    refresh_blocks: Annotated[int, "The prompt is recomputed when every so many blocks open; 1 each time."] = 1
    suffix: Annotated[int, "Visible positions after the block; gen_length or more shows all."] = 64
    keep_last: Annotated[bool, "The last position of the answer is visible too; false leaves the far masks out."] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suffix < 0:
            raise ValueError(f"suffix={self.suffix} must be at least 0")

    def open(self, block: Block) -> Pass | None:
        return self._without_far(lazy.Cache.open(self, block), block)

    def step(self, block: Block, progress: Progress) -> Pass:
        return self._without_far(dual.Cache.step(self, block, progress), block)

    def _without_far(self, p: Pass, block: Block) -> Pass:
        near, last = block.stop + self.suffix, block.total - 1
        if not self.keep_last:
            return p._replace(stop=min(p.stop, near), read=min(p.read, near))
        return p._replace(hide=(near, last)) if near < last else p

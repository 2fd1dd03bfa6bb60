# SPDX-License-Identifier: Apache-2.0
"""Dual cache whose denoising passes run each layer only for part of the block (dLLM-Cache, arXiv 2506.06295; likewise SPA,
arXiv 2602.02544, and ES-dLLM, arXiv 2603.10088).

From step to step most positions of a block hardly change. Each layer runs for a fixed share of them, those whose values
moved most since they last ran there (`reuse/values.py`), and every few passes the whole block runs. So a forward depends on
the steps before it. What is saved is arithmetic, not reading weights: it is for large batches, not for batch 1. More
positions have to run than a step commits, else the next tokens rest on states that did not see the last ones.

The passes that open a block run every layer for all that they recompute. Where they take most of the positions,
`keep_last=False` leaves out masks beyond `suffix`, and `refresh_blocks` the prompt, as in the cache `suffix_window`.
"""

from dataclasses import dataclass
from typing import Annotated

from fastdllm.caches import suffix_window
from fastdllm.reuse.values import ValueReuse


@dataclass(frozen=True)
class Cache(suffix_window.Cache):
    """Large batches and many steps a block: what is saved is arithmetic, not reading weights."""

    suffix: Annotated[int, "Visible positions after the block; gen_length or more shows all."] = 1_000_000
    ratio: Annotated[float, "Share of the block that runs in each layer, rounded up; 1 runs all."] = 0.25
    refresh: Annotated[int, "All of the block runs in every so many of its passes, the first included (paper: 5 to 8)."] = 7

    pure = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} must lie in (0, 1]")
        if self.refresh < 1:
            raise ValueError(f"refresh={self.refresh} must be at least 1")

    def reuse(self, layers: int, size: int) -> ValueReuse | None:
        return ValueReuse(self.refresh, tuple(range(layers)), self.ratio, size) if self.ratio < 1 else None

# SPDX-License-Identifier: Apache-2.0
"""Geometry in plain integers: which positions are decoded together (`Block`), which ones a forward recomputes (`Pass`).

LLaDA and Dream cut the answer into blocks that start at the end of the prompt (`prompt_aligned`). Fast-dLLM v2 cuts the
whole sequence on a fixed grid, so that a finished block's keys never change, and decodes each block sub-block by sub-block
(`grid_aligned`); the tail of the prompt then lies inside the first generated block as known tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Positions that are decoded together.

    start, stop: the positions [start, stop).
    outer_start, outer_stop: the block around a sub-block; without sub-blocks the block itself.
    visible_end: the end of what this block's queries may see: the whole canvas for a bidirectional model, `outer_stop` for a
        block-causal one.
    index: counts the outer blocks of the row, from 0.
    opens: whether this is the first (sub-)block of its outer block.
    prompt, total: of the row, whose answer is [prompt, total).
    grid: the size of grid-aligned blocks, 0 for prompt-aligned ones.
    """

    start: int
    stop: int
    outer_start: int
    outer_stop: int
    visible_end: int
    index: int
    opens: bool
    prompt: int
    total: int
    grid: int = 0

    @property
    def reach(self) -> int:
        """The old name of `visible_end`."""
        warnings.warn("Block.reach is now Block.visible_end", DeprecationWarning, stacklevel=2)
        return self.visible_end


@dataclass(frozen=True)
class Pass:
    """One forward of one row.

    start, stop: the positions [start, stop) are recomputed, and their slots of the store overwritten.
    read: they see the slots [0, read) ...
    hide: ... without [hide[0], hide[1]).
    """

    start: int
    stop: int
    read: int
    hide: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Progress:
    """Where a row stands in its block, known to the host.

    step: denoising forwards spent on this block.
    outer_step: on its outer block.
    first_masked: whether the block's first position is still masked.
    """

    step: int
    outer_step: int
    first_masked: bool


Geometry = Callable[[int, int], list[Block]]


def prompt_aligned(size: int) -> Geometry:
    """Blocks of `size` positions from the end of the prompt; the last one may be shorter."""

    def blocks(prompt: int, total: int) -> list[Block]:
        starts = range(prompt, total, size)
        out = []
        for index, start in enumerate(starts):
            stop = min(start + size, total)
            out.append(
                Block(
                    start=start, stop=stop, outer_start=start, outer_stop=stop, visible_end=total, index=index, opens=True,
                    prompt=prompt, total=total,
                )
            )  # fmt: skip
        return out

    return blocks


def grid_aligned(size: int, sub: int) -> Geometry:
    """Blocks of `size` on the grid 0, size, 2 size, ..., each decoded in sub-blocks of `sub` positions (v2).

    Blocks and sub-blocks without an open position are left out. The last block reaches to the grid even when the answer
    ends before: the model was trained on whole blocks, so the positions after `total` stay visible as masks and are never
    decoded.
    """
    if size % sub:
        raise ValueError(f"small_block_size={sub} must divide block_length={size}")

    def blocks(prompt: int, total: int) -> list[Block]:
        out: list[Block] = []
        for index, outer in enumerate(range(prompt // size * size, total, size)):
            opens = True
            for start in range(outer, outer + size, sub):
                if start + sub <= prompt or start >= total:
                    continue
                stop = min(start + sub, total)
                out.append(
                    Block(
                        start=start, stop=stop, outer_start=outer, outer_stop=outer + size, visible_end=outer + size,
                        index=index, opens=opens, prompt=prompt, total=total, grid=size,
                    )
                )  # fmt: skip
                opens = False
        return out

    return blocks

# SPDX-License-Identifier: Apache-2.0
"""Geometry in plain integers: which positions are decoded together (`Block`), which ones a forward recomputes (`Pass`).

LLaDA and Dream cut the answer into blocks that start at the end of the prompt (`prompt_aligned`). Fast-dLLM v2 cuts the
whole sequence on a fixed grid, so that a finished block's keys never change, and decodes each block sub-block by sub-block
(`grid_aligned`); the tail of the prompt then lies inside the first generated block as known tokens. Nemotron's blocks start
at the end of the prompt too, and see nothing after themselves (`causal_aligned`); what is drafted and verified has no fixed
blocks and begins anew after each accepted token (`sliding`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple


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
    grid, sub: the sizes of grid-aligned blocks and of their sub-blocks, 0 for prompt-aligned ones.
    reread: in a family that reads its context causally, the first position that was not read in that way yet when the block
        opens; None in other families.
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
    sub: int = 0
    reread: int | None = None

    @property
    def reach(self) -> int:
        """The old name of `visible_end`."""
        warnings.warn("Block.reach is now Block.visible_end", DeprecationWarning, stacklevel=2)
        return self.visible_end


class Pass(NamedTuple):  # one is made for each row and forward, and a frozen dataclass takes several times as long to make
    """One forward of one row.

    start, stop: the positions [start, stop) are recomputed, and their slots of the store overwritten.
    read: they see the slots [0, read) ...
    hide: ... without [hide[0], hide[1]).
    causal: the pass is read from left to right: no position sees a later one, and each predicts the next. For families that
        read their context causally; they do so in their other passes too, before the block's `outer_start`.
    """

    start: int
    stop: int
    read: int
    hide: tuple[int, int] = (0, 0)
    causal: bool = False


class Progress(NamedTuple):
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


def causal_aligned(size: int) -> Geometry:
    """Blocks of `size` positions from the end of the prompt that see nothing after themselves (Nemotron)."""

    def blocks(prompt: int, total: int) -> list[Block]:
        plain = prompt_aligned(size)(prompt, total)
        begun = [0, *(block.start for block in plain)]
        return [replace(block, visible_end=block.stop, reread=start) for block, start in zip(plain, begun, strict=False)]

    return blocks


def sliding(size: int) -> Geometry:
    """A block of `size` positions at each position of the answer, for tokens that are drafted and verified.

    A row goes from one of them to that which follows its last accepted token. That token's keys are not known yet, so it is
    the first position of a pass; the pass has `size` positions in all and predicts the block's last one by reading from left
    to right only.
    """

    def blocks(prompt: int, total: int) -> list[Block]:
        out = []
        for index, start in enumerate(range(prompt, total)):
            stop = min(start + size, total)
            out.append(
                Block(
                    start=start, stop=stop, outer_start=start - 1, outer_stop=stop - 1,
                    visible_end=stop, index=index, opens=index == 0, prompt=prompt, total=total, reread=0,
                )
            )  # fmt: skip
        return out

    return blocks


def grid_aligned(size: int, sub: int, at_prompt: bool = False) -> Geometry:
    """Blocks of `size` on the grid 0, size, 2 size, ..., each decoded in sub-blocks of `sub` positions (v2).

    Blocks and sub-blocks without an open position are left out. The last block reaches to the grid even when the answer
    ends before: the model was trained on whole blocks, so the positions after `total` stay visible as masks and are never
    decoded. at_prompt: the grid begins at the prompt's end, and the last block ends with the answer (A2D's bd3lm).
    """
    if size % sub:
        raise ValueError(f"small_block_size={sub} must divide block_length={size}")

    def blocks(prompt: int, total: int) -> list[Block]:
        out: list[Block] = []
        for index, outer in enumerate(range(prompt if at_prompt else prompt // size * size, total, size)):
            opens, end = True, min(outer + size, total) if at_prompt else outer + size
            for start in range(outer, end, sub):
                if start + sub <= prompt or start >= total:
                    continue
                stop = min(start + sub, total)
                out.append(
                    Block(
                        start=start, stop=stop, outer_start=outer, outer_stop=end, visible_end=end,
                        index=index, opens=opens, prompt=prompt, total=total, grid=size, sub=sub,
                    )
                )  # fmt: skip
                opens = False
        return out

    return blocks

# SPDX-License-Identifier: Apache-2.0
"""Which rows share a forward, and the shape of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastdllm.blocks import Pass
from fastdllm.decoding import Decoding
from fastdllm.engine.row import Row
from fastdllm.forward import ALTERNATIVES, Plan, Shape
from fastdllm.store import block_end

NARROW = 64  # up to this width passes are grouped by equal width, or packed; above it they are padded to a multiple of it
PASS_TOKENS = 16384  # positions of one forward at most: bounds the activations, and a wide pass gains nothing beyond


class Turn(NamedTuple):
    """One row's part of a round: its pass, that pass's width, how many positions of it run through layers with reuse (None:
    reuse has no part), and its shadow positions."""

    row: Row
    work: Pass
    width: int
    fresh: int | None
    shadows: int

    @property
    def through(self) -> int:
        """Positions that run through the layers with reuse."""
        return self.width if self.fresh is None else self.fresh


@dataclass(frozen=True)
class Batch:
    """Turns that share one forward."""

    turns: list[Turn]
    shape: Shape

    @cached_property
    def rows(self) -> list[Row]:
        return [turn.row for turn in self.turns]

    def plans(self, shift: int) -> list[Plan]:
        return [turn.row.plan(turn.work, turn.through, shift) for turn in self.turns]

    def noise(self, run: Decoding, vocab: int) -> Tensor | None:
        """The step's draws, see `Sampler.draw`."""
        generators: list[torch.Generator | None] = [row.generator for row in self.rows]
        if not any(generators):  # `draw` says so too, but most steps need not ask
            return None
        drawn, widths = [row.drawn for row in self.rows], [row.widest for row in self.rows]
        return run.sampler.draw(generators, run.block_length, vocab, drawn, widths)

    def advance(self, run: Decoding, status: list[list[int]], layers: int) -> None:
        """Each row takes in what the forward did and what it cost."""
        lanes = 2 if run.guidance else self.shape.branches
        for turn, (remaining, stopped, first_masked, drifted, new) in zip(self.turns, status, strict=True):
            row, positions, skipped = turn.row, turn.width * lanes + turn.shadows, 0
            if turn.fresh is not None:
                skipped = (turn.width - turn.fresh) * len(run.reuse.layers)
                row.reuse.took(turn.fresh == turn.width, drifted)
            row.cost.add(positions, positions * layers - skipped)
            if run.decoder.drafts and not turn.work.causal and not row.opening:
                row.draft()
            else:
                slides = run.decoder.drafts and not run.decoder.in_blocks
                edits = run.decoder.edits and row.reads_again(remaining, new, run.decoder.max_post_steps)
                row.advance(remaining, bool(stopped), bool(first_masked), turn.work.stop * slides, edits)


def batches(rows: list[Row], run: Decoding, shift: int, packs: bool) -> Iterator[Batch]:
    """One round: every row gets one forward, wide passes first, rows with like passes together.

    What may not share a forward: passes of different widths (narrow ones may where the runner `packs` them; with reuse they
    are padded to the widest); passes in which reuse has a part and others (opening passes of a block may where narrow ones
    do: all layers run for them, and what reuse keeps of them is overwritten by the next pass, which recomputes all); with
    several branches, opening passes, which run for one branch of each row; rows with shadows and rows without.
    """
    shadow = run.block_length * (1 + shift) if run.decoder.shadow else 0
    buckets: dict[tuple[int, bool, bool, int], list[Turn]] = {}
    branches = run.decoder.branches > 1
    for row in rows:
        work = row.next_pass(run)
        width = work.stop - work.start
        # Most runs have neither shadows nor reuse, and the device waits for this loop.
        narrow, shadows, fresh, reuses = width <= NARROW, 0, None, False
        if shadow:
            shadows = shadow * row.revocable
        if run.reuse is not None:
            fresh = row.fresh(width)
            reuses = fresh is not None or (packs and narrow and row.reuse_restarts)
        apart = branches and row.opening
        exact = narrow and (not packs or apart or shadows)
        bucket = width if exact else -(-width // NARROW) * NARROW
        buckets.setdefault((bucket, reuses, apart, shadows), []).append(Turn(row, work, width, fresh, shadows))
    for bucket in sorted(buckets, reverse=True):
        turns, most = buckets[bucket], max(1, PASS_TOKENS // ((bucket[0] + bucket[-1]) * run.lanes))
        for i in range(0, len(turns), most):
            yield Batch(turns[i : i + most], shape_of(turns[i : i + most], run, packs))


def shape_of(turns: list[Turn], run: Decoding, packs: bool) -> Shape:
    """The shape of the forward that these turns share."""
    widths, shadows, rows = [turn.width for turn in turns], turns[0].shadows, [turn.row for turn in turns]
    keys = max(row.block.visible_end for row in rows) + shadows if shadows else max(turn.work.read for turn in turns)
    branches = 1 if rows[0].opening else run.decoder.branches
    packed, fresh, count = 0, None, 0
    if any(turn.fresh is not None for turn in turns):
        fresh, count = parts([turn.through for turn in turns], widths, packs)
    elif min(widths) < max(widths) <= NARROW:
        packed = (2 if run.guidance else branches) * sum(widths)
    return Shape(
        width=max(widths),
        max_kv_len=keys,
        dense=all(t.work.read == keys and t.work.hide == (0, 0) and sees_alike(t, run) for t in turns),
        branches=branches,
        shadows=shadows,
        packed=packed,
        fresh=fresh,
        pieces=count,
        drawn=any(row.drawn for row in rows),
        truncated=any(row.truncated for row in rows),
        alternatives=ALTERNATIVES * any(row.request.alternatives for row in rows),
    )


def parts(fresh: list[int], widths: list[int], packs: bool) -> tuple[int, int]:
    """The size and the number of the pieces in which layers with reuse run for `fresh` positions of each row.

    (0, 0) where all rows run whole. With `packs` sizes are few, so that a runner captures few shapes.
    """
    width = max(widths)
    if fresh == widths:
        return 0, 0
    sizes = {min(width, 1 << (n - 1).bit_length()) if packs else n for n in fresh if n}

    def cost(size: int) -> int:
        """Positions, and two for each piece, which reads its row's keys anew."""
        return sum(-(-n // size) for n in fresh) * (size + 2)

    size = min(sorted(sizes, reverse=True), key=cost, default=1)
    return size, sum(-(-n // size) for n in fresh)


def sees_alike(turn: Turn, run: Decoding) -> bool:
    """Whether all queries of a pass see the same: in a bidirectional model always, in a block-causal one within a block, in
    one that reads its context causally within the open block."""
    work, size = turn.work, run.block_causal
    if work.causal:
        return False
    if run.causal:
        return work.start >= turn.row.block.outer_start
    origin = turn.row.block.prompt if run.grid_at_prompt else 0
    return not size or block_end(work.start, size, origin) == block_end(work.stop - 1, size, origin)

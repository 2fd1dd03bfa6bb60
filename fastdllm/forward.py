# SPDX-License-Identifier: Apache-2.0
"""What one forward is: its static `Shape`, the `Plan` of its rows, and the `Window` that the network gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

PIECE = 8  # positions of a packed pass that attention takes together: what Fast-dLLM v2 recomputes of a block
ALTERNATIVES = 20  # likeliest tokens of a position that a step can name


@dataclass(frozen=True)
class Shape:
    """What fixes the tensors' shapes: a forward of the same shape, on the same canvas and for the same run, replays a graph.

    width: positions of the widest pass, W.
    max_kv_len: slots that any of the queries may see.
    dense: every query sees all `max_kv_len` slots, so that no mask is needed.
    branches: branches that run; 1 while all of them hold the same tokens.
    shadows: query positions appended to each row (`engine/shadows.py`).
    packed: positions of all rows and their lanes, one after the other, where passes are of unequal widths; 0 where all run
        to W.
    fresh: positions of a piece that runs through layers with reuse; 0 where every row runs whole; None where reuse has no
        part in this forward.
    pieces: pieces of `fresh` positions.
    drawn: some row draws its tokens, so that the logits themselves are needed.
    truncated: some row that draws them leaves out unlikely ones.
    alternatives: likeliest tokens to name at each position, 0 or ALTERNATIVES.
    """

    width: int
    max_kv_len: int
    dense: bool
    branches: int = 1
    shadows: int = 0
    packed: int = 0
    fresh: int | None = None
    pieces: int = 0
    drawn: bool = False
    truncated: bool = False
    alternatives: int = 0

    def positions(self, rows: int) -> int:
        """Positions that a forward of `rows` rows computes, in all lanes where it is packed and otherwise in each."""
        return self.packed or rows * self.width


class Plan(NamedTuple):
    """One row of a forward: ints on the host, int64 columns [R] on the device. Only this class knows their order.

    row: the row of the canvas and the store.
    lane: how many rows apart the lanes of a request lie.
    slot: where the request's own numbers and the states of its rules lie.
    scratch: the position that padding reads and writes.
    start, stop: the pass, [start, stop).
    read, hide_start, hide_stop: the pass sees the slots [0, read) without [hide_start, hide_stop).
    causal: positions before it see none after themselves, where the family reads its context causally.
    visible_end: end of what the block's queries may ever see.
    first, end: the block's positions, [first, end).
    prompt: length of the prompt.
    first_only: 1 if the pass predicts the block's first token only.
    step: forwards spent on the block.
    forward: the number of this forward of the request, from 1.
    initial: masks when the block opened.
    fresh: positions that run through layers with reuse.
    """

    row: Any
    lane: Any
    slot: Any
    scratch: Any
    start: Any
    stop: Any
    read: Any
    hide_start: Any
    hide_stop: Any
    causal: Any
    visible_end: Any
    first: Any
    end: Any
    prompt: Any
    first_only: Any
    step: Any
    forward: Any
    initial: Any
    fresh: Any

    @classmethod
    def columns(cls, table: Tensor) -> Plan:
        """table [R, len(Plan._fields)] -> its columns [R]."""
        return cls(*table.t().contiguous().unbind(0))

    @classmethod
    def idle(cls, slot: int, scratch: int, width: int) -> Plan:
        """A row that fills up a graph: row 0 of the canvas, which no request gets.

        Its pass is padding, it takes no place in a packed forward, and its block is one position that never counts. All
        that it writes, that position's shadow included, lies up to `scratch`.
        """
        return cls(
            row=0, lane=0, slot=slot, scratch=scratch, start=0, stop=0, read=width, hide_start=0, hide_stop=0,
            causal=0, visible_end=1, first=0, end=1, prompt=0, first_only=0, step=0, forward=0, initial=1, fresh=0,
        )  # fmt: skip


@dataclass(frozen=True)
class Look:
    """The attention between the positions of R blocks, which the last layer of a forward is asked for.

    The paper that first used it found no better layer (arXiv 2606.10829, table 6).

    row: [R], the rows' places in the store.
    first: [R], the first query of each row among all queries of the forward.
    source: [R, Q], which query of its row, counted from that one, predicts each position of the block.
    slot: [R, Q], the slots of the block's positions.
    hide: [R, 2], slots that are not seen; None where all are.
    out: [R, Q, Q] fp32, where it goes: how much the query that predicts i attends to the slot of j, the mean over heads.
    """

    row: Tensor
    first: Tensor
    source: Tensor
    slot: Tensor
    hide: Tensor | None
    out: Tensor


@dataclass(frozen=True)
class Window:
    """What one forward recomputes and sees, as tensors (R rows of the batch, W positions each).

    row: [R], the row's place in the store.
    pos: [R, W], the positions that are recomputed; their slots are overwritten.
    kv_len: [R, W], each query sees the slots [0, kv_len), except [hide[0], hide[1]).
    max_kv_len: bounds every `kv_len`.
    dense: whether every `kv_len` equals it and nothing is hidden, so that no mask is needed.
    hide: [R, 2], slots that are not seen; None where all are.
    slot: [R, W], with shadows: where the keys and values go, if not to `pos`.
    swap: [R, W, 3], with shadows: the slots that a query sees in place of others (`kernels.attention`).
    look: what to say of the attention between a block's positions; None where nobody asks.
    together: [G, PIECE], of a packed forward, whose rows have one position each: which of them stand in the same place of
        the store, so that attention takes them together; R where there is none.
    """

    row: Tensor
    pos: Tensor
    kv_len: Tensor
    max_kv_len: int
    dense: bool = False
    hide: Tensor | None = None
    slot: Tensor | None = None
    swap: Tensor | None = None
    look: Look | None = None
    together: Tensor | None = None

# SPDX-License-Identifier: Apache-2.0
"""A request on its way through its blocks, as the host sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.decoding import Decoding
from fastdllm.forward import Plan

if TYPE_CHECKING:
    from fastdllm.reuse.base import Cursor


class NothingCommitted(RuntimeError):
    """A forward committed nothing that it should have; `number` is the request's. Without this error it would never end."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Request:
    """What is asked for.

    prompt: [P] int64, token ids on the CPU or the model's device.
    length: how many new positions.
    seed: of the request's own random draws.
    fixed: {position in the answer: token id}, present from the start and never masked.
    stop_ids: tokens that end the answer; None for the run's.
    numbers: own values in place of the run's, by name (`Decoding.numbers`): temperature, threshold, ...
    ends: called after each block with the answer so far [N] on the CPU; True ends the request.
    alternatives: how many of each position's likeliest tokens a traced step names, up to `forward.ALTERNATIVES`.
    """

    prompt: Tensor
    length: int
    seed: int = 0
    fixed: Mapping[int, int] = field(default_factory=dict)
    stop_ids: tuple[int, ...] | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    ends: Callable[[Tensor], bool] | None = None
    alternatives: int = 0


@dataclass
class Cost:
    """What a request has cost.

    forwards: model calls.
    positions: what they recomputed, in every lane and shadow.
    layer_tokens: those positions times the layers that ran for them.
    cached: positions of the prompt that an earlier request had computed.
    """

    forwards: int = 0
    positions: int = 0
    layer_tokens: int = 0
    cached: int = 0

    def add(self, positions: int, layer_tokens: int) -> None:
        self.forwards += 1
        self.positions += positions
        self.layer_tokens += layer_tokens


@dataclass
class Result:
    """A finished request, on the model's device.

    ids: [P + length] int64. Masks are left only after a stop token, or after the block at which `ends` said that it is
        enough.
    logprobs: [length] fp32, of each token when it was committed, untempered; NaN where none was (fixed tokens, masks).
    committed_at: [length] int64, the request's forward that committed the token, from 1; 0 for a fixed token or a mask.
    stopped: a stop token or `ends` ended the request before its length did.
    cost: see `Cost`.
    """

    ids: Tensor
    logprobs: Tensor
    committed_at: Tensor
    cost: Cost
    stopped: bool = False

    @property
    def broken(self) -> bool:
        """Whether the model's output was not a number where a token was committed, so that the token means nothing."""
        return bool((self.logprobs.isnan() & (self.committed_at > 0)).any())  # sync: once an answer, which is read anyway

    @property
    def forwards(self) -> int:
        return self.cost.forwards

    @property
    def positions(self) -> int:
        return self.cost.positions

    @property
    def layer_tokens(self) -> int:
        return self.cost.layer_tokens

    @property
    def cached(self) -> int:
        return self.cost.cached


@dataclass(frozen=True)
class Place:
    """Where a request lies: its first row of the canvas, the units of each of its lanes, and its slot for numbers."""

    row: int
    size: int
    slot: int
    scratch: int


@dataclass
class Row:
    """A request, its place on the canvas, and where it stands.

    number: of the request.
    drawn, truncated: whether it draws its tokens, and leaves out unlikely ones.
    reuse: where layer reuse stands.
    at: index of the current block.
    opening: whether its next forward opens the block.
    first_masked: whether the block's first position is masked.
    step, denoised, outer_step: forwards of this block that told something of it, those after its opening pass, and those
        of the outer block.
    initial, remaining: masks when the block opened, and now.
    committed: tokens that the last forward gained.
    post_steps: forwards over the block since it is full, of a decoder that edits.
    stopped: it ended before its length did.
    drafted: whether the block holds drafts that wait to be verified.
    prefix: token ids of the prompt's blocks, where they may be shared.
    clean: slots [0, clean) hold keys and values of finished blocks, which never change any more.
    widest: positions of its widest block.
    block: the current one.
    first: its first position that belongs to the answer.
    """

    number: int
    request: Request
    blocks: list[Block]
    place: Place
    generator: torch.Generator | None = None
    drawn: bool = False
    truncated: bool = False
    reuse: Cursor | None = None
    at: int = 0
    opening: bool = True
    first_masked: bool = True
    finished: bool = False
    stopped: bool = False
    drafted: bool = False
    step: int = 0
    denoised: int = 0
    outer_step: int = 0
    initial: int = 0
    remaining: int = 0
    committed: int = 0
    post_steps: int = 0
    cost: Cost = field(default_factory=Cost)
    prefix: list[bytes] = field(default_factory=list)
    clean: int = 0
    widest: int = field(init=False)
    block: Block = field(init=False)
    first: int = field(init=False)

    def __post_init__(self) -> None:
        self.widest = max(block.stop - max(block.start, block.prompt) for block in self.blocks)
        self._enter()

    @property
    def revocable(self) -> bool:
        """Whether the block holds a token that decoding chose."""
        return self.remaining < self.initial

    def _enter(self) -> None:
        self.block = self.blocks[self.at]
        self.first = max(self.block.start, self.block.prompt)
        fixed = sum(self.first <= self.block.prompt + offset < self.block.stop for offset in self.request.fixed)
        self.initial = self.remaining = self.block.stop - self.first - fixed

    def next_pass(self, run: Decoding) -> Pass:
        """What the next forward recomputes: the cache's plan, and at least `lookback` positions before the block."""
        opening = run.cache.open(self.block) if self.opening else None
        self.opening = opening is not None
        if opening and (self.block.grid or self.block.reread is not None):
            opening = self._after_clean(opening)
        p = opening or run.cache.step(self.block, Progress(self.denoised, self.outer_step, self.first_masked))
        if run.decoder.drafts and not opening:  # the pass that drafts, and again from left to right the one that verifies
            return self._verifying(p) if self.drafted or self.remaining < 2 else p
        return p._replace(start=min(p.start, self.block.start - run.lookback)) if run.lookback else p

    def _verifying(self, p: Pass) -> Pass:
        """The pass `p` from left to right, in a block-causal family without the finished blocks, which are not read so."""
        if self.block.grid:
            p = p._replace(start=self.block.outer_start, stop=self.block.stop, read=self.block.stop)
        return p._replace(causal=True)

    def _after_clean(self, opening: Pass) -> Pass:
        """The pass without what an earlier request computed; it makes the blocks before this one clean."""
        if self.at == 0 and opening.start < self.clean < opening.stop:
            opening = opening._replace(start=self.clean)
        if opening.start <= self.clean and opening.read >= opening.stop:
            self.clean = max(self.clean, min(opening.stop, self.block.outer_start))
        return opening

    def fresh(self, width: int) -> int | None:
        """Positions of a pass of `width` that run through layers with reuse; None in an opening pass and without reuse."""
        return None if self.reuse is None or self.opening else self.reuse.fresh(width, self.committed, self.remaining)

    @property
    def reuse_restarts(self) -> bool:
        """Whether this is the opening pass of an outer block, after which layer reuse recomputes everything."""
        return self.opening and self.block.opens and self.reuse is not None and self.reuse.since < 0

    def plan(self, work: Pass, fresh: int, shift: int) -> Plan:
        """shift: of a model whose opening passes predict a block's first token only, else 0."""
        block, place = self.block, self.place
        return Plan(
            row=place.row, lane=place.size, slot=place.slot, scratch=place.scratch, start=work.start, stop=work.stop,
            read=work.read, hide_start=work.hide[0], hide_stop=work.hide[1],
            causal=self._causal(work), visible_end=block.visible_end,
            first=self.first, end=block.stop, prompt=block.prompt, first_only=int(bool(shift and self.opening)),
            step=self.step, forward=self.cost.forwards + 1, initial=self.initial, fresh=fresh,
        )  # fmt: skip

    def _causal(self, work: Pass) -> int:
        """Positions before it see none after themselves; the context does so in families that read it causally."""
        return work.stop if work.causal else 0 if self.block.reread is None else self.block.outer_start

    def draft(self) -> None:
        """Take in that a forward drafted the block's tokens."""
        self.step, self.denoised, self.outer_step = self.step + 1, self.denoised + 1, self.outer_step + 1
        self.drafted = True

    def reads_again(self, remaining: int, new: int, most: int) -> bool:
        """Whether a decoder that edits reads the block again, after a forward that left so many masks and wrote so many
        tokens: a full one is read until nothing changes, and `most` times."""
        self.post_steps += not self.remaining
        return bool(not remaining and new and self.post_steps < most)

    def advance(
        self, remaining: int, stopped: bool, first_masked: bool, verified: int = 0, reads_again: bool = False
    ) -> None:
        """Take in what a forward did; go on to the next block when this one is full and is not read again, or in any case
        where drafts were `verified` up to that position.

        Raises NothingCommitted for a denoising pass that left as many masks as there were.
        """
        if self.remaining and remaining >= self.remaining and not self.opening:
            raise NothingCommitted(
                self.number,
                f"request {self.number}: a forward over its block at positions {self.block.start}..{self.block.stop - 1} "
                f"committed none of {self.remaining} masks; a decoder must commit more than it remasks",
            )
        self.step += not self.opening or remaining < self.remaining
        self.denoised += not self.opening
        self.outer_step += not self.opening
        self.opening = self.drafted = False
        self.committed, self.remaining = self.remaining - remaining, remaining
        self.first_masked = first_masked and self.block.start >= self.block.prompt
        if reads_again:
            return
        self.stopped = stopped
        self.finished = stopped or (remaining == 0 and self.block.stop == self.blocks[-1].stop)
        if verified and not self.finished:
            self._go_to(self._after_accepted(verified) - self.block.prompt)
        elif remaining == 0 and not self.finished:
            self._go_to(self.at + 1)

    def _after_accepted(self, verified: int) -> int:
        """Where drafting goes on: after the last position that was filled, before which all keys are final; where only fixed
        tokens were read, after them."""
        block = self.block
        opened = [p for p in range(block.start, block.stop) if p - block.prompt not in self.request.fixed]
        filled = opened[: len(opened) - self.remaining]
        return (filled[-1] if filled else verified) + 1

    def _go_to(self, at: int) -> None:
        self.at, self.drafted, self.post_steps = at, False, 0
        self.opening, self.first_masked, self.step, self.denoised = True, True, 0, 0
        self._enter()
        if self.block.opens:
            self.outer_step = 0
            if self.reuse is not None:
                self.reuse.restart()

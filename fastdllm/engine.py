# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: open a block, step until it holds no mask, go on to the next.

Every row of the batch walks through its own blocks. In each round every row gets one forward, which rows with passes of
about the same width share, on a GPU also those with narrow passes of any width. So no row waits for another, a row gives
in a batch what it gives alone, and a row that finishes leaves its place to the next request.

    round:  rows -> groups of like passes -> one forward each -> commit -> one host read -> each row moves on

The choices are arguments: `geometry` cuts the answer into blocks, `cache` plans which positions a forward recomputes,
`sampler` scores the logits, `decoder` chooses what to commit, `runner` executes. Alphabet: B rows of the canvas, R rows of
one forward, W positions of a pass, Q positions of a block, C width of the model, V vocabulary.

A decoder may try several contents of a block at once. These branches are neighbours on the canvas and in the store and run
in the same forward; branch 0 is the row's content, and the others take it over whenever a block is full. One that takes
tokens back gets shadow queries, further positions of the same forward (`shadows.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdllm.blocks import Block, Geometry, Pass, Progress
from fastdllm.branches import fan_out, first_of, forward_first
from fastdllm.packing import forward_packed, pieces
from fastdllm.shadows import Widened, widen
from fastdllm.store import Canvas, Window
from fastdllm.view import View

if TYPE_CHECKING:
    from fastdllm.caches.base import CachePlan
    from fastdllm.decoders.base import DecoderRule
    from fastdllm.models import Model
    from fastdllm.reuse import LayerReuse
    from fastdllm.reuse.values import ValueReuse
    from fastdllm.sampling import Sampler

NARROW = 64  # passes up to this width share a forward at equal width or packed; wider ones are padded to the next multiple
PASS_TOKENS = 16384  # positions of one forward at most: bounds the activations, and a wide pass gains nothing beyond


@dataclass(frozen=True)
class Request:
    """One prompt [P] int64 and what is asked for: `length` new positions, the `seed` of its draws, and `fixed` tokens by
    position of the answer (constraints: present from the start, never masked). `ends`, if given, is asked after each block
    whether the answer so far [N], on the CPU, is enough."""

    prompt: Tensor
    length: int
    seed: int = 0
    fixed: dict[int, int] = field(default_factory=dict)
    ends: Callable[[Tensor], bool] | None = None


@dataclass
class Row:
    """A request on its way through its blocks, as the host sees it.

    `step` counts the forwards of the current block, `denoised` and `outer_step` those after its opening pass (of the block,
    of the outer block). `remaining` masks are left in the block, `committed` tokens it gained with the last forward.
    `since_refresh` counts passes since layer reuse last recomputed everything, -1 before it did in this outer block;
    `drifted` positions moved away from what it reuses in the last pass.
    """

    index: int
    slot: int
    request: Request
    blocks: list[Block]
    generator: torch.Generator | None
    at: int = 0
    opening: bool = True
    first_masked: bool = True
    finished: bool = False
    step: int = 0
    denoised: int = 0
    outer_step: int = 0
    initial: int = 0
    remaining: int = 0
    committed: int = 0
    since_refresh: int = -1
    drifted: int = 0
    forwards: int = 0
    positions: int = 0
    layer_tokens: int = 0

    def __post_init__(self) -> None:
        self.enter()

    @property
    def block(self) -> Block:
        return self.blocks[self.at]

    def enter(self) -> None:
        """Start on the current block: `initial` masks are in it before anything is committed."""
        first, prompt, fixed = max(self.block.start, self.block.prompt), self.block.prompt, self.request.fixed
        self.initial = self.block.stop - first - sum(first <= prompt + offset < self.block.stop for offset in fixed)
        self.remaining = self.initial

    @property
    def revocable(self) -> bool:
        """Whether the block holds a token that decoding chose."""
        return self.remaining < self.initial

    def next_pass(self, cache: CachePlan, lead: int) -> Pass:
        """What this row's next forward recomputes: the cache's plan, and at least `lead` positions before the block."""
        opening = cache.open(self.block) if self.opening else None
        self.opening = opening is not None
        p = opening or cache.step(self.block, Progress(self.denoised, self.outer_step, self.first_masked))
        return replace(p, start=min(p.start, self.block.start - lead)) if lead else p

    def active(self, p: Pass, reuse: LayerReuse | ValueReuse | None) -> int | None:
        """How many positions of this pass run through reused layers; None in an opening pass and without reuse."""
        if reuse is None or self.opening:
            return None
        return reuse.active(p.stop - p.start, self.since_refresh, self.committed, self.remaining, self.drifted)

    def advance(self, positions: int, remaining: int, stopped: bool, first_masked: bool) -> None:
        """Take in what a forward over `positions` did; go on to the next block when this one is full."""
        self.forwards += 1
        self.positions += positions
        self.step += 1
        self.denoised += not self.opening
        self.outer_step += not self.opening
        self.opening = False
        self.committed, self.remaining = self.remaining - remaining, remaining
        self.first_masked = first_masked and self.block.start >= self.block.prompt
        self.finished = stopped or (remaining == 0 and self.at + 1 == len(self.blocks))
        if remaining == 0 and not self.finished:
            self.at += 1
            self.opening, self.first_masked, self.step, self.denoised = True, True, 0, 0
            self.enter()
            if self.block.opens:
                self.outer_step, self.since_refresh = 0, -1


@dataclass
class Result:
    """A finished request: its canvas [P + length] (masks are left only after a stop token, or behind the block at which
    `ends` was content) and what it cost: forwards, positions recomputed (shadows included), and layer-token products
    (positions times the layers that ran for them)."""

    ids: Tensor
    forwards: int
    positions: int
    layer_tokens: int


@dataclass
class Step:
    """One forward: the requests it served, where their blocks start, the seconds it took, and the requests it finished.

    With `trace`: ids [R, Q] after the step (the mask id where a token was taken back), confidence [R, Q] (NaN where nothing
    was scored), committed [R, Q] bool.
    """

    rows: list[int]
    starts: list[int]
    stops: list[int]
    seconds: float
    done: dict[int, Result]
    ids: Tensor | None = None
    confidence: Tensor | None = None
    committed: Tensor | None = None


@dataclass
class Outcome:
    """What one forward did, on the device. status [R, 4] int64: masks left in the block, 1 if the row stopped, 1 if the
    block's first position is masked, positions that drifted (layer reuse). ids, conf, committed [R, Q]."""

    status: Tensor
    ids: Tensor
    conf: Tensor
    committed: Tensor

    def first(self, rows: int) -> Outcome:
        """The outcome of the first `rows` rows, without those that pad a graph."""
        return Outcome(self.status[:rows], self.ids[:rows], self.conf[:rows], self.committed[:rows])


@torch.inference_mode()
def decode(
    model: Model,
    requests: list[Request],
    *,
    geometry: Geometry,
    block_length: int,
    cache: CachePlan,
    decoder: DecoderRule,
    sampler: Sampler,
    runner: Any,
    stop_ids: tuple[int, ...],
    grid: int = 0,
    lead: int = 0,
    cfg_scale: float = 0.0,
    reuse: LayerReuse | ValueReuse | None = None,
    batch_size: int | None = None,
    trace: bool = False,
) -> Iterator[Step]:
    """Decode every request; yields one `Step` per forward.

    `block_length` is Q, the widest block (v2: the sub-block). `grid` is the block size of a block-causal model, 0 for a
    bidirectional one. `lead` positions before a block are recomputed with it: a shifted model then learns the block's first
    token there, at any step, and its opening pass is a step like any other. `stop_ids` end a row as soon as one is committed
    with no mask before it (where the decoder takes tokens back: none in the block); () decodes to the end. `cfg_scale` w > 0
    guides: logits u + (w + 1)(c - u), with u from a forward whose prompt is masked. `reuse` runs some layers for some
    positions only. At most `batch_size` requests are on the canvas at once (default: all). Closing the generator stops the
    computation.
    """
    spec, device = model.spec, model.device
    plans = [geometry(len(r.prompt), len(r.prompt) + r.length) for r in requests]
    slots = min(batch_size or len(requests), len(requests))
    lanes = 2 if cfg_scale else decoder.rows  # rows of the canvas and the store that one request takes
    shadow = block_length * (1 + spec.shift) if decoder.shadow else 0  # positions that a row's shadows take in a forward
    canvas = runner.canvas(model, slots * lanes, max(blocks[-1].reach for blocks in plans), shadow)
    step_of = partial(
        denoise,
        model,
        canvas,
        decoder,
        sampler,
        torch.tensor(stop_ids, dtype=torch.long, device=device),
        grid=grid,
        cfg_scale=cfg_scale,
        block_length=block_length,
        reuse=reuse,
    )
    waiting = list(enumerate(zip(requests, plans, strict=True)))[::-1]
    free, live = list(range(0, slots * lanes, lanes))[::-1], []
    while waiting or live:
        while waiting and free:
            index, (request, blocks) = waiting.pop()
            generator = torch.Generator(device).manual_seed(request.seed) if sampler.random else None
            live.append(Row(index, free.pop(), request, blocks, generator))
            place(canvas, live[-1], lanes, spec.mask_id, spec.pad_id)
        planned = [(row, row.next_pass(cache, lead)) for row in live]
        planned = [(row, p, row.active(p, reuse), shadow * row.revocable) for row, p in planned]
        for rows, passes, width, quotas, shadows in group(planned, decoder.rows, runner.packs):
            started = time.perf_counter()
            keys = max(row.block.reach for row in rows) + shadows if shadows else max(p.read for p in passes)
            uniform = all(p.read == keys and p.hide == (0, 0) and within_block(p, grid) for p in passes)
            plan = [describe(row, p, n, spec.shift - lead) for row, p, n in zip(rows, passes, quotas, strict=True)]
            active = None if quotas[0] is None else max(quotas)
            noise = sampler.draw([row.generator for row in rows], block_length, spec.vocab)
            branches = 1 if rows[0].opening else decoder.rows
            widths = [p.stop - p.start for p in passes]
            packed = branches * pieces(widths) if min(widths) < width <= NARROW else 0
            choices = {"active": active, "branches": branches, "shadows": shadows, "packed": packed}
            out = runner(step_of, plan, noise, width=width, keys=keys, uniform=uniform, **choices)
            status = out.status.tolist()  # sync: masks left, stopped, first position masked, drift decide the next forward
            step = Step([r.index for r in rows], [r.block.start for r in rows], [r.block.stop for r in rows], 0.0, {})
            for row, p, quota, (remaining, stopped, first_masked, drifted) in zip(rows, passes, quotas, status, strict=True):
                own = p.stop - p.start
                row.layer_tokens += (own * branches + shadows) * spec.layers
                if quota is not None:
                    row.layer_tokens -= (own - quota) * len(reuse.layers)
                    # What an earlier block left behind says nothing of this one's first pass.
                    row.drifted = drifted if row.since_refresh >= 0 else 0
                    row.since_refresh = 0 if quota == own else row.since_refresh + 1
                row.advance(own * branches + shadows, remaining, bool(stopped), bool(first_masked))
                if row.request.ends and remaining == 0 and not row.finished:
                    so_far = canvas.x[row.slot, len(row.request.prompt) : row.block.start]
                    row.finished = row.request.ends(so_far.cpu())  # sync: once a block, where its text may end the answer
                if row.finished:
                    ids = canvas.x[row.slot, : len(row.request.prompt) + row.request.length].clone()
                    step.done[row.index] = Result(ids, row.forwards, row.positions, row.layer_tokens)
                    free.append(row.slot)
            if trace:
                step.ids, step.confidence, step.committed = (
                    out.ids.clone(),
                    out.conf.clone(),
                    out.committed.clone(),
                )
            step.seconds = time.perf_counter() - started
            yield step
        live = [row for row in live if not row.finished]


def denoise(
    model: Model,
    canvas: Canvas,
    decoder: DecoderRule,
    sampler: Sampler,
    stops: Tensor,
    plan: Tensor,
    noise: Tensor | None,
    *,
    grid: int,
    cfg_scale: float,
    block_length: int,
    reuse: LayerReuse | ValueReuse | None,
    width: int,
    keys: int,
    uniform: bool,
    active: int | None,
    branches: int,
    shadows: int,
    packed: int,
) -> Outcome:
    """One forward of R rows over W positions each, then what `decoder` commits in their blocks.

    plan [R, 14] int64 holds the columns of `describe`. `branches` run the forward: all of the decoder's, or branch 0 alone
    where they hold the same (the result counts for all). `shadows` positions are appended to each row of it, 0 where the
    block holds nothing that could be taken back. `packed` is the number of pieces in which passes of unequal widths run, 0
    where all run to W. Nothing is read on the host and every shape is static, so that a runner may capture the whole
    function as one graph.
    """
    spec, scratch, lanes = model.spec, canvas.x.shape[1] - 1, decoder.rows
    if lanes > 1:
        plan = fan_out(plan, lanes, len(canvas.x))
    columns = plan.t().contiguous().unbind(0)
    row, start, stop, read, reach, first, last, prompt, forced, step, initial, quota, *hidden_slots = columns

    # 1. The pass: which positions are recomputed, and what each of them sees. Padding goes to the scratch column.
    pos = start[:, None] + torch.arange(width, device=plan.device)
    pos = torch.where(pos < stop[:, None], pos, scratch)  # [R, W]
    slot = first[:, None] + torch.arange(block_length, device=plan.device)
    slot = torch.where(slot < last[:, None], slot, scratch)  # [R, Q]
    wide = widen(pos, slot, reach, spec.shift, scratch, canvas.store.k.shape[3] - 1) if shadows else Widened(pos)
    pos = wide.pos
    limit = read[:, None].expand_as(pos)
    if grid:
        limit = torch.minimum(limit, (pos // grid + 1) * grid)
    hide = None if uniform else torch.stack(hidden_slots, 1)
    window = Window(row, pos, limit, keys, uniform, hide, wide.slot, wide.swap)
    ids = canvas.x[row[:, None], pos]
    if shadows:
        ids = ids.masked_fill(wide.masked, spec.mask_id)
    hook = None
    if active is not None:
        needed = canvas.masked[row[:, None], (pos + spec.shift).clamp(max=scratch)] & (pos + spec.shift < last[:, None])
        needed &= pos + spec.shift >= first[:, None]
        memory = canvas.state(reuse, partial(reuse.allocate, model))
        hook = reuse.hook(memory, row, pos, ids, needed, active, quota, scratch)
    if branches < lanes:
        hidden = forward_first(model.network, ids, window, canvas.store, lanes)
    elif packed:
        hidden = forward_packed(model.network, ids, window, canvas.store, stop - start, packed, scratch)
    else:
        hidden = model.network(ids, window, canvas.store, hook)  # [R, W, C]

    # 2. The head and the scores, of the block's positions alone: row j of a pass predicts position start + j + shift. A
    #    shifted model's opening pass ends where the block starts or discards the rest (as published): it gives the first
    #    token only.
    source = slot - spec.shift - start[:, None]
    learnt = (slot < last[:, None]) & (source >= 0) & (slot - spec.shift < stop[:, None])
    learnt &= (slot == first[:, None]) | (forced == 0)[:, None]
    source = source.clamp(0, width - 1)
    index = source[..., None].expand(-1, -1, hidden.shape[-1])
    predicting = hidden.gather(1, index)
    if shadows:
        predicting = torch.cat([predicting, hidden[:, width :: 1 + spec.shift]])
    if cfg_scale or shadows or decoder.adjust or sampler.temperature > 0:
        logits, *without = model.network.logits(predicting).split(len(row))  # [R, Q, V] each
        if cfg_scale:
            masked_prompt = torch.where(pos < prompt[:, None], spec.mask_id, ids)
            window = Window((row + 1).clamp(max=len(canvas.x) - 1), pos, limit, keys, uniform, window.hide)
            free = model.network.logits(model.network(masked_prompt, window, canvas.store).gather(1, index))
            logits = free + (cfg_scale + 1) * (logits - free)
        scores = sampler(logits, model.banned, noise)
    else:  # nothing looks at the logits themselves, which then need not reach memory
        stats = model.network.confidence(predicting.flatten(0, 1), model.banned, **sampler.statistics)
        scores = sampler.scores(stats, slot.shape, noise)

    # 3. Decide and write. The decoder returns the block's next ids; a position where it writes the mask stays open.
    #    What is open in branch 0 is open in all: a branch may take back what another one tried. Shadows doubt the tokens of
    #    the block that decoding chose and that can be predicted anew; those, too, the decoder may open.
    before, masked = canvas.x[row[:, None], slot], canvas.masked[row[:, None], slot]
    scored = masked & learnt
    view = View(before, scored, scores.top, scores.conf, step, initial, spec.mask_id, scores.entropy, scores.margin, row)
    if decoder.state is not None:
        view.state = canvas.state((decoder, block_length), partial(decoder.state, block_length, spec.vocab, plan.device))
    if decoder.adjust is not None:
        scores = sampler(decoder.adjust(view, logits.float().masked_fill(model.banned, -torch.inf)), model.banned, noise)
        view.top, view.conf, view.entropy, view.margin = scores.top, scores.conf, scores.entropy, scores.margin
    unfilled = masked if lanes == 1 else first_of(masked, lanes)
    if decoder.shadow:
        view.check = torch.full_like(view.conf, torch.nan)
    if shadows:
        # What predicts the first token of a block-causal block does not see it, and would only repeat itself.
        doubted = canvas.free[row[:, None], slot] & ~masked & learnt & (limit.gather(1, source) > slot)
        view.check = torch.where(doubted, sampler.probability(*without, before, model.banned), torch.nan)
        unfilled = unfilled | doubted
    after = torch.where(unfilled & learnt, decoder.step(view), before)
    still = unfilled & (after == spec.mask_id)
    if lanes > 1:
        full = ~first_of(still, lanes).any(1, keepdim=True)
        after, still = torch.where(full, first_of(after, lanes), after), still & ~full
    canvas.x[row[:, None], slot] = after
    canvas.masked[row[:, None], slot] = still

    # 4. For the host: masks left; whether a stop token of the answer has no mask before it (none in the block, where tokens
    #    before it may still be taken back); the block's first position.
    ends = torch.isin(after, stops) & ~still & (slot < last[:, None]) & (slot >= prompt[:, None])
    before_it = still.sum(1, keepdim=True) if decoder.shadow else still.cumsum(1)
    stopped = (ends & (before_it == 0)).any(1)
    drifted = torch.zeros_like(row) if active is None else memory.drifted[row]
    status = torch.stack([still.sum(1), stopped.long(), still[:, 0].long(), drifted], 1)
    conf = scores.conf.masked_fill(~scored, torch.nan)
    return Outcome(status[::lanes], after[::lanes], conf[::lanes], (masked & ~still)[::lanes])


def place(canvas: Canvas, row: Row, lanes: int, mask_id: int, pad_id: int) -> None:
    """Write a request into its rows: prompt, masks up to the end of its last block, fixed tokens, padding."""
    prompt, total = len(row.request.prompt), len(row.request.prompt) + row.request.length
    x, masked = canvas.x[row.slot : row.slot + lanes], canvas.masked[row.slot : row.slot + lanes]
    x.fill_(pad_id)
    x[:, :prompt] = row.request.prompt
    x[:, prompt : row.blocks[-1].reach] = mask_id
    masked.fill_(False)
    masked[:, prompt:total] = True
    for offset, token in row.request.fixed.items():
        x[:, prompt + offset], masked[:, prompt + offset] = token, False
    canvas.free[row.slot : row.slot + lanes] = masked


def group(
    planned: list[tuple[Row, Pass, int | None, int]], lanes: int, packs: bool
) -> Iterator[tuple[list[Row], list[Pass], int, list[int | None], int]]:
    """Rows that can share a forward: (rows, their passes, width, their quotas, shadows of each), wide passes first.

    A row's quota counts the positions that run through reused layers, None where reuse has no part. Rows that recompute all
    and rows that reuse do not mix, so that a forward either fills the reused layers' state or draws on it. With `lanes`
    branches, opening passes are apart too: they run for one branch of each row. So are rows with shadows. Where the runner
    `packs`, other narrow passes share a forward whatever their widths (`packing.py`).
    """
    buckets: dict[tuple[int, int, bool, int], list[tuple[Row, Pass, int | None]]] = {}
    for row, p, quota, shadows in planned:
        width, apart = p.stop - p.start, lanes > 1 and row.opening
        kind = 0 if quota is None else 1 if quota == width else 2
        exact = width <= NARROW and (not packs or kind or apart or shadows)
        bucket = width if exact else -(-width // NARROW) * NARROW
        buckets.setdefault((bucket, kind, apart, shadows), []).append((row, p, quota))
    for bucket in sorted(buckets, reverse=True):
        members, shadows = buckets[bucket], bucket[-1]
        most = max(1, PASS_TOKENS // ((bucket[0] + shadows) * lanes))
        for i in range(0, len(members), most):
            rows, passes, quotas = (list(column) for column in zip(*members[i : i + most], strict=True))
            yield rows, passes, max(p.stop - p.start for p in passes), quotas, shadows


def within_block(p: Pass, grid: int) -> bool:
    """Whether all queries of a pass see the same: in a bidirectional model always, in a block-causal one within a block."""
    return not grid or p.start // grid == (p.stop - 1) // grid


def describe(row: Row, p: Pass, quota: int | None, shift: int) -> list[int]:
    """A row of the plan that `denoise` unpacks. With a shift, an opening pass gives the first token only."""
    block, prompt = row.block, row.block.prompt
    first = max(block.start, prompt)
    forced = int(shift and row.opening)
    seen = (p.read, block.reach)
    return [row.slot, p.start, p.stop, *seen, first, block.stop, prompt, forced, row.step, row.initial, quota or 0, *p.hide]

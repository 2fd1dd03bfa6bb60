# SPDX-License-Identifier: Apache-2.0
"""One forward of R rows, and what the decoder commits in their blocks: locate, forward, score, commit.

Nothing is read on the host and every shape is static, so that a runner may capture `denoise` as one graph. R rows (with
their lanes), W positions of a pass, N of them with shadows, Q positions of a block, C width of the model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdllm.decoding import Decoding
from fastdllm.engine.forwards import fan_out, forward, of_first
from fastdllm.engine.shadows import Widened, widen
from fastdllm.forward import Plan, Shape, Window
from fastdllm.sampling import Sampler, Scores, guide
from fastdllm.store import Canvas, block_end, span
from fastdllm.view import View

if TYPE_CHECKING:
    from fastdllm.decoders.base import DecoderRule
    from fastdllm.models import Model
    from fastdllm.models.spec import ModelSpec


@dataclass(frozen=True)
class Where:
    """window: of the forward. ids [R, N]: what its positions read. block [R, Q]: the block's positions. source [R, Q]: the
    position of the pass that predicts each. learnt [R, Q] bool: those that this pass predicts."""

    window: Window
    ids: Tensor
    block: Tensor
    source: Tensor
    learnt: Tensor


@dataclass(frozen=True)
class Scored:
    """scores of the block's positions; logits [R, Q, V] where something looks at them, else None; unaware [R, Q] with
    shadows, else None: the probability of each token from a query that does not see it."""

    scores: Scores
    logits: Tensor | None = None
    unaware: Tensor | None = None


@dataclass
class Outcome:
    """What one forward did, on the device. status [R, 4] int64: masks left in the block, 1 if the row stopped, 1 if the
    block's first position is masked, positions that drifted (layer reuse). ids, conf, committed, logprob [R, Q]. likeliest:
    with `Shape.alternatives`, the likeliest tokens of each position and their log-probabilities, [R, Q, n] each."""

    status: Tensor
    ids: Tensor
    conf: Tensor
    committed: Tensor
    logprob: Tensor
    likeliest: tuple[Tensor, Tensor] | None = None

    def head(self, rows: int) -> Outcome:
        """The first `rows` rows, without those that fill up a graph."""
        likeliest = None if self.likeliest is None else (self.likeliest[0][:rows], self.likeliest[1][:rows])
        tensors = (self.status, self.ids, self.conf, self.committed, self.logprob)
        return Outcome(*(tensor[:rows] for tensor in tensors), likeliest)


def denoise(model: Model, canvas: Canvas, run: Decoding, table: Tensor, noise: Tensor | None, shape: Shape) -> Outcome:
    """table [R / lanes, n] int64: the rows' `Plan`s. noise: see `Sampler.draw`."""
    plan = Plan.columns(fan_out(table, run.lanes))
    rule, sampler, numbers = own_numbers(canvas, run, plan, shape, noise is not None)
    where = locate(model.spec, canvas, run, plan, shape)
    row = plan.row[:, None]
    before, masked = canvas.x[row, where.block], canvas.masked[row, where.block]
    hidden, drifted = forward(model, canvas, run, plan, where.window, where.ids, shape)
    if run.guidance and noise is not None:
        noise = noise.repeat_interleave(2, 0)
    scored = score(model, rule, sampler, where, hidden, before, noise, numbers, shape)
    view = observe(model, canvas, rule, sampler, plan, where, scored, before, masked, noise)
    after, still = commit(run.lanes, rule, view, masked, where.learnt)
    committed = masked & ~still
    # Where branches or shadows are at work, a position may change its token without having been open.
    written = committed | (after != before) & ~still if run.decoder.branches > 1 or rule.shadow else committed
    record(canvas, plan, where.block, view, after, still, written)
    out = report(canvas, run, plan, where, view, committed, after, still, drifted)
    if shape.alternatives:
        out.likeliest = likeliest(scored.logits[:: run.lanes], model.banned, shape.alternatives)
    return out


def own_numbers(
    canvas: Canvas, run: Decoding, plan: Plan, shape: Shape, random: bool
) -> tuple[DecoderRule, Sampler, Mapping[str, Tensor]]:
    """The run's decoder and sampler with each row's own numbers in them, and these numbers: columns [R, 1]."""
    if not (run.decoder.per_request or run.guidance or run.sampler.drawn or random):
        return run.decoder, run.sampler, {}  # nothing asks for a number
    columns = canvas.numbers[plan.slot][:, : len(run.numbers), None].unbind(1)
    numbers = dict(zip(run.numbers, columns, strict=True))
    return run.decoder.of(numbers), run.sampler.of(numbers, shape.drawn, shape.truncated), numbers


def locate(spec: ModelSpec, canvas: Canvas, run: Decoding, plan: Plan, shape: Shape) -> Where:
    """Which positions are recomputed, what each sees, and which of them predicts each position of the block. Row j of a pass
    predicts position start + j + shift. Padding goes to the scratch position."""
    pos = span(plan.start, plan.stop, shape.width, plan.scratch)  # [R, W]
    block = span(plan.first, plan.end, run.block_length, plan.scratch)  # [R, Q]
    wide = widen(pos, block, plan.visible_end, spec.shift, plan.scratch) if shape.shadows else Widened(pos)
    kv_len = plan.read[:, None].expand_as(wide.pos)
    if run.block_causal:
        kv_len = torch.minimum(kv_len, block_end(wide.pos, run.block_causal))
    hide = None if shape.dense else torch.stack([plan.hide_start, plan.hide_stop], 1)
    ids = canvas.x[plan.row[:, None], wide.pos]
    if wide.masked is not None:
        ids = ids.masked_fill(wide.masked, spec.mask_id)
    if run.guidance:  # the second lane of each row does not see the prompt
        blind = (torch.arange(len(ids), device=ids.device) % 2 == 1)[:, None]
        ids = ids.masked_fill(blind & (wide.pos < plan.prompt[:, None]), spec.mask_id)
    source = block - spec.shift - plan.start[:, None]
    learnt = (block < plan.end[:, None]) & (source >= 0) & (block - spec.shift < plan.stop[:, None])
    # A shifted model's opening pass ends where the block starts, or discards the rest as published: the first token only.
    learnt &= (block == plan.first[:, None]) | (plan.first_only == 0)[:, None]
    window = Window(plan.row, wide.pos, kv_len, shape.max_kv_len, shape.dense, hide, wide.slot, wide.swap)
    return Where(window, ids, block, source.clamp(0, shape.width - 1), learnt)


def score(
    model: Model,
    rule: DecoderRule,
    sampler: Sampler,
    where: Where,
    hidden: Tensor,
    before: Tensor,
    noise: Tensor | None,
    numbers: Mapping[str, Tensor],
    shape: Shape,
) -> Scored:
    """What the model says of the block's positions. The head runs for them only."""
    network, size = model.network, where.block.shape
    predicting = hidden.gather(1, where.source[..., None].expand(-1, -1, hidden.shape[-1]))
    if not ("cfg_scale" in numbers or shape.shadows or rule.adjust or shape.drawn or shape.alternatives):
        stats = network.confidence(predicting.flatten(0, 1), model.banned, **sampler.statistics)
        return Scored(sampler.scores(stats, size, noise))  # nothing looks at the logits, which need not reach memory
    if shape.shadows:
        predicting = torch.cat([predicting, hidden[:, shape.width :: 1 + model.spec.shift]])
    logits, *shadowed = network.logits(predicting).split(size[0])  # [R, Q, V] each
    if "cfg_scale" in numbers:
        scale = numbers["cfg_scale"][::2, :, None]
        logits = guide(logits[::2], logits[1::2], scale).repeat_interleave(2, 0)
    unaware = sampler.probability(shadowed[0], before, model.banned) if shape.shadows else None
    return Scored(sampler(logits, model.banned, noise), logits, unaware)


def observe(
    model: Model,
    canvas: Canvas,
    rule: DecoderRule,
    sampler: Sampler,
    plan: Plan,
    where: Where,
    scored: Scored,
    before: Tensor,
    masked: Tensor,
    noise: Tensor | None,
) -> View:
    """What the decoder sees, with what it asks for besides: its state, adjusted logits, what shadows say."""
    row, s, open_now = plan.row[:, None], scored.scores, masked & where.learnt
    view = View(before, open_now, s.top, s.conf, plan.step, plan.initial, model.spec.mask_id, s.entropy, s.margin, plan.slot)
    if rule.state is not None:
        width, device = before.shape[1], before.device
        view.state = canvas.state((type(rule), width), partial(rule.state, width, model.spec.vocab, device))
    if rule.adjust is not None:
        logits = rule.adjust(view, scored.logits.float().masked_fill(model.banned, -torch.inf))
        s = sampler(logits, model.banned, noise)
        view.top, view.conf, view.entropy, view.margin = s.top, s.conf, s.entropy, s.margin
    view.logprob = s.logprob if rule.branches == 1 else torch.where(open_now, s.logprob, canvas.logprobs[row, where.block])
    if rule.shadow:
        view.unaware = torch.full_like(view.conf, torch.nan)
    if scored.unaware is not None:
        # Doubted: tokens that decoding chose and that can be predicted anew. What predicts the first token of a block-causal
        # block does not see it and would only repeat itself.
        doubted = canvas.chosen[row, where.block] & ~masked & where.learnt
        doubted &= where.window.kv_len.gather(1, where.source) > where.block
        view.unaware = torch.where(doubted, scored.unaware, torch.nan)
    return view


def commit(lanes: int, rule: DecoderRule, view: View, masked: Tensor, learnt: Tensor) -> tuple[Tensor, Tensor]:
    """The block's next ids [R, Q], and what stays masked. What is open in lane 0 is open in all: a branch may take back what
    another one tried. A position where the decoder writes the mask stays open."""
    unfilled = of_first(masked, lanes)
    if rule.shadow:
        unfilled = unfilled | ~view.unaware.isnan()
    after = torch.where(unfilled & learnt, rule.step(view), view.ids)
    still = unfilled & (after == view.mask_id)
    if lanes > 1:
        full = ~of_first(still, lanes).any(1, keepdim=True)
        after, still = torch.where(full, of_first(after, lanes), after), still & ~full
        view.logprob = torch.where(full, of_first(view.logprob, lanes), view.logprob)
    return after, still


def record(canvas: Canvas, plan: Plan, block: Tensor, view: View, after: Tensor, still: Tensor, written: Tensor) -> None:
    """Write the block back, and where a token was `written` its log-probability and the forward's number."""
    row = plan.row[:, None]
    canvas.x[row, block] = after
    canvas.masked[row, block] = still
    at = torch.where(written, block, plan.scratch[:, None])
    canvas.logprobs[row, at] = view.logprob
    canvas.committed_at[row, at] = plan.forward[:, None].expand_as(at)


def report(
    canvas: Canvas,
    run: Decoding,
    plan: Plan,
    where: Where,
    view: View,
    committed: Tensor,
    after: Tensor,
    still: Tensor,
    drifted: Tensor | None,
) -> Outcome:
    """For the host. A row has stopped when a stop token of its answer has no mask before it, or, where tokens may still be
    taken back, when the block has none."""
    ends = (after[..., None] == canvas.stops[plan.slot][:, None]).any(-1) & ~still
    ends &= (where.block < plan.end[:, None]) & (where.block >= plan.prompt[:, None])
    open_before = still.sum(1, keepdim=True) if run.decoder.shadow else still.cumsum(1)
    stopped = (ends & (open_before == 0)).any(1)
    drifted = torch.zeros_like(plan.row) if drifted is None else drifted
    status = torch.stack([still.sum(1), stopped.long(), still[:, 0].long(), drifted], 1)
    conf, lead = view.conf.masked_fill(~view.masked, torch.nan), slice(None, None, run.lanes)
    return Outcome(status[lead], after[lead], conf[lead], committed[lead], view.logprob[lead])


def likeliest(logits: Tensor, banned: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """logits [R, Q, V] -> the `count` likeliest tokens of each position and their log-probabilities, untempered."""
    logprob, token = logits.float().masked_fill(banned, -torch.inf).log_softmax(-1).topk(min(count, logits.shape[-1]), -1)
    return token, logprob

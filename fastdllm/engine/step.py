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
from fastdllm.forward import Look, Plan, Shape, Window
from fastdllm.sampling import Sampler, Scores, guide
from fastdllm.store import Canvas, block_end, span
from fastdllm.view import View, ends

if TYPE_CHECKING:
    from fastdllm.decoders.base import DecoderRule
    from fastdllm.models import Model
    from fastdllm.models.spec import ModelSpec


@dataclass(frozen=True)
class Where:
    """Where a forward works.

    window: of the forward.
    ids: [R, N], what its positions read.
    block: [R, Q], the block's positions.
    before, masked: [R, Q], what they hold, and which are open.
    source: [R, Q], the position of the pass that predicts each.
    learnt: [R, Q] bool, those that this pass predicts.
    """

    window: Window
    ids: Tensor
    block: Tensor
    before: Tensor
    masked: Tensor
    source: Tensor
    learnt: Tensor


@dataclass(frozen=True)
class Own:
    """The run's choices with each row's own numbers in them.

    rule, sampler: the run's decoder and sampler.
    numbers: the rows' own, columns [R, 1] by name.
    noise: the step's draws.
    """

    rule: DecoderRule
    sampler: Sampler
    numbers: Mapping[str, Tensor]
    noise: Tensor | None


@dataclass(frozen=True)
class Scored:
    """What the model says of the block's positions.

    scores: token and confidence.
    logits: [R, Q, V] where something looks at them, else None.
    unaware: with shadows [R, Q], the probability of each token from a query that does not see it; else None.
    """

    scores: Scores
    logits: Tensor | None = None
    unaware: Tensor | None = None


@dataclass(frozen=True)
class Written:
    """What became of the block's positions, [R, Q] each.

    after: the ids that they hold now.
    still: those that stay masked.
    committed: those that are no longer masked, or were edited.
    new: those whose token is another one than before; in branches also some that were not open.
    """

    after: Tensor
    still: Tensor
    committed: Tensor
    new: Tensor


@dataclass
class Outcome:
    """What one forward did, on the device.

    status: [R, 5] int64: masks left in the block, 1 if the row stopped, 1 if the block's first position is masked, positions
        that drifted (layer reuse), tokens that are new.
    ids, conf, committed, logprob: [R, Q].
    likeliest: with `Shape.alternatives`, the likeliest tokens of each position and their log-probabilities, [R, Q, n] each.
    """

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
    """One step of R rows, without a read on the host.

    table: [R / lanes, n] int64, the rows' `Plan`s.
    noise: see `Sampler.draw`.
    """
    plan = Plan.columns(fan_out(table, run.lanes))
    own = own_numbers(canvas, run, plan, noise, shape)
    where = locate(model.spec, canvas, run, plan, shape)
    hidden, drifted = forward(model, canvas, run, plan, where.window, where.ids, shape)
    scored = score(model, own, where, hidden, shape)
    view = observe(model, canvas, own, plan, where, scored)
    written = commit(run.lanes, own.rule, view, where)
    record(canvas, plan, where.block, view, written)
    out = report(canvas, run, plan, where.block, view, written, drifted)
    if shape.alternatives:
        out.likeliest = likeliest(scored.logits[:: run.lanes], model.banned, shape.alternatives)
    return out


def own_numbers(canvas: Canvas, run: Decoding, plan: Plan, noise: Tensor | None, shape: Shape) -> Own:
    """The run's choices, with what each row brings along in place of the run's own."""
    if not (run.decoder.per_request or run.guidance or run.sampler.drawn or noise is not None):
        return Own(run.decoder, run.sampler, {}, None)  # nothing asks for a number
    columns = canvas.numbers[plan.slot][:, : len(run.numbers), None].unbind(1)
    numbers = dict(zip(run.numbers, columns, strict=True))
    if run.guidance and noise is not None:
        noise = noise.repeat_interleave(2, 0)
    sampler = run.sampler
    if shape.drawn or sampler.drawn or noise is not None:  # else no number of the sampler counts
        sampler = sampler.of(numbers, shape.drawn, shape.truncated)
    return Own(run.decoder.of(numbers), sampler, numbers, noise)


def locate(spec: ModelSpec, canvas: Canvas, run: Decoding, plan: Plan, shape: Shape) -> Where:
    """Which positions are recomputed, what each sees, and which of them predicts each position of the block. Row j of a pass
    predicts position start + j + shift. Padding goes to the scratch position."""
    pos = span(plan.start, plan.stop, shape.width, plan.scratch)  # [R, W]
    block = span(plan.first, plan.end, run.block_length, plan.scratch)  # [R, Q]
    wide = widen(pos, block, plan.visible_end, spec.shift, plan.scratch) if shape.shadows else Widened(pos)
    kv_len = plan.read[:, None].expand_as(wide.pos)
    if run.block_causal:
        origin = plan.prompt[:, None] if run.grid_at_prompt else 0
        kv_len = torch.minimum(kv_len, block_end(wide.pos, run.block_causal, origin))
    if run.causal or run.decoder.drafts:
        kv_len = torch.where(wide.pos < plan.causal[:, None], torch.minimum(kv_len, wide.pos + 1), kv_len)
    hide = None if shape.dense else torch.stack([plan.hide_start, plan.hide_stop], 1)
    ids = canvas.x[plan.row[:, None], wide.pos]
    if wide.masked is not None:
        ids = ids.masked_fill(wide.masked, spec.mask_id)
    if run.guidance:  # the second lane of each row does not see the prompt
        blind = (torch.arange(len(ids), device=ids.device) % 2 == 1)[:, None]
        ids = ids.masked_fill(blind & (wide.pos < plan.prompt[:, None]), spec.mask_id)
    by = block - (reads_on(plan).long()[:, None] if run.causal else spec.shift)  # the position that predicts each
    source = by - plan.start[:, None]
    learnt = (block < plan.end[:, None]) & (source >= 0) & (by < plan.stop[:, None])
    # A shifted model's opening pass ends where the block starts, or discards the rest as published: the first token only.
    learnt &= (block == plan.first[:, None]) | (plan.first_only == 0)[:, None]
    source = source.clamp(0, shape.width - 1)
    look = between(plan, source, block, hide, shape.width) if "attention" in run.decoder.needs else None
    window = Window(plan.row, wide.pos, kv_len, shape.max_kv_len, shape.dense, hide, wide.slot, wide.swap, look)
    before, masked = (tensor[plan.row[:, None], block] for tensor in (canvas.x, canvas.masked))
    return Where(window, ids, block, before, masked, source, learnt)


def between(plan: Plan, source: Tensor, block: Tensor, hide: Tensor | None, width: int) -> Look:
    """Ask for the attention between the positions of block [R, Q], which the positions source [R, Q] of a pass predict."""
    rows, size = block.shape
    out = torch.zeros(rows, size, size, dtype=torch.float32, device=block.device)
    return Look(plan.row, torch.arange(rows, device=block.device) * width, source, block, hide, out)


def reads_on(plan: Plan) -> Tensor:
    """[R] bool: the pass is read from left to right, so that each position predicts the next."""
    return plan.causal >= plan.stop


def score(model: Model, own: Own, where: Where, hidden: Tensor, shape: Shape) -> Scored:
    """What the model says of the block's positions. The head runs for them only."""
    network, sampler, size = model.network, own.sampler, where.block.shape
    predicting = hidden.gather(1, where.source[..., None].expand(-1, -1, hidden.shape[-1]))
    guided = "cfg_scale" in own.numbers
    if not (guided or shape.shadows or own.rule.adjust or shape.drawn or shape.alternatives):
        stats = network.confidence(predicting.flatten(0, 1), model.banned, **sampler.statistics)
        return Scored(sampler.scores(stats, size, own.noise))  # nothing looks at the logits, which need not reach memory
    if shape.shadows:
        predicting = torch.cat([predicting, hidden[:, shape.width :: 1 + model.spec.shift]])
    logits, *shadowed = network.logits(predicting).split(size[0])  # [R, Q, V] each
    if guided:
        scale = own.numbers["cfg_scale"][::2, :, None]
        logits = guide(logits[::2], logits[1::2], scale).repeat_interleave(2, 0)
    unaware = sampler.probability(shadowed[0], where.before, model.banned) if shape.shadows else None
    return Scored(sampler(logits, model.banned, own.noise), logits, unaware)


def observe(model: Model, canvas: Canvas, own: Own, plan: Plan, where: Where, scored: Scored) -> View:
    """What the decoder sees, with what it asks for besides: its state, adjusted logits, what shadows say."""
    rule, spec, row, s = own.rule, model.spec, plan.row[:, None], scored.scores
    open_now = where.masked & where.learnt
    view = View(where.before, open_now, s.top, s.conf, plan.step, plan.initial, spec.mask_id, s.entropy, s.margin, plan.slot)
    if rule.state is not None:
        width, device = where.block.shape[1], where.block.device
        view.state = canvas.state((rule.owner, width), partial(rule.state, width, spec.vocab, device))
    view.logprob = s.logprob
    if rule.adjust is not None:
        view.score = partial(own.sampler, banned=model.banned, noise=own.noise)
        view.rescore(rule.adjust(view, scored.logits.float().masked_fill(model.banned, -torch.inf)))
    if rule.branches > 1:
        view.logprob = torch.where(open_now, view.logprob, canvas.logprobs[row, where.block])
    if where.window.look is not None:  # under guidance, of the lane that sees the prompt
        between = where.window.look.out
        view.attention = of_first(between, 2) if "cfg_scale" in own.numbers else between
    if "stops" in rule.needs:
        view.answer, view.stops = answer_of(plan, where.block), canvas.stops[plan.slot]
    if rule.drafts:
        view.causal = reads_on(plan) | (plan.first_only > 0)  # one token of an opening pass is no draft
    if rule.edits:
        view.editable = canvas.chosen[row, where.block] & ~where.masked & where.learnt
    if rule.shadow:
        view.unaware = torch.full_like(view.conf, torch.nan)
    if scored.unaware is not None:
        # Doubted: tokens that decoding chose and that can be predicted anew. What predicts the first token of a block-causal
        # block does not see it and would only repeat itself.
        doubted = canvas.chosen[row, where.block] & ~where.masked & where.learnt
        doubted &= where.window.kv_len.gather(1, where.source) > where.block
        view.unaware = torch.where(doubted, scored.unaware, torch.nan)
    return view


def commit(lanes: int, rule: DecoderRule, view: View, where: Where) -> Written:
    """What the decoder makes of the block. What is open in lane 0 is open in all: a branch may remask what another one
    tried. A position where the decoder writes the mask stays open."""
    unfilled = of_first(where.masked, lanes)
    if rule.shadow:
        unfilled = unfilled | ~view.unaware.isnan()
    if view.editable is not None:
        unfilled = unfilled | view.editable
    after = torch.where(unfilled & where.learnt, decided(rule, view), view.ids)
    still = unfilled & (after == view.mask_id)
    if rule.drafts and view.causal is not None:
        still = torch.where(view.causal[:, None], still, unfilled)
    if lanes > 1:
        full = ~of_first(still, lanes).any(1, keepdim=True)
        after, still = torch.where(full, of_first(after, lanes), after), still & ~full
        view.logprob = torch.where(full, of_first(view.logprob, lanes), view.logprob)
    committed = where.masked & ~still
    if rule.edits:
        committed = committed | (after != where.before) & ~still
    # Where branches or shadows are at work, a position may change its token without having been open.
    changes = rule.branches > 1 or rule.shadow
    return Written(after, still, committed, committed | (after != where.before) & ~still if changes else committed)


def decided(rule: DecoderRule, view: View) -> Tensor:
    """The ids [R, Q] that the decoder writes. Raises ValueError where it returns anything else: it may be somebody's own."""
    ids = rule.step(view)
    like = view.ids
    if not isinstance(ids, Tensor) or ids.shape != like.shape or ids.dtype != like.dtype:
        got = f"{list(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"{type(rule).__name__}.step must return the block's next ids, {list(like.shape)} of {like.dtype}, not {got}"
        )
    return ids


def record(canvas: Canvas, plan: Plan, block: Tensor, view: View, written: Written) -> None:
    """Write the block back, and where a token is new its log-probability and the forward's number."""
    row = plan.row[:, None]
    canvas.x[row, block] = written.after
    canvas.masked[row, block] = written.still
    at = torch.where(written.new, block, plan.scratch[:, None])
    canvas.logprobs[row, at] = view.logprob
    canvas.committed_at[row, at] = plan.forward[:, None].expand_as(at)


def report(
    canvas: Canvas, run: Decoding, plan: Plan, block: Tensor, view: View, written: Written, drifted: Tensor | None
) -> Outcome:
    """For the host. A row has stopped when a stop token of its answer has no mask before it, or, where tokens may still
    change, when the block has none."""
    after, still = written.after, written.still
    ended = ends(after, answer_of(plan, block), canvas.stops[plan.slot]) & ~still
    open_before = still.sum(1, keepdim=True) if run.decoder.revocable() else still.cumsum(1)
    stopped = (ended & (open_before == 0)).any(1)
    drifted = torch.zeros_like(plan.row) if drifted is None else drifted
    status = torch.stack([still.sum(1), stopped.long(), still[:, 0].long(), drifted, written.new.sum(1)], 1)
    if run.decoder.drafts:
        after = after.masked_fill(still, view.mask_id)  # a draft is no answer yet
    conf, lead = view.conf.masked_fill(~(view.masked | written.committed), torch.nan), slice(None, None, run.lanes)
    return Outcome(status[lead], after[lead], conf[lead], written.committed[lead], view.logprob[lead])


def answer_of(plan: Plan, block: Tensor) -> Tensor:
    """[R, Q] bool: the positions of the block that belong to the answer."""
    return (block < plan.end[:, None]) & (block >= plan.prompt[:, None])


def likeliest(logits: Tensor, banned: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """logits [R, Q, V] -> the `count` likeliest tokens of each position and their log-probabilities, untempered."""
    logprob, token = logits.float().masked_fill(banned, -torch.inf).log_softmax(-1).topk(min(count, logits.shape[-1]), -1)
    return token, logprob

# SPDX-License-Identifier: Apache-2.0
"""What a decoder and a cache owe, as functions to call from a notebook or a test.

    from fastdllm.testing import check_decoder, check_cache
    check_decoder(MyRule)

Both take a name, a class or an object, need no checkpoint, and raise AssertionError with what is wrong. The tests of the
package call the same functions, part by part, for every decoder and cache that ships.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdllm import registry
from fastdllm.blocks import Block, Progress, causal_aligned, grid_aligned, prompt_aligned
from fastdllm.build import assemble
from fastdllm.config import DecodeConfig
from fastdllm.decoders.base import DecoderRule
from fastdllm.generation import Output, generate
from fastdllm.models import Model
from fastdllm.models.spec import Experts, ModelSpec
from fastdllm.models.transformer import Transformer
from fastdllm.registry import Kind
from fastdllm.view import View

FAMILIES = ("llada", "dream", "v2", "nemotron")
MIXTURES = {  # families of experts, like "llada" and, in blocks, without a shift
    "llada_moe": Experts(count=6, active=2, inner=12),
    "llada2_moe": Experts(8, 3, inner=12, shared=12, dense=1, score="sigmoid", groups=4, active_groups=2, scale=2.5),
}
VOCAB, MASK, STOP = 40, 38, 37
KINDS = ("spread", "sure", "hopeless", "equal", "certain")  # how confidences are distributed
WIDTHS = (1, 2, 8, 32)
SHAPES = [(1, 1), (1, 8), (3, 21), (8, 16), (13, 40), (16, 9)]  # prompt length, answer length
Chosen = Any  # a name, a class or an object


def check_decoder(decoder: Chosen, families: Sequence[str] = FAMILIES) -> None:
    """Check everything that is asked of a decoder; takes some seconds.

    Each step gains a token, writes only positions that are open or that it may edit, and remasks only what it may. Rows do
    not see each other. Nothing is read on the host. Generation ends under every cache, and a row of a batch gives what it
    gives by itself. A lossless rule gives the tokens of one token per step.

    decoder: a name, a class or an object.
    families: of `random_model`, for which it is checked.

    Raises AssertionError with what is wrong.
    """
    for kind, width in itertools.product(KINDS, WIDTHS):
        check_step(decoder, width, kind)
    check_rows_apart(decoder)
    check_no_host_read(decoder)
    for family in (f for f in families if fits(decoder, f)):
        check_generation(decoder, family)
        if rule_of(decoder).lossless:
            check_lossless(decoder, family)


def check_cache(plan: Chosen) -> None:
    """Check everything that is asked of a cache: its passes cover the block and read no key that was never computed, and
    every number of steps ends without masks.

    plan: a name, a class or an object.

    Raises AssertionError with what is wrong.
    """
    check_passes(plan)
    check_endings(plan)


# Models and prompts.


def random_model(family: str = "llada", seed: int = 0) -> Model:
    """A small random model whose confidences spread over all of (0, 1).

    family: "llada" (no shift), "dream" (shift 1), "v2" (shift 1 and block-causal, with blocks of 8), "nemotron" (no shift, a
        causal context), "llada_moe" and "llada2_moe" (mixtures of experts; the second in blocks of 8).
    """
    shift, causal = int(family in ("dream", "v2")), family == "nemotron"
    block = 8 if family in ("v2", "llada2_moe") else 0
    spec = ModelSpec(
        family="fast_dllm_v2" if family == "v2" else family,
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn=48,
        vocab=VOCAB,
        max_length=256,
        rms_eps=1e-6,
        rope_theta=1e4,
        qkv_bias=True,
        tied_head=False,
        shift=shift,
        block_causal=block,
        mask_id=MASK,
        stop_ids=(STOP,),
        pad_id=0,
        defaults={"cache": "block" if block else "causal" if causal else "dual", "schedule": "even", "block_length": 8},
        causal_context=causal,
        experts=MIXTURES.get(family),
        rotary=4 if family == "llada2_moe" else 0,
    )
    torch.default_generator.manual_seed(seed)  # torch.manual_seed notes the stack for each kind of device that may come
    network = Transformer(spec)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 2 or name.endswith("router_bias"):
                weight.normal_(0, 0.3 if "head" not in name else 0.5)
    return Model(network, spec, None, f"random-{family}-{seed}")


def prompts(*lengths: int) -> list[Tensor]:
    """Random prompts; the first token of each is the mask id, which is text like any other there."""
    out = [torch.randint(0, STOP, (n,)) for n in lengths]
    for prompt in out:
        prompt[0] = MASK
    return out


def accepted(family: str, plan: Chosen, decoder: Chosen) -> bool:
    """Whether this cache and this decoder go together for this family."""
    try:
        assemble(_model(family), DecodeConfig(cache=plan, decoder=decoder, gen_length=8))
    except ValueError:
        return False
    return True


def fits(decoder: Chosen, family: str) -> bool:
    """Whether this decoder is one for this family: one that drafts needs a causal context."""
    return accepted(family, None, decoder)


@cache
def _model(family: str) -> Model:
    return random_model(family)


# Decoders.


def rule_of(decoder: Chosen, width: int = 8) -> DecoderRule:
    """The rule for blocks of `width`, its options at their defaults."""
    family = next((f for f in FAMILIES if fits(decoder, f)), FAMILIES[0])
    return assemble(_model(family), DecodeConfig(decoder=decoder, gen_length=4 * width, block_length=width)).decoder


def view(rule: DecoderRule, rows: int, width: int, kind: str = "spread", seed: int = 0) -> View:
    """A step of `rows` rows; from row to row fewer positions are masked, and none in the last. Every branch holds what
    branch 0 holds, and may have more of it filled."""
    g = torch.Generator().manual_seed(seed)
    n = rows * rule.branches
    conf = {
        "spread": torch.rand(n, width, generator=g),
        "sure": 1 - 0.1 * torch.rand(n, width, generator=g) ** 3,
        "hopeless": 1e-6 * torch.rand(n, width, generator=g),
        "equal": torch.full((n, width), 0.5),
        "certain": torch.ones(n, width),
    }[kind]
    keep = torch.rand(n, width, generator=g) < torch.linspace(1, 0, n)[:, None]
    keep[0] = True
    lead = torch.arange(n) // rule.branches * rule.branches
    keep = keep[lead] & (keep | (torch.arange(n) == lead)[:, None])
    top = torch.randint(0, MASK, (n, width), generator=g)
    text, tried = (torch.randint(0, MASK, (n, width), generator=g) for _ in range(2))
    ids = torch.where(keep, MASK, torch.where(keep[lead], tried, text[lead]))
    entropy, margin = -conf * conf.clamp(min=1e-9).log() * 2, conf * 0.9
    step, initial = torch.zeros(n, dtype=torch.long), torch.full((n,), width)
    state = rule.state(width, VOCAB, torch.device("cpu"), n) if rule.state else None
    # Some tokens may not be remasked; of the others, most are doubtful where confidences are low.
    fixed = keep | (torch.rand(n, width, generator=g) < 0.3)
    check = (conf.flip(1) * 0.95).masked_fill(fixed, torch.nan) if rule.shadow else None
    editable = ~fixed if rule.edits else None
    toward = torch.rand(n, width, width, generator=g).softmax(2) if "attention" in rule.needs else None
    slot = torch.arange(n)
    return View(ids, keep, top, conf, step, initial, MASK, entropy, margin, slot, state, check, editable, attention=toward)


def part(v: View, index: Tensor) -> View:
    """The view of some rows, at the same place of the state."""
    own = copy.copy(v)
    for name, x in vars(v).items():
        if isinstance(x, Tensor):
            setattr(own, name, x[index])
    return own


def check_step(decoder: Chosen, width: int, kind: str) -> None:
    """A step commits something in every row with masks, and writes where it may."""
    rule = rule_of(decoder, width)
    v = view(rule, 9, width, kind)
    ids, masked = v.ids.clone(), v.masked.clone()
    checked = None if v.unaware is None else v.unaware.clone()
    after = rule.step(v)
    assert isinstance(after, Tensor), f"step must return the block's next ids, not {type(after).__name__}"
    assert after.shape == ids.shape, f"step returns {list(after.shape)}, not the block's {list(ids.shape)}"
    assert after.dtype == ids.dtype, f"step returns {after.dtype}, not ids"
    assert torch.equal(v.ids, ids), "a rule changes what it was given: view.ids"
    assert torch.equal(v.masked, masked), "a rule changes what it was given: view.masked"
    lead = slice(None, None, rule.branches)  # branch 0 is the row's content
    left, had = (after[lead] == MASK).sum(1), masked[lead].sum(1)
    assert (left[had > 0] < had[had > 0]).all(), f"a row with masks gained nothing (confidences: {kind}, width {width})"
    if rule.branches > 1:
        assert not rule.shadow, "shadows are for rules of one branch"
        return
    written, remasked = after != ids, ~masked & (after == MASK)
    allowed = masked if v.editable is None else masked | v.editable
    assert not (written & ~allowed & ~remasked).any(), "a position was written that is not open"
    chosen = written & allowed & ~remasked
    assert torch.equal(after[chosen], v.top[chosen]), "a token was written that is not the top one"
    if checked is not None and v.unaware is not None:
        assert torch.equal(v.unaware.isnan(), checked.isnan()), "a rule changes what it was given: view.unaware"
        assert not (remasked & checked.isnan()).any(), "a token was remasked that nothing speaks against"
    else:
        assert not remasked.any(), "a token was remasked without shadows"


def check_rows_apart(decoder: Chosen) -> None:
    """What a row gets depends on no other row, nor on the order of rows."""
    rule = rule_of(decoder)
    n = rule.branches
    together = rule.step(view(rule, 7, 8))
    for row in (0, 3, 6):
        alone = torch.arange(row * n, row * n + n)
        same = torch.equal(rule.step(part(view(rule, 7, 8), alone)), together[alone])
        assert same, "a row by itself gets other tokens than in a batch"
    order = (torch.randperm(7)[:, None] * n + torch.arange(n)).flatten()
    assert torch.equal(rule.step(part(view(rule, 7, 8), order)), together[order]), "the order of rows changes their tokens"


def check_no_host_read(decoder: Chosen) -> None:
    """The step can be captured as a graph: fake tensors have shapes and no values, and whatever depends on one raises."""
    rule = rule_of(decoder)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        v = view(rule, 3, 8)
        fake = {f: mode.from_tensor(t) for f, t in vars(v).items() if isinstance(t, Tensor)}
        state = None if v.state is None else {k: mode.from_tensor(t) for k, t in v.state.items()}
        v = View(**{**vars(v), **fake, "state": state})
        try:
            logits = rule.adjust(v, torch.zeros(*v.ids.shape, VOCAB)) if rule.adjust else None
            after = rule.step(v)
        except Exception as error:
            raise AssertionError(
                f"the rule reads a value on the host, which no captured graph can ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}): no .item(), no `if` on a tensor, no boolean indexing"
            ) from error
    assert logits is None or logits.shape == (*v.ids.shape, VOCAB), "adjust must return logits of the same shape"
    assert after.shape == v.ids.shape, "step must return the block's next ids"


def check_generation(decoder: Chosen, family: str) -> None:
    """Generation ends under every cache that goes with it, and a row of a batch gives what it gives by itself."""
    model, given = _model(family), prompts(5, 11, 8)
    plans = [plan for plan in registry.names(Kind.CACHES) if accepted(family, plan, decoder)]
    assert "none" in plans, f"the rule does not run without a cache for {family}"
    for plan in plans:
        options = {"decoder": decoder, "cache": plan, "gen_length": 13, "stop_ids": ()}
        where = f"cache {plan}, family {family}"
        out = generate(model, given, **options)
        for i, (sequence, prompt) in enumerate(zip(out.sequences, given, strict=True)):
            assert torch.equal(sequence[: len(prompt)], prompt), f"the prompt was changed ({where})"
            assert len(sequence) == len(prompt) + 13 and MASK not in sequence[len(prompt) :], f"masks are left ({where})"
            # A token each, a block's opening, a draft for each token, and what edits full blocks.
            most = 13 + 3 + 13 * rule_of(decoder).drafts + 3 * rule_of(decoder).max_post_steps
            assert out.stats.row_forwards[i] <= most, f"more forwards than tokens ({where})"
        alone = generate(model, given[1], **options)
        assert torch.equal(alone.sequences[0], out.sequences[1]), f"a row by itself gets other tokens ({where})"
        assert alone.stats.row_forwards[0] == out.stats.row_forwards[1], f"a row by itself takes other forwards ({where})"


def check_lossless(decoder: Chosen, family: str) -> None:
    """The tokens of one token per step, in fewer forwards, under every cache whose forwards depend on the block only."""
    caches: dict[str, Any] = {n: registry.find(Kind.CACHES, n) for n in caches_of(family)}
    plans = [name for name, kind in caches.items() if kind.pure]
    spent = saved = 0
    for seed in range(2):
        model, given = random_model(family, seed), prompts(4, 9)
        for plan in plans:
            options: dict[str, Any] = {"cache": plan, "gen_length": 24, "block_length": 8}
            one = generate(model, given, decoder="quota", **options)
            fast = generate(model, given, decoder=decoder, **options)
            assert _ids(fast) == _ids(one), f"other tokens than one token per step (cache {plan}, family {family})"
            spent, saved = spent + sum(fast.stats.row_forwards), saved + sum(one.stats.row_forwards)
    assert spent < saved, f"no fewer forwards than one token per step ({family})"


def _ids(out: Output) -> list[list[int]]:
    return [s.tolist() for s in out.sequences]


# Caches.


def caches_of(family: str) -> tuple[str, ...]:
    """The caches that fit a family."""
    return registry.caches_for(_model(family).spec)


def plans_of(plan: Chosen) -> Iterator[tuple[Any, list[Block]]]:
    """The plan, its options at their defaults, over every geometry it takes."""
    kind: Any = registry.class_of(Kind.CACHES, plan)
    plan = kind() if isinstance(plan, str | type) else plan
    geometries = [prompt_aligned(8), prompt_aligned(64)] if kind.fits(False, False) else []
    geometries += [grid_aligned(8, 4), grid_aligned(8, 8), grid_aligned(8, 4, True)] if kind.fits(True, False) else []
    geometries += [causal_aligned(8), causal_aligned(64)] if kind.fits(False, True) else []
    for geometry in geometries:
        for prompt, length in SHAPES:
            yield plan, geometry(prompt, prompt + length)


def check_passes(plan: Chosen) -> None:
    """Passes stay in the sequence, recompute the whole block, and read no key that was never computed."""
    for cache_plan, blocks in plans_of(plan):
        known = 0  # positions whose keys have been computed at least once
        for block in blocks:
            steps = [Progress(0, 0, True), Progress(1, 1, True), Progress(2, 2, False), Progress(9, 9, False)]
            passes = [cache_plan.step(block, progress) for progress in steps]
            for p in passes:
                assert p.start <= block.start and block.stop <= p.stop, "a step must recompute the whole block"
            opening = cache_plan.open(block)
            for p in ([opening] if opening else []) + passes:
                inside = 0 <= p.start < p.stop <= block.visible_end and p.stop <= p.read <= block.visible_end
                assert inside, f"a pass leaves the sequence: {p} in {block}"
                assert p.start <= known, "keys before the pass were never computed"
                known = max(known, p.stop)
                first, last = p.hide
                hidden = first >= last or block.stop <= first < last < block.visible_end
                assert hidden, "the block or the last slot is hidden"
                assert p.read <= known or p.hide[1] >= known, "a pass reads keys that were never computed"


def check_endings(plan: Chosen) -> None:
    """Whatever the number of steps, no mask is left and the prompt stays."""
    for family in (f for f in FAMILIES if registry.fits(plan, _model(f).spec)):
        model, given = _model(family), prompts(3, 10)
        for steps in (5, 9, 16):
            options: dict[str, Any] = {
                "decoder": "quota",
                "steps": steps,
                "gen_length": 16,
                "small_block_size": 4,
                "stop_ids": (),
            }
            out = generate(model, given, cache=plan, **options)
            for sequence, prompt in zip(out.sequences, given, strict=True):
                where = f"{steps} steps, family {family}"
                whole = len(sequence) == len(prompt) + 16 and MASK not in sequence[len(prompt) :]
                assert whole, f"masks are left ({where})"
                assert sequence[: len(prompt)].tolist() == prompt.tolist(), f"the prompt was changed ({where})"

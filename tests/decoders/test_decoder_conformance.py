# SPDX-License-Identifier: Apache-2.0
"""What every decoder owes, whatever its rule, over the files of fastdllm/decoders: a new one is tested the day it lands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdllm
from fastdllm import registry
from fastdllm.build import assemble
from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View
from tests.random_models import FAMILIES, MASK, VOCAB, accepted, prompts, random_model

DECODERS = registry.names("decoders")
KINDS = ("spread", "sure", "hopeless", "equal", "certain")


def decoder(name: str, width: int = 8) -> DecoderRule:
    config = fastdllm.DecodeConfig(decoder=name, gen_length=4 * width, block_length=width)
    return assemble(random_model(), config).decoder


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
    # Some tokens may not be taken back; of the others, most are doubtful where confidences are low.
    fixed = keep | (torch.rand(n, width, generator=g) < 0.3)
    check = (conf.flip(1) * 0.95).masked_fill(fixed, torch.nan) if rule.shadow else None
    return View(ids, keep, top, conf, step, initial, MASK, entropy, margin, torch.arange(n), state, check)


def part(v: View, index: Tensor) -> View:
    """The view of some rows, at the same place of the state."""
    fields = {f: t[index] for f, t in vars(v).items() if isinstance(t, Tensor)}
    return View(mask_id=v.mask_id, state=v.state, **fields)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_each_step_commits_and_stays_inside(name: str, kind: str, width: int) -> None:
    rule = decoder(name, width)
    v = view(rule, 9, width, kind)
    ids, masked, checked = v.ids.clone(), v.masked.clone(), v.unaware.clone() if rule.shadow else None
    after = rule.step(v)
    assert after.shape == ids.shape and after.dtype == ids.dtype
    assert torch.equal(v.ids, ids) and torch.equal(v.masked, masked), "a rule changes what it was given"
    lead = slice(None, None, rule.branches)  # branch 0 is the row's content
    left = (after[lead] == MASK).sum(1)
    had = masked[lead].sum(1)
    assert (left[had > 0] < had[had > 0]).all(), "a row with masks gained nothing"
    if rule.branches == 1:
        written, taken_back = after != ids, ~masked & (after == MASK)
        assert not (written & ~masked & ~taken_back).any(), "a position was written that is not open"
        assert torch.equal(after[written & masked], v.top[written & masked])
        if rule.shadow:
            assert torch.equal(v.unaware.isnan(), checked.isnan()), "a rule changes what it was given"
            assert not (taken_back & checked.isnan()).any(), "a token was taken back that nothing speaks against"
        else:
            assert not taken_back.any(), "a token was taken back without shadows"
    else:
        assert not rule.shadow, "shadows are for rules of one branch"


@pytest.mark.parametrize("name", DECODERS)
def test_rows_do_not_see_each_other(name: str) -> None:
    rule = decoder(name)
    n = rule.branches
    together = rule.step(view(rule, 7, 8))
    for row in (0, 3, 6):
        alone = torch.arange(row * n, row * n + n)
        assert torch.equal(rule.step(part(view(rule, 7, 8), alone)), together[alone])
    order = torch.randperm(7)
    order = (order[:, None] * n + torch.arange(n)).flatten()
    assert torch.equal(rule.step(part(view(rule, 7, 8), order)), together[order])


@pytest.mark.parametrize("name", DECODERS)
def test_no_value_is_read_on_the_host(name: str) -> None:
    """Fake tensors have shapes and no values: whatever depends on a value raises."""
    rule = decoder(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        v = view(rule, 3, 8)
        fake = {f: mode.from_tensor(t) for f, t in vars(v).items() if isinstance(t, Tensor)}
        state = None if v.state is None else {k: mode.from_tensor(t) for k, t in v.state.items()}
        v = View(**{**vars(v), **fake, "state": state})
        if rule.adjust:
            assert rule.adjust(v, torch.zeros(*v.ids.shape, VOCAB)).shape == (*v.ids.shape, VOCAB)
        assert rule.step(v).shape == v.ids.shape


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_ends_and_rows_are_independent(name: str, family: str) -> None:
    model, given = random_model(family), prompts(5, 11, 8)
    caches = [cache for cache in registry.names("caches") if accepted(family, cache, name)]
    assert "none" in caches
    for cache in caches:
        options = {"decoder": name, "cache": cache, "gen_length": 13, "stop_ids": ()}
        out = fastdllm.generate(model, given, **options)
        for i, (sequence, prompt) in enumerate(zip(out.sequences, given, strict=True)):
            assert torch.equal(sequence[: len(prompt)], prompt)
            assert len(sequence) == len(prompt) + 13 and not (sequence[len(prompt) :] == MASK).any()
            assert out.stats.row_forwards[i] <= 13 + 3
        alone = fastdllm.generate(model, given[1], **options)
        assert torch.equal(alone.sequences[0], out.sequences[1])
        assert alone.stats.row_forwards[0] == out.stats.row_forwards[1]


@pytest.mark.parametrize("name", [n for n in DECODERS if decoder(n).lossless])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_decoders_give_the_tokens_of_one_token_per_step(name: str, family: str) -> None:
    caches = [
        c
        for c in registry.names("caches")
        if registry.find("caches", c).pure and registry.find("caches", c).block_causal in (None, family == "v2")
    ]
    spent = saved = 0
    for seed in range(3):
        model, given = random_model(family, seed), prompts(4, 9)
        for cache in caches:
            options = {"cache": cache, "gen_length": 24, "block_length": 8}
            one = fastdllm.generate(model, given, decoder="quota", **options)
            fast = fastdllm.generate(model, given, decoder=name, **options)
            assert [s.tolist() for s in fast.sequences] == [s.tolist() for s in one.sequences], (cache, seed)
            spent, saved = spent + sum(fast.stats.row_forwards), saved + sum(one.stats.row_forwards)
    assert spent < saved


def test_lossless_decoders_refuse_what_makes_them_lossy() -> None:
    model = random_model("v2")
    with pytest.raises(ValueError, match="sub_block"):
        fastdllm.generate(model, prompts(4), decoder="draft_verify", cache="sub_block", gen_length=16)
    with pytest.raises(ValueError, match="temperature"):
        fastdllm.generate(model, prompts(4), decoder="draft_verify", temperature=0.5, gen_length=16)
    with pytest.raises(ValueError, match="top_rho"):
        fastdllm.generate(random_model("llada"), prompts(4), decoder="draft_verify", cache="top_rho", gen_length=16)

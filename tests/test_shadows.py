# SPDX-License-Identifier: Apache-2.0
"""Shadows: what they see, what they cost, what they leave alone, and what happens to a token that is remasked."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm import engine, registry
from fastdllm.build import assemble, runner
from fastdllm.decoders.base import DecoderRule
from fastdllm.engine import Request, decode
from fastdllm.forward import Window
from fastdllm.models import Model
from fastdllm.models.transformer import Transformer
from fastdllm.view import View
from tests.random_models import FAMILIES, MASK, STOP, accepted, prompts, random_model
from tests.scripted_model import scripted_model

PAIRS = [(f, c) for f in FAMILIES for c in registry.names("caches") if accepted(f, c, "wino")]
OPTIONS: dict[str, Any] = {"decoder": "wino", "gen_length": 19, "block_length": 8, "small_block_size": 4, "stop_ids": ()}


@dataclass(frozen=True)
class Watching(DecoderRule):
    """One token per step, which shadows watch: keeps a copy of every view."""

    seen: list[View]

    shadow = True

    def step(self, view: View) -> Tensor:
        self.seen.append(replace(view))
        return view.commit(torch.zeros_like(view.masked))


@dataclass(frozen=True)
class Fickle(DecoderRule):
    """Commits the two most confident and remasks the token that was written first of those it may, whatever the check."""

    shadow = True

    def step(self, view: View) -> Tensor:
        commit = view.masked & (view.ranked()[1] < 2)
        allowed = ~view.unaware.isnan()
        remask = allowed & (allowed.cumsum(1) < commit.sum(1, keepdim=True))
        return torch.where(commit, view.top, view.ids.masked_fill(remask, view.mask_id))


def shallow(family: str) -> Model:
    """One layer: there nothing that a query sees has seen the token in question."""
    model = random_model(family)
    spec = replace(model.spec, layers=1)
    network = Transformer(spec)
    network.load_state_dict({k: v for k, v in model.network.state_dict().items() if k in network.state_dict()})
    return Model(network.requires_grad_(False), spec, None, model.name)


def run(model: Model, rule: DecoderRule, given: list[Tensor], **options: Any) -> list[engine.Step]:
    """The steps of decoding `given` by a rule that is not in the folder. options: of DecodeConfig, and `fixed`."""
    fixed = options.pop("fixed", {})
    config = fastdllm.DecodeConfig(**{**OPTIONS, **options})
    requests = [Request(p, config.gen_length, 0, fixed) for p in given]
    return list(decode(model, requests, replace(assemble(model, config), decoder=rule), runner(model, config), trace=True))


def plain(model: Model, ids: Tensor, first: int) -> Tensor:
    """Log-probabilities [T, V] of every position from one forward without a cache, in a block that begins at `first`."""
    spec, pos = model.spec, torch.arange(len(ids))[None]
    limit = torch.full_like(pos, len(ids))
    if spec.block_causal:
        limit = torch.minimum(limit, (pos // spec.block_causal + 1) * spec.block_causal)
    if spec.causal_context:
        limit = torch.where(pos < first, pos + 1, limit)
    store = model.network.new_store(1, len(ids))
    window = Window(torch.zeros(1, dtype=torch.long), pos, limit, len(ids))
    logits = model.network.logits(model.network(ids[None], window, store)[0])
    logits = logits.masked_fill(model.banned, -torch.inf).log_softmax(-1)
    return logits.roll(spec.shift, 0)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_one_layer_a_shadow_is_a_forward_with_the_token_masked(family: str, cache: str) -> None:
    """For every token of every block, prompts that end inside a v2 block and a short last block included."""
    if family == "v2" and cache != "none":
        cache = {"prefix": "block", "dual": "sub_block"}[cache]
    if family == "nemotron" and cache != "none":
        cache = "causal"
    model, compared = shallow(family), 0
    for prompt in prompts(5, 8, 12):
        x = torch.full((64,), MASK)
        x[: len(prompt)] = prompt
        total = len(prompt) + OPTIONS["gen_length"]
        length = -(-total // 8) * 8 if family == "v2" else total
        seen: list[View] = []
        steps = run(model, Watching(seen), [prompt], cache=cache)
        for view, step in zip(seen, steps, strict=True):
            first = max(step.starts[0], len(prompt))
            end = {"v2": (first // 8 + 1) * 8, "nemotron": step.stops[0]}.get(family, length)
            for at in (~view.unaware[0].isnan()).nonzero()[:, 0].tolist():
                assert not view.masked[0, at]
                without = x[:end].clone()
                without[first + at] = MASK
                want = plain(model, without, first)[first + at, view.ids[0, at]].exp()
                torch.testing.assert_close(view.unaware[0, at], want, rtol=1e-4, atol=1e-6)
                compared += 1
            x[first : step.stops[0]] = step.ids[0, : step.stops[0] - first]
    assert compared > 40


@pytest.mark.parametrize("family, cache", PAIRS)
def test_nobody_sees_a_shadow(family: str, cache: str) -> None:
    """A rule that asks shadows and ignores them gives the tokens and forwards of one that does not."""
    model, given = random_model(family), prompts(5, 8, 11)
    options = {**OPTIONS, "cache": cache, "decoder": "threshold", "threshold": 1.0}
    out = fastdllm.generate(model, given, **options)
    steps = run(model, Watching([]), given, cache=cache)
    done = {row: result for step in steps for row, result in step.done.items()}
    for row, sequence in enumerate(out.sequences):
        assert torch.equal(done[row].ids, sequence)
        assert done[row].forwards == out.stats.row_forwards[row]
        assert done[row].positions > out.stats.row_positions[row]


@pytest.mark.parametrize("family, cache", PAIRS)
def test_only_tokens_that_the_block_chose_are_taken_back(family: str, cache: str) -> None:
    """Constraints stay in every step, a step gains a token, and what is remasked is written again."""
    model, given, remasked = random_model(family), prompts(5, 8, 11), 0
    fixed = {0: 4, 3: 5, 8: 6, 9: 7, 18: 8}
    at: dict[int, Tensor] = {}  # the answer of each row so far
    steps = run(model, Fickle(), given, cache=cache, fixed=fixed, small_block_size=8)
    for step in steps:
        for i, row in enumerate(step.rows):
            prompt = len(given[row])
            start = max(step.starts[i], prompt)
            before = at.get(row, torch.tensor([fixed.get(place, MASK) for place in range(19)]))
            after, here = before.clone(), slice(start - prompt, step.stops[i] - prompt)
            after[here] = step.ids[i, : step.stops[i] - start]
            assert all(after[place] == token for place, token in fixed.items())
            if not step.confidence[i].isnan().all():  # not an opening that could give a constrained token only
                assert (after == MASK).sum() < (before == MASK).sum()
            remasked += int(((after == MASK) & (before != MASK)).sum())
            assert torch.equal(step.committed[i, : step.stops[i] - start], (before[here] == MASK) & (after[here] != MASK))
            at[row] = after
    assert remasked > 4
    for row, result in {row: result for step in steps for row, result in step.done.items()}.items():
        assert torch.equal(result.ids[: len(given[row])], given[row]), "the prompt's tail was remasked"
        assert torch.equal(result.ids[len(given[row]) :], at[row]) and MASK not in at[row]


def test_revoking_under_the_block_cache_equals_recomputing_everything() -> None:
    """The first token of a block comes from the block before it, which never sees it: it stays under either cache."""
    model, given = random_model("v2"), prompts(5, 8, 11)
    for prompt, sub in itertools.product(given, (4, 8)):
        none, block = (run(model, Fickle(), [prompt], cache=cache, small_block_size=sub) for cache in ("none", "block"))
        assert [step.ids.tolist() for step in none] == [step.ids.tolist() for step in block]


@pytest.mark.parametrize("family, cache", [*PAIRS, ("dream", "rule")])
def test_counts_include_the_shadows(family: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = random_model(family), Counter()
    first = {"cache": "dual", "first_token": "rule"} if cache == "rule" else {"cache": cache}
    forward = model.network.forward

    def counted(ids: Tensor, *args: Any) -> Tensor:
        counts["forwards"] += 1
        counts["positions"] += ids.numel()
        return forward(ids, *args)

    monkeypatch.setattr(model.network, "forward", counted)
    for prompt in prompts(5, 16):
        counts.clear()
        out = fastdllm.generate(model, prompt, **{**OPTIONS, **first})
        assert counts["forwards"] == out.stats.forwards == out.stats.row_forwards[0]
        assert counts["positions"] == out.stats.row_positions[0]
        assert out.stats.row_layer_tokens[0] == counts["positions"] * model.spec.layers


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_padded_passes_keep_their_shadows_apart(family: str) -> None:
    """Blocks of more than 64 positions share a forward at different widths; padding and shadows must not meet."""
    model, given = random_model(family), prompts(3, 9)
    requests = [Request(given[0], 90), Request(given[1], 81)]
    for cache in ("none", "dual"):
        config = fastdllm.DecodeConfig(decoder="wino", cache=cache, gen_length=90, block_length=90, stop_ids=())
        chosen = replace(assemble(model, config), decoder=Fickle()), runner(model, config)
        together = {row: r for step in decode(model, requests, *chosen) for row, r in step.done.items()}
        for row, request in enumerate(requests):
            (alone,) = (r for step in decode(model, [request], *chosen) for r in step.done.values())
            assert torch.equal(together[row].ids, alone.ids)
            assert (together[row].forwards, together[row].positions) == (alone.forwards, alone.positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_tokens_can_be_taken_back(family: str) -> None:
    model, given = random_model(family), prompts(5, 9)
    options = {**OPTIONS, "temperature": 0.8, "threshold": 0.2, "keep": 1.0}
    out = fastdllm.generate(model, given, trace=True, **options)
    assert sum(int(step.committed.sum()) for step in out.trace) > 2 * OPTIONS["gen_length"], "nothing was remasked"
    assert not any((s[-OPTIONS["gen_length"] :] == MASK).any() for s in out.sequences)
    for row, prompt in enumerate(given):
        assert torch.equal(fastdllm.generate(model, prompt, seed=row, **options).sequences[0], out.sequences[row])


def test_a_stop_token_that_may_still_be_taken_back_does_not_end_the_row() -> None:
    """The block's stop token comes first and alone; the row ends when the block is full."""
    model = scripted_model("llada", [STOP], [0.9] * 5 + [0.99] + [0.5] * 20)
    out = fastdllm.generate(model, prompts(5), **{**OPTIONS, "stop_ids": None, "threshold": 0.95}, trace=True)
    assert out.sequences[0][5] == STOP and len(out.sequences[0]) == 6
    assert out.trace[0].committed[0].tolist() == [True] + [False] * 7, "the stop token came first"
    assert [bool(step.done) for step in out.trace] == [False] * 7 + [True], "the first block, to its end"


def test_what_shadows_do_not_go_with_is_refused() -> None:
    for family, message, options in (
        ("llada", "cfg_scale=0", {"cfg_scale": 1.0}),
        ("llada", "cache='top_rho' skips positions", {"cache": "top_rho"}),
        ("v2", "reuse_k=2 skips positions", {"reuse_k": 2, "layer_subset": "1", "cache": "block"}),
    ):
        with pytest.raises(ValueError, match=f"decoder='wino'.*{message}"):
            fastdllm.generate(random_model(family), prompts(5), **{**OPTIONS, **options})

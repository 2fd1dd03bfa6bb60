# SPDX-License-Identifier: Apache-2.0
"""`attention_discount` over every rule that takes it: which tokens still fall together, and what the rules are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm import build, kernels, registry
from fastdllm.decoders import entropy_bound, factor, threshold
from fastdllm.discounted import Discounted
from fastdllm.runners import cuda_graph
from fastdllm.testing import FAMILIES, MASK, caches_of, check_decoder
from tests.random_models import prompts, random_model
from tests.runners.test_bucketing import emulated
from tests.scripted_model import ScriptedNetwork, scripted_model
from tests.test_lossless import MIXED, compare


def goes(rule: str, family: str = "llada", cache: str | None = None) -> bool:
    """Whether `attention_discount` takes this rule."""
    try:
        options = {"decoder": rule, "cache": cache, "attention_discount": 4, "gen_length": 8}
        build.assemble(random_model(family), fastdllm.DecodeConfig(**options))
    except ValueError:
        return False
    return True


RULES = [n for n in registry.names("decoders") if goes(n)]
PLACES = [(f, c) for f in FAMILIES for c in caches_of(f) if goes("threshold", f, c)]


def attending(conf: list[float], pairs: list[tuple[int, int]]) -> fastdllm.Model:
    """A model without a shift that says so of an answer's positions after a prompt of 4, where the first of each pair
    attends to the second with half of its attention."""
    tokens = [9] * 4 + [10 + i for i in range(len(conf))]
    model = scripted_model("llada", tokens, [1.0] * 4 + conf)

    class Attending(ScriptedNetwork):
        def forward(self, ids: Tensor, window: Any, store: Any, hook: Any = None) -> Tensor:
            if window.look is not None:
                for i, s in pairs:
                    window.look.out[:, i, s] = 0.5
            return super().forward(ids, window, store, hook)

    model.network.__class__ = Attending
    return model


def forwards_of(model: fastdllm.Model, length: int, **options: Any) -> list[int]:
    """The forward that committed each position of the answer."""
    given: dict[str, Any] = {"gen_length": length, "block_length": length, "stop_ids": (), "cache": "none"}
    steps = fastdllm.stream(model, prompts(4), **given, **options)
    return next(r.committed_at.tolist() for step in steps for r in step.done.values())


@pytest.mark.parametrize("pairs", [[(1, 2), (2, 1)], [(2, 1)]], ids=["each other", "one another"])
def test_of_two_that_attend_to_each_other_one_is_committed(pairs: list[tuple[int, int]]) -> None:
    """0.9 - 1 * 0.5 * (1 - 0.91) is below the threshold of 0.88, and the positions next to them go at once."""
    model = attending([0.95, 0.91, 0.9, 0.95], pairs)
    assert forwards_of(model, 4, threshold=0.88) == [1, 1, 1, 1]
    assert forwards_of(model, 4, threshold=0.88, attention_discount=1) == [1, 1, 2, 1]
    assert forwards_of(model, 4, threshold=0.84, attention_discount=1) == [1, 1, 1, 1]


def test_attention_to_what_is_certain_or_taken_later_costs_nothing() -> None:
    assert forwards_of(attending([1.0, 0.9], [(1, 0)]), 2, threshold=0.89, attention_discount=40) == [1, 1]
    # Position 0 is the surest and taken first: that it attends to the other one is no matter.
    assert forwards_of(attending([0.95, 0.9], [(0, 1)]), 2, threshold=0.89, attention_discount=40) == [1, 1]


def test_other_rules_see_the_lowered_confidences() -> None:
    model, pairs = [0.97, 0.96, 0.95, 0.2], [(1, 0), (2, 0)]
    two = attending(model, pairs)
    assert forwards_of(two, 4, decoder="quota", steps=2) == [1, 1, 2, 2]
    assert forwards_of(two, 4, decoder="quota", steps=2, attention_discount=100) == [1, 2, 2, 1]
    # (n + 1)(1 - c) < 0.21 for three, and for one when the others are worth less.
    assert forwards_of(two, 4, decoder="factor", factor=0.21)[:3] == [1, 1, 1]
    assert forwards_of(two, 4, decoder="factor", factor=0.21, attention_discount=40)[:3] == [1, 2, 2]


@pytest.mark.parametrize("inner", [threshold.Decoder(0.5), factor.Decoder(1.5), entropy_bound.Decoder(1.0)])
def test_it_owes_what_every_decoder_owes(inner: Any) -> None:
    families = FAMILIES if isinstance(inner, threshold.Decoder) else ("dream",)
    check_decoder(Discounted(inner, 20.0), families)


@pytest.mark.parametrize("number, place", list(enumerate(PLACES)), ids=str)
def test_rows_of_a_batch_are_by_themselves(number: int, place: tuple[str, str]) -> None:
    family, cache = place
    rule = ("threshold", "quota", "credit")[number % 3]
    model, given = random_model(family, 3), prompts(3, 9, 14)
    options = {"cache": cache, "decoder": rule, "gen_length": 13, "block_length": 8, **MIXED[rule]}
    together = fastdllm.generate(model, given, attention_discount=30, batch_size=2, **options)
    for i, prompt in enumerate(given):
        alone = fastdllm.generate(model, prompt, attention_discount=30, **options)
        assert alone.sequences[0].tolist() == together.sequences[i].tolist()
        assert alone.stats.row_forwards[0] == together.stats.row_forwards[i]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_takes_more_forwards_where_positions_attend_to_each_other(family: str) -> None:
    options = {"threshold": 0.4, "gen_length": 13, "block_length": 8, "stop_ids": ()}
    plain, lowered = (
        fastdllm.generate(random_model(family, 3), prompts(9, 14), attention_discount=weight, **options)
        for weight in (0, 30)
    )
    assert sum(lowered.stats.row_forwards) > sum(plain.stats.row_forwards)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_ends_under_it(rule: str) -> None:
    for family in FAMILIES:
        options = {"decoder": rule, "gen_length": 13, "block_length": 8, "stop_ids": (), **MIXED[rule]}
        out = fastdllm.generate(random_model(family), prompts(5, 9), attention_discount=30, **options)
        assert not any((s[-13:] == MASK).any() for s in out.sequences)
        assert max(out.stats.row_forwards) <= 13 + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_over_it_keeps_its_tokens_and_its_order(family: str) -> None:
    for rule in ("threshold", "credit", "entropy_bound"):
        options = {"decoder": rule, "gen_length": 20, "block_length": 8, "attention_discount": 30, **MIXED[rule]}
        compare(random_model(family, 1), prompts(4, 9, 6), 4, **options)


class Checked:
    """Next to every forward, the attention of its last layer in full, computed anew from the queries and the store."""

    def __init__(self, model: fastdllm.Model, patch: pytest.MonkeyPatch) -> None:
        self.network, self.compared = model.network, 0
        forward, attention = self.network.forward, kernels.attention

        def watched(q: Tensor, k: Tensor, *args: Any, **given: Any) -> Tensor:
            self.q, self.k, self.hide = q, k.clone(), given["hide"]
            return attention(q, k, *args, **given)

        def checked(ids: Tensor, window: Any, store: Any, *rule: Any) -> Tensor:
            out = forward(ids, window, store, *rule)
            self.compare(window)
            return out

        patch.setattr(kernels, "attention", watched)
        patch.setattr(self.network, "forward", checked)

    def compare(self, window: Any) -> None:
        look, share = window.look, self.weights(window)
        ahead = window.kv_len == window.pos + 1 if self.network.spec.causal_context else torch.zeros_like(window.pos) > 0
        predicted = window.pos + torch.where(ahead, 1, self.network.spec.shift)
        at = {(int(row), p): (r, w) for r, row in enumerate(window.row) for w, p in enumerate(predicted[r].tolist())}
        for r, slots in enumerate(look.slot.tolist()):
            real = [j for j, slot in enumerate(slots) if slot == slots[0] + j < window.max_kv_len]  # without padding
            for i in real:
                query = at.get((int(look.row[r]), slots[i]))  # none where it is not predicted in this pass
                if query is not None:
                    want = share[query][[slots[j] for j in real]]
                    torch.testing.assert_close(look.out[r, i, real], want, rtol=1e-4, atol=1e-5)
                    self.compared += len(real)

    def weights(self, window: Any) -> Tensor:
        """What each query gives to each slot [R, W, T]."""
        slots = torch.arange(window.max_kv_len)
        seen = slots < window.kv_len[..., None]
        if self.hide is not None:
            seen &= ((slots < self.hide[:, :1]) | (slots >= self.hide[:, 1:]))[:, None]
        groups = self.q.shape[2] // self.k.shape[1]
        keys = self.k[window.row, :, : window.max_kv_len].repeat_interleave(groups, 1)  # [R, H, T, D]
        scores = torch.einsum("rwhd,rhtd->rhwt", self.q, keys) * self.q.shape[-1] ** -0.5
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean(1)


RUNS: list[dict[str, Any]] = [{}, {"lossless": 3}, {"runner": "cuda_graph"}]


@pytest.mark.each_choice
@pytest.mark.parametrize("family, cache", PLACES)
@pytest.mark.parametrize("how", RUNS, ids=str)
def test_what_a_rule_is_told_is_the_attention_of_the_last_layer(
    monkeypatch: pytest.MonkeyPatch, family: str, cache: str, how: dict[str, Any]
) -> None:
    """Rows of unlike lengths, blocks that open as one branch, and passes of unlike widths in pieces."""
    if "lossless" in how and not registry.find("caches", cache).pure:
        return
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    model = random_model(family, 2)
    checked = Checked(model, monkeypatch)
    options = {"cache": cache, "threshold": 0.4, "gen_length": 11, "block_length": 8, "small_block_size": 4, **how}
    fastdllm.generate(model, prompts(3, 12, 7), attention_discount=10, stop_ids=(), **options)
    assert checked.compared > 100


def test_nobody_asks_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "block_attention", None)
    monkeypatch.setattr(kernels, "discount", None)
    fastdllm.generate(random_model(), prompts(4), gen_length=16, attention_discount=0)


def test_guidance_takes_the_attention_of_the_lane_that_sees_the_prompt() -> None:
    model, given = random_model("llada", 4), prompts(6, 9)
    options = {"cfg_scale": 0.5, "gen_length": 12, "block_length": 6, "threshold": 0.5, "attention_discount": 20}
    together = fastdllm.generate(model, given, **options)
    for i, prompt in enumerate(given):
        assert fastdllm.generate(model, prompt, **options).sequences[0].tolist() == together.sequences[i].tolist()


@pytest.mark.parametrize(
    "family, options, expected",
    [
        ("llada", {"decoder": "wino"}, "attention_discount=4.0 does not go with decoder='wino', which remasks"),
        ("llada", {"decoder": "lopa"}, "attention_discount=4.0 does not go with decoder='lopa', which tries branches"),
        ("llada", {"decoder": "draft_verify"}, "decoder='draft_verify', which tries branches"),
        ("nemotron", {"decoder": "self_speculate"}, "decoder='self_speculate', which drafts"),
        (
            "llada",
            {"cache": "top_rho"},
            "attention_discount=4.0 needs layers that run for whole passes; cache='top_rho' skips",
        ),
        (
            "v2",
            {"reuse_k": 2, "layer_subset": "1", "trim_ratio": 0.4},
            "attention_discount=4.0 .*; reuse_k=2 skips positions",
        ),
        ("llada", {"decoder": "quota", "confidence": "margin"}, "attention_discount=4.0 lowers probabilities and needs"),
        ("dream", {"decoder": "quota", "alg_temp": 0.5}, "needs confidence='probability', alg_temp=0"),
        ("llada", {"attention_discount": -1}, "attention_discount=-1.0 must be at least 0"),
    ],
)
def test_what_it_does_not_go_with_is_named(family: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        fastdllm.generate(random_model(family), prompts(4), **{"attention_discount": 4, "gen_length": 16, **options})


def test_few_rules_are_left_out() -> None:
    left_out = {"draft_verify", "joint_threshold", "lopa", "psd", "self_speculate", "self_verify", "wino"}
    assert set(registry.names("decoders")) - set(RULES) == left_out

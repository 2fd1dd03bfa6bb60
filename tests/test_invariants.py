# SPDX-License-Identifier: Apache-2.0
"""What holds for every model family under every cache and decoder.

The tests run over the combinations that `build.assemble` accepts, read off the folders, so that a new cache or decoder is
held to them too.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdllm
from fastdllm import registry, testing
from tests.random_models import FAMILIES, MASK, STOP, VOCAB, accepted, prompts, random_model
from tests.scripted_model import with_logits

DECODERS = registry.names("decoders")


def caches(family: str) -> list[str]:
    return list(testing.caches_of(family))


def combinations(family: str) -> list[tuple[str, str]]:
    """(cache, decoder) pairs that go together."""
    return [(c, d) for c, d in itertools.product(caches(family), DECODERS) if accepted(family, c, d)]


FITTING = [d for d in DECODERS if testing.fits(d, "llada")]  # of families without a causal context
ALL = [(f, c, d) for f in FAMILIES for c, d in combinations(f)]


def over(triples: list[tuple[str, str, str]]) -> pytest.MarkDecorator:
    """Run a test for these (family, cache, decoder)."""
    return pytest.mark.parametrize("family, cache, decoder", triples)


by_hypothesis = settings(deadline=None, derandomize=True)


def tokens(out: fastdllm.Output) -> list[list[int]]:
    return [s.tolist() for s in out.sequences]


def test_few_combinations_are_refused() -> None:
    """What the other tests leave out: a lossless rule where forwards depend on history, branches, shadows and edits
    where layers skip positions, drafts where nothing can verify them."""
    revising = ("draft_verify", "joint_threshold", "lopa", "psd", "wino")
    every = {(f, c, d) for f in FAMILIES for c in caches(f) for d in DECODERS}
    skipping = {(f, "top_rho", d) for f in ("llada", "dream") for d in revising}
    home = {"self_speculate": "nemotron", "self_verify": "v2"}
    drafting = {(f, c, d) for d in home for f in FAMILIES if f != home[d] for c in caches(f)}
    drafting |= {("v2", "fused", "self_verify")}  # its opening pass would be a step that drafts nothing
    assert every - set(ALL) == skipping | drafting | {("v2", c, "draft_verify") for c in ("fused", "sub_block")}


ADVERSARIES = {
    "the mask is the most likely": lambda x: x.index_fill(-1, torch.tensor(MASK), 60.0),
    "all logits are equal": torch.zeros_like,
    "all logits are equal and large": lambda x: torch.full_like(x, 1e3),
    "logits up to 1e3": lambda x: x * 1e3 / x.abs().amax(),
    "one token is certain": lambda x: x.index_fill(-1, torch.tensor(3), 1e3),
    "all but the mask are impossible": lambda x: torch.full_like(x, -1e9).index_fill(-1, torch.tensor(MASK), 0.0),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turn", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_generation_ends_without_masks_and_keeps_the_prompt(family: str, turn: int) -> None:
    """Each combination meets one of the six adversaries in a turn, each decoder and each cache all of them."""
    for i, (cache, decoder) in enumerate(combinations(family)):
        kind = list(ADVERSARIES)[(i + i // len(ADVERSARIES) + turn) % len(ADVERSARIES)]
        model = with_logits(random_model(family), ADVERSARIES[kind])
        given = prompts(3, 9)
        given[1][-1] = MASK  # the mask id is text like any other in a prompt
        out = fastdllm.generate(model, given, cache=cache, decoder=decoder, gen_length=13, block_length=8, stop_ids=())
        for sequence, prompt, forwards in zip(out.sequences, given, out.stats.row_forwards, strict=True):
            assert torch.equal(sequence[: len(prompt)], prompt), (cache, decoder)
            assert len(sequence) == len(prompt) + 13
            assert not (sequence[len(prompt) :] == MASK).any(), (cache, decoder)
            drafts = 13 if decoder in ("self_speculate", "self_verify") else 0
            edits = 3 * registry.find("decoders", decoder).max_post_steps  # of each full block
            assert forwards <= 13 + 3 + drafts + edits, (cache, decoder)  # a token each, and an opening of each block


@pytest.mark.parametrize("family", FAMILIES)
@settings(by_hypothesis, max_examples=12)
@given(data=st.data())
def test_a_row_of_a_ragged_batch_equals_the_row_alone(family: str, data: st.DataObject) -> None:
    """Tokens, forwards and positions, in any order, whether all fit on the canvas or rows enter when others leave."""
    cache, decoder = data.draw(st.sampled_from(combinations(family)))
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    block = 8 if family == "v2" else data.draw(st.integers(1, 12))
    options = {
        "cache": cache,
        "decoder": decoder,
        "gen_length": data.draw(st.integers(1, 20)),
        "block_length": block,
        "small_block_size": data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if n <= block])),
        "stop_ids": data.draw(st.sampled_from([(), (STOP,), (1, 5, 9)])),
    }
    torch.manual_seed(sum(lengths))
    model, given = random_model(family, len(lengths)), prompts(*lengths)
    together = fastdllm.generate(model, given, batch_size=data.draw(st.integers(1, 5)), **options)
    order = data.draw(st.permutations(range(len(given))))
    for row in order:
        alone = fastdllm.generate(model, given[row], **options)
        assert tokens(alone)[0] == tokens(together)[row]
        assert alone.stats.row_forwards[0] == together.stats.row_forwards[row]
        assert alone.stats.row_positions[0] == together.stats.row_positions[row]
        assert alone.stats.row_tokens[0] == together.stats.row_tokens[row]
    permuted = fastdllm.generate(model, [given[row] for row in order], **options)
    assert tokens(permuted) == [tokens(together)[row] for row in order]


@pytest.mark.each_choice
@over(ALL)
def test_early_stop_equals_the_full_run_cut_at_the_stop(family: str, cache: str, decoder: str) -> None:
    saved = 0
    for seed in range(2):
        model, given = random_model(family, seed), prompts(5, 8)
        options = {"cache": cache, "decoder": decoder, "gen_length": 16, "block_length": 8, "small_block_size": 4}
        full = fastdllm.generate(model, given, stop_ids=(), **options)
        answers = [s[len(p) :].tolist() for s, p in zip(full.sequences, given, strict=True)]
        stops = (answers[0][6], answers[1][3])
        stopped = fastdllm.generate(model, given, stop_ids=stops, **options)
        for i, (prompt, answer) in enumerate(zip(given, answers, strict=True)):
            end = next(n for n, token in enumerate(answer) if token in stops)
            assert stopped.sequences[i].tolist() == prompt.tolist() + answer[: end + 1]
            assert stopped.stats.row_tokens[i] == end
            assert stopped.stats.row_forwards[i] <= full.stats.row_forwards[i]
        saved += sum(full.stats.row_forwards) - sum(stopped.stats.row_forwards)
    assert saved > 0


@pytest.mark.each_choice
@over([triple for triple in ALL if triple[2] != "quota"])
def test_steps_change_nothing_for_adaptive_decoders(family: str, cache: str, decoder: str) -> None:
    model, given = random_model(family), prompts(5)
    options = {"cache": cache, "decoder": decoder, "gen_length": 11, "block_length": 8, "stop_ids": ()}
    runs = [fastdllm.generate(model, given, steps=steps, **options) for steps in (None, 1, 4, 10_000)]
    assert all(tokens(run) == tokens(runs[0]) for run in runs)
    assert all(run.stats.row_forwards == runs[0].stats.row_forwards for run in runs)


@pytest.mark.pairwise
@pytest.mark.parametrize("family, cache", [(f, c) for f in FAMILIES for c in caches(f)])
@pytest.mark.parametrize("schedule", ["even", "timesteps", "cosine"])
def test_every_number_of_steps_per_block_works(family: str, cache: str, schedule: str) -> None:
    model, given = random_model(family), prompts(8)
    for per_block in range(1, 9):
        options = {"cache": cache, "decoder": "quota", "schedule": schedule, "gen_length": 16, "block_length": 8}
        out = fastdllm.generate(model, given, small_block_size=8, steps=2 * per_block, stop_ids=(), **options)
        assert not (out.sequences[0] == MASK)[8:].any()
        # An opening that gives one token only comes on top of the steps: Dream's at one step a block, and v2's commits.
        extra = {"llada": 0, "dream": 2 * (per_block == 1), "v2": 2, "nemotron": 2}[family]
        assert out.stats.row_forwards[0] <= 2 * per_block + extra
        if schedule == "even" and family == "llada":
            assert out.stats.row_forwards[0] == 2 * per_block


@pytest.mark.parametrize("gen_length, block_length", [(40, 32), (9, 4), (7, 7), (5, 9), (1, 1), (1, 32)])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_one_token_a_step_is_the_default_also_with_a_short_last_block(
    gen_length: int, block_length: int, cache: str
) -> None:
    for steps in (None, gen_length):
        for family in ("llada", "dream"):
            out = fastdllm.generate(
                random_model(family),
                prompts(5),
                decoder="quota",
                cache=cache,
                steps=steps,
                gen_length=gen_length,
                block_length=block_length,
                schedule="even",
                stop_ids=(),
            )
            assert out.stats.row_forwards == [gen_length]


@pytest.mark.each_choice
@over(ALL)
def test_shortest_answers_and_blocks_that_do_not_fit(family: str, cache: str, decoder: str) -> None:
    for gen_length, block_length in ((1, 8), (1, 32), (3, 8), (11, 32), (9, 8)):
        options = {"cache": cache, "decoder": decoder, "gen_length": gen_length, "block_length": block_length}
        out = fastdllm.generate(random_model(family), prompts(1, 8), stop_ids=(), **options)
        assert [len(s) for s in out.sequences] == [1 + gen_length, 8 + gen_length]
        assert not any((s[-gen_length:] == MASK).any() for s in out.sequences)


SAMPLED = [
    {"decoder": "threshold", "temperature": 0.7},
    {"decoder": "threshold", "threshold": 0.3, "temperature": 1.0, "top_p": 0.9, "top_k": 5},
    {"decoder": "quota", "confidence": "random", "steps": 8},
    {"decoder": "quota", "confidence": "entropy", "alg_temp": 0.5, "steps": 8},
    {"decoder": "factor", "temperature": 0.9},
]


@pytest.mark.each_choice
@pytest.mark.parametrize("family, cache", [(f, c) for f in FAMILIES for c in caches(f)])
@pytest.mark.parametrize("sampled", SAMPLED, ids=str)
def test_a_seed_decides_the_output_and_each_row_has_its_own(family: str, cache: str, sampled: dict[str, Any]) -> None:
    model, given = random_model(family, seed=1), prompts(5, 9, 9)  # under seed 0 two orders may give the same tokens
    given[2] = given[1]
    options = {"cache": cache, "gen_length": 16, "block_length": 8, "stop_ids": (), **sampled}
    out = fastdllm.generate(model, given, seed=7, **options)
    torch.randn(5)  # the global generator has no part
    assert tokens(fastdllm.generate(model, given, seed=7, batch_size=2, **options)) == tokens(out)
    for i, prompt in enumerate(given):
        assert tokens(fastdllm.generate(model, prompt, seed=7 + i, **options))[0] == tokens(out)[i]
    assert tokens(fastdllm.generate(model, given, seed=8, **options)) != tokens(out)
    assert tokens(out)[1] != tokens(out)[2]


@pytest.mark.parametrize("family, cache", [(f, c) for f in FAMILIES for c in caches(f)])
def test_one_draw_per_row_and_step(family: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = random_model(family), prompts(5, 9)
    draws, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: draws.append(k["generator"]) or rand(*a, **k))
    out = fastdllm.generate(model, given, cache=cache, temperature=0.8, gen_length=16, block_length=8, stop_ids=())
    assert len(draws) == sum(out.stats.row_forwards)
    assert None not in draws


@pytest.mark.each_choice
@over(ALL)
def test_constraints_are_kept(family: str, cache: str, decoder: str) -> None:
    """Also at block starts, at the ends, over whole blocks, and per prompt."""
    fixed = [{0: 4, 3: 5, 8: 6, 15: 7}, {}, dict.fromkeys(range(16), 9), dict.fromkeys(range(3, 12), 8)]
    options = {"cache": cache, "decoder": decoder, "gen_length": 16, "block_length": 8, "stop_ids": ()}
    given = prompts(5, 8, 6, 8)
    out = fastdllm.generate(random_model(family), given, constraints=fixed, **options)
    for sequence, prompt, wanted in zip(out.sequences, given, fixed, strict=True):
        answer = sequence[len(prompt) :].tolist()
        assert all(answer[at] == token for at, token in wanted.items())
        assert MASK not in answer
    plain = fastdllm.generate(random_model(family), given[1], **options)
    assert tokens(plain)[0] == tokens(out)[1]


def test_constraints_are_read_by_the_model_from_the_first_step() -> None:
    model, given = random_model("llada"), prompts(5)
    seen: list[torch.Tensor] = []
    model.network.embed.register_forward_hook(lambda module, args, out: seen.append(args[0].clone()))
    fastdllm.generate(model, given, constraints={2: 7}, cache="none", gen_length=8, block_length=8)
    assert all(ids[0, 5 + 2] == 7 for ids in seen)


@pytest.mark.parametrize("family, exact", [("v2", "block"), ("nemotron", "causal")])
@settings(by_hypothesis, max_examples=12)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    gen_length=st.integers(1, 24),
    data=st.data(),
    sub=st.sampled_from([1, 2, 4, 8]),
)
def test_block_cache_equals_recomputing_everything(
    family: str, exact: str, seed: int, lengths: list[int], gen_length: int, data: st.DataObject, sub: int
) -> None:
    torch.manual_seed(seed)
    model, given = random_model(family, seed % 5), prompts(*lengths)
    drafting = [d for d in DECODERS if testing.fits(d, family)]
    decoder = data.draw(st.sampled_from(drafting if family == "nemotron" else FITTING))
    options = {"decoder": decoder, "gen_length": gen_length, "block_length": 8, "small_block_size": sub}
    none, block = (fastdllm.generate(model, given, cache=cache, **options) for cache in ("none", exact))
    assert tokens(none) == tokens(block)
    assert none.stats.row_forwards == block.stats.row_forwards
    assert sum(block.stats.row_positions) <= sum(none.stats.row_positions)


@settings(by_hypothesis, max_examples=12)
@given(
    seed=st.integers(0, 10_000),
    gen_length=st.integers(1, 24),
    block_length=st.integers(1, 12),
    decoder=st.sampled_from(FITTING),
)
def test_refreshing_at_every_step_is_no_cache(seed: int, gen_length: int, block_length: int, decoder: str) -> None:
    torch.manual_seed(seed)
    model, given = random_model("llada", seed % 5), prompts(6, 3)
    options = {"decoder": decoder, "gen_length": gen_length, "block_length": block_length}
    none = fastdllm.generate(model, given, cache="none", **options)
    always = fastdllm.generate(model, given, cache="vicinity", before=10_000, after=10_000, **options)
    assert tokens(none) == tokens(always)
    assert none.stats.row_forwards == always.stats.row_forwards
    if registry.find("decoders", decoder).branches == 1:  # an opening pass runs for one branch
        assert none.stats.row_positions == always.stats.row_positions


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_neutral_options_of_the_caches_are_the_dual_cache(family: str) -> None:
    model, given = random_model(family), prompts(6, 3)
    neutral = {"lazy": {"refresh_blocks": 1}, "suffix_window": {"suffix": 64}, "vicinity": {"before": 0, "after": 0}}
    neutral["top_rho"] = {"ratio": 1}
    dual = fastdllm.generate(model, given, cache="dual", gen_length=20, block_length=6)
    for cache, options in neutral.items():
        out = fastdllm.generate(model, given, cache=cache, gen_length=20, block_length=6, **options)
        assert tokens(out) == tokens(dual), cache
        assert out.stats.row_positions == dual.stats.row_positions
        assert out.stats.row_layer_tokens == dual.stats.row_layer_tokens


def test_unused_rows_of_the_vocabulary_are_never_predicted() -> None:
    model = with_logits(random_model(), lambda x: x.index_fill(-1, torch.arange(30, VOCAB), 50.0))
    model.banned[30:] = True
    out = fastdllm.generate(model, prompts(5), gen_length=16, stop_ids=())
    assert out.sequences[0][5:].max() < 30

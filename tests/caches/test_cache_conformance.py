# SPDX-License-Identifier: Apache-2.0
"""What every cache plan owes, over the files of fastdllm/caches: a new one is tested the day it lands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import fastdllm
from fastdllm import registry, testing
from fastdllm.blocks import Block, Pass, Progress, prompt_aligned
from fastdllm.caches import dual
from fastdllm.testing import check_cache, prompts, random_model

CACHES = registry.names("caches")


@pytest.mark.parametrize("name", CACHES)
def test_passes_stay_in_the_sequence_and_cover_the_block(name: str) -> None:
    testing.check_passes(name)


@pytest.mark.parametrize("name", CACHES)
def test_every_number_of_steps_ends_without_masks(name: str) -> None:
    testing.check_endings(name)


@dataclass(frozen=True)
class Stale(dual.Cache):
    """Never refreshes the prompt: its keys are read before they are computed."""

    def open(self, block: Block) -> Pass | None:
        return None


@dataclass(frozen=True)
class Narrow(dual.Cache):
    def step(self, block: Block, progress: Progress) -> Pass:
        return Pass(block.start, max(block.start + 1, block.stop - 1), block.total)


def test_a_plan_of_ones_own_is_checked_and_told_what_is_wrong() -> None:
    check_cache(dual.Cache)
    check_cache(dual.Cache())
    with pytest.raises(AssertionError, match="never computed"):
        check_cache(Stale)
    with pytest.raises(AssertionError, match="recompute the whole block"):
        check_cache(Narrow)


def outcome(family: str, **options: Any) -> tuple[list[list[int]], list[int], list[int]]:
    out = fastdllm.generate(random_model(family), prompts(6, 17), gen_length=29, **options)
    return [s.tolist() for s in out.sequences], out.stats.row_forwards, out.stats.row_positions


NEUTRAL = [
    ("top_rho", {"ratio": 1}),
    ("top_rho", {"ratio": 0.97}),  # all of 29 positions, by the path that skips some
    ("top_rho", {"refresh": 1}),
    ("top_rho", {"refresh": 1, "suffix": 29}),
    ("lazy", {"refresh_blocks": 1}),
    ("vicinity", {"before": 0, "after": 0}),
    ("suffix_window", {"suffix": 29}),
    ("suffix_window", {"suffix": 29, "keep_last": False}),
]


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("name, options", NEUTRAL)
def test_neutral_options_give_the_dual_cache(name: str, options: dict[str, int], family: str) -> None:
    assert outcome(family, cache=name, **options) == outcome(family, cache="dual")


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("window", [{"suffix": 4}, {"suffix": 4, "keep_last": False, "refresh_blocks": 3}], ids=str)
def test_layers_that_run_for_all_leave_the_window_as_it_is(window: dict[str, Any], family: str) -> None:
    narrow = outcome(family, cache="suffix_window", **window)
    assert (
        outcome(family, cache="top_rho", ratio=1, **window)
        == outcome(family, cache="top_rho", refresh=1, **window)
        == narrow
    )
    some = fastdllm.generate(random_model(family), prompts(6, 17), gen_length=29, decoder="quota", cache="top_rho", **window)
    all_of_them = outcome(family, cache="suffix_window", decoder="quota", **window)
    assert some.stats.row_positions == all_of_them[2], "what is left out are layers, not positions"
    assert all(ran < 2 * positions for ran, positions in zip(some.stats.row_layer_tokens, all_of_them[2], strict=True))


@pytest.mark.parametrize("decoder", ["threshold", "quota"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_vicinity_of_everything_is_no_cache(family: str, decoder: str) -> None:
    """Dream's opening pass forces the first token, unless the rule decides about it like about any other."""
    first = {"first_token": "rule"} if family == "dream" else {}
    everything = outcome(family, cache="vicinity", before=99, after=99, decoder=decoder, **first)
    assert everything == outcome(family, cache="none", decoder=decoder)


@pytest.mark.parametrize("cache", ["dual", "prefix", "lazy"])
def test_without_the_forced_token_dream_needs_no_more_forwards_than_tokens(cache: str) -> None:
    forced = outcome("dream", cache=cache, decoder="quota")
    rule = outcome("dream", cache=cache, decoder="quota", first_token="rule")
    assert rule[0] != forced[0] and max(rule[1]) <= 29


def test_first_token_is_a_choice_of_dream_alone() -> None:
    for family in ("llada", "v2"):
        with pytest.raises(ValueError, match="first_token="):
            outcome(family, first_token="rule")


def test_lazy_refresh_recomputes_less_and_changes_only_later_blocks() -> None:
    lazy, dual = outcome("llada", cache="lazy", refresh_blocks=9), outcome("llada", cache="dual")
    for one, other, prompt in zip(lazy[0], dual[0], (6, 17), strict=True):
        assert one[: prompt + 8] == other[: prompt + 8]
    assert sum(lazy[2]) / sum(lazy[1]) < sum(dual[2]) / sum(dual[1])


def test_a_hidden_suffix_is_not_seen() -> None:
    near, far = outcome("llada", cache="suffix_window", suffix=0), outcome("llada", cache="dual")
    assert near[0] != far[0]


def test_a_dropped_suffix_is_neither_seen_nor_computed() -> None:
    cache = registry.find("caches", "suffix_window")(suffix=4, keep_last=False, refresh_blocks=3)
    blocks = prompt_aligned(8)(6, 6 + 29)
    assert [(cache.open(b).start, cache.open(b).stop) for b in blocks] == [(0, 18), (6, 26), (6, 34), (0, 35)]
    assert [cache.step(b, Progress(0, 0, True)).read for b in blocks] == [18, 26, 34, 35]
    short = outcome("llada", cache="suffix_window", suffix=4, keep_last=False, decoder="quota")
    whole = outcome("llada", cache="dual", decoder="quota")
    assert short[1] == whole[1], "one token a step: the same forwards"
    assert all(near < far for near, far in zip(short[2], whole[2], strict=True))


BAD = [
    ("lazy", "refresh_blocks", 0),
    ("vicinity", "before", -1),
    ("vicinity", "after", -1),
    ("suffix_window", "suffix", -1),
    ("top_rho", "ratio", 0),
    ("top_rho", "ratio", 1.5),
    ("top_rho", "refresh", 0),
    ("top_rho", "suffix", -1),
    ("top_rho", "refresh_blocks", 0),
]


@pytest.mark.parametrize("name, option, value", BAD)
def test_bad_options_are_named(name: str, option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option}="):
        registry.find("caches", name)(**{option: value})

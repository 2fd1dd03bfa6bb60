# SPDX-License-Identifier: Apache-2.0
"""What every decoder owes (`fastdllm.testing`), over the files of fastdllm/decoders: a new one is tested at once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm import registry, testing
from fastdllm.decoders import threshold
from fastdllm.decoders.base import DecoderRule
from fastdllm.testing import FAMILIES, KINDS, WIDTHS, check_decoder, prompts, random_model, rule_of
from fastdllm.view import View

DECODERS = registry.names("decoders")


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_each_step_commits_and_stays_inside(name: str, kind: str, width: int) -> None:
    testing.check_step(name, width, kind)


@pytest.mark.parametrize("name", DECODERS)
def test_rows_do_not_see_each_other(name: str) -> None:
    testing.check_rows_apart(name)


@pytest.mark.parametrize("name", DECODERS)
def test_no_value_is_read_on_the_host(name: str) -> None:
    testing.check_no_host_read(name)


@pytest.mark.each_choice
@pytest.mark.parametrize("name, family", [(n, f) for n in DECODERS for f in FAMILIES if testing.fits(n, f)])
def test_generation_ends_and_rows_are_independent(name: str, family: str) -> None:
    testing.check_generation(name, family)


@pytest.mark.parametrize("name", [n for n in DECODERS if rule_of(n).lossless])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_decoders_give_the_tokens_of_one_token_per_step(name: str, family: str) -> None:
    testing.check_lossless(name, family)


@dataclass(frozen=True)
class Sure(DecoderRule):
    """A rule as a reader of the page writes it; each of the rules below breaks one promise."""

    least: float = 0.8

    def step(self, view: View) -> Tensor:
        return view.commit(view.scores() >= self.least)


class Idle(Sure):
    def step(self, view: View) -> Tensor:
        return view.ids.clone()


class Crossing(Sure):
    def step(self, view: View) -> Tensor:
        scores = view.scores()
        return view.commit(scores >= scores.max() - 0.5)


class Reading(Sure):
    def step(self, view: View) -> Tensor:
        return view.commit(view.scores() >= (0.5 if view.masked.sum().item() > 3 else 0.9))


class Rewriting(Sure):
    def step(self, view: View) -> Tensor:
        return view.top.clone()


def test_a_rule_of_ones_own_is_checked_as_a_class_an_object_and_a_name() -> None:
    check_decoder(Sure, families=("llada",))
    check_decoder(Sure(0.5), families=("llada",))
    registry.register("decoders", Sure)
    try:
        check_decoder("sure", families=("v2",))
    finally:
        registry.unregister("decoders", "sure")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Idle, "gained nothing"),
        (Crossing, "a row by itself gets other tokens"),
        (Reading, "reads a value on the host"),
        (Rewriting, "written that is not open"),
    ],
)
def test_a_rule_that_breaks_a_promise_is_told_which(rule: type[Sure], expected: str) -> None:
    with pytest.raises(AssertionError, match=expected):
        check_decoder(rule, families=("llada",))


def test_lossless_decoders_refuse_what_makes_them_lossy() -> None:
    model = random_model("v2")
    with pytest.raises(ValueError, match="sub_block"):
        fastdllm.generate(model, prompts(4), decoder="draft_verify", cache="sub_block", gen_length=16)
    with pytest.raises(ValueError, match="temperature"):
        fastdllm.generate(model, prompts(4), decoder="draft_verify", temperature=0.5, gen_length=16)
    with pytest.raises(ValueError, match="top_rho"):
        fastdllm.generate(random_model("llada"), prompts(4), decoder="draft_verify", cache="top_rho", gen_length=16)


def test_every_kind_of_confidence_is_a_distribution_of_its_own() -> None:
    views = [testing.view(rule_of("threshold"), 4, 8, kind).conf for kind in KINDS]
    assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


@dataclass(frozen=True, slots=True)
class Slotted(threshold.Decoder):
    """A rule of one's own that keeps a field of its own in a slot."""

    floor: float = 0.05

    def step(self, view: View) -> Tensor:
        return threshold.Decoder(torch.maximum(self.threshold, torch.tensor(self.floor))).step(view)


def test_a_rule_may_keep_its_fields_in_slots() -> None:
    given = prompts(6, 9)
    own, plain = (
        fastdllm.generate(random_model(), given, decoder=rule, gen_length=12, stop_ids=())
        for rule in (Slotted(0.3), threshold.Decoder(0.3))
    )
    assert [s.tolist() for s in own.sequences] == [s.tolist() for s in plain.sequences]

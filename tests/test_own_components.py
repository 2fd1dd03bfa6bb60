# SPDX-License-Identifier: Apache-2.0
"""Decoders, caches and geometries of one's own: as objects, as classes, and registered."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import fastdllm
from fastdllm import DecodeConfig, registry
from fastdllm.blocks import Block, Pass, Progress
from fastdllm.caches import suffix_window, top_rho
from fastdllm.caches.base import CachePlan
from fastdllm.decoders.base import DecoderRule
from fastdllm.decoders.threshold import Decoder as Threshold
from fastdllm.evaluation.options import decode_options, rename, split
from fastdllm.view import View
from tests.random_models import MASK, prompts, random_model


@dataclasses.dataclass(frozen=True)
class Half(DecoderRule):
    """A rule of somebody's own: commit what is likelier than `level`, and the likeliest."""

    level: float = 0.5

    def step(self, view: View) -> torch.Tensor:
        scores, rank = view.scores(), view.ranked()[1]
        return view.commit((rank == 0) | (scores > self.level))


class Everything(CachePlan):
    """A plan of somebody's own, and no dataclass."""

    block_causal = None

    def step(self, block: Block, progress: Progress) -> Pass:
        return Pass(0, block.visible_end, block.visible_end)


def test_a_rule_of_ones_own_is_an_object_a_class_or_a_registered_name() -> None:
    model, given = random_model(), prompts(5, 9)

    def run(**options: Any) -> list[list[int]]:
        out = fastdllm.generate(model, given, gen_length=16, block_length=8, stop_ids=(), **options)
        return [s.tolist() for s in out.sequences]

    expected = run(decoder="threshold", threshold=0.3, strict=True, cache="none")
    assert run(decoder=Half(0.3), cache=Everything()) == expected
    assert run(decoder=Half, level=0.3, cache=Everything) == expected
    with pytest.raises(ValueError, match=r"level=0\.3 belongs into the object: decoder=Half\(level=\.\.\.\)"):
        run(decoder=Half(0.3), level=0.3)
    try:
        assert fastdllm.register("decoders", Half) is Half
        fastdllm.register("cache", Everything, name="whole")
        assert run(decoder="half", level=0.3, cache="whole") == expected
        assert "half" in registry.names("decoders") and "whole" in registry.caches_for(model.spec)
        assert DecodeConfig(**decode_options(split(rename({"decoder": "half", "level": "0.3"}))[1], {})).level == 0.3
        with pytest.raises(ValueError, match=r"level=0.3 is an option of decoder .*half.*, but decoder is 'threshold'"):
            run(level=0.3)
        fastdllm.register("decoders", Half)  # a notebook's cell, run again
    finally:
        registry.unregister("decoders", "half")
        registry.unregister("caches", "whole")
    with pytest.raises(ValueError, match="decoder='half' is unknown"):
        run(decoder="half")


@dataclasses.dataclass(frozen=True, slots=True)
class Own(DecoderRule):
    """A rule with checks of its own, fields of every kind, and no thought of types."""

    least: int
    level: float = 0.5
    ids: tuple[int, ...] = ()
    name: str | None = None
    loose: float = None  # type: ignore[assignment] # a default may be of another type
    pair: tuple[int, str] = (1, "a")
    either: int | str = 0
    weights: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.least < 0 or not 0 <= self.level <= 1:
            raise ValueError("out of range")

    def step(self, view: View) -> torch.Tensor:
        return view.commit(view.ranked()[1] <= self.least)


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (lambda view: None, r"Odd.step must return the block's next ids, \[1, 8\] of torch.int64, not NoneType"),
        (lambda view: view.ids[:, :3], r"must return .*, not \[1, 3\] of torch.int64"),
        (lambda view: view.ids.float(), r"must return .*, not \[1, 8\] of torch.float32"),
        (lambda view: view.commit(view.scores()), r"commit takes which .*, \[1, 8\] of torch.bool, not .* of torch.float32"),
        (lambda view: view.commit(view.masked[:, :1]), r"commit takes which .*, not \[1, 1\] of torch.bool"),
    ],
)
def test_a_rule_of_ones_own_that_returns_something_else_is_told(step: Callable[[View], Any], told: str) -> None:
    class Odd(DecoderRule):
        def step(self, view: View) -> Any:
            return step(view)

    with pytest.raises(ValueError, match=told):
        fastdllm.generate(random_model(), prompts(5), decoder=Odd(), gen_length=16, block_length=8)


@pytest.mark.parametrize(
    ("owner", "given", "told"),
    [
        (top_rho.Cache, {"suffix": 1.5}, "suffix=1.5 must be of type int"),
        (top_rho.Cache, {"refresh": True}, "refresh=True must be of type int"),
        (suffix_window.Cache, {"keep_last": "false"}, "keep_last='false' must be of type bool"),
        (suffix_window.Cache, {"suffix": "8"}, "suffix='8' must be of type int"),
        (suffix_window.Cache, {"suffix": None}, "suffix=None must be of type int"),
        (suffix_window.Cache, {"suffix": torch.tensor([8, 9])}, r"suffix=tensor\(\[8, 9\]\) must be of type int"),
        (Threshold, {"threshold": "0.9"}, "threshold='0.9' must be of type float"),
        (Threshold, {"threshold": torch.full((2, 1), 0.9)}, "threshold=tensor.* must be of type float"),
        (Threshold, {"threshold": float("nan")}, "threshold=nan must be of type float, and finite"),
        (Threshold, {"steps_per_block": True}, "steps_per_block=True must be of type int"),
        (Threshold, {"strict": None}, "strict=None must be of type bool"),
        (Half, {"level": "x"}, "level='x' must be of type float"),
        (Own, {"least": "1"}, "least='1' must be of type int"),
        (Own, {"least": 1, "ids": ("x",)}, "ids=.* must be of type"),
        (Own, {"least": 1, "ids": (1, "2")}, "ids=.* must be of type"),
        (Own, {"least": 1, "name": 3}, "name=3 must be of type str"),
        (Own, {"least": 1, "loose": "x"}, "loose='x' must be of type float"),
    ],
)
def test_an_object_is_made_from_values_of_the_types_that_its_class_declares(
    owner: type, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        owner(**given)
    if len(given) == 1:  # the first field of most, and so positional
        name = next(iter(given))
        if dataclasses.fields(owner)[0].name == name:
            with pytest.raises(ValueError, match=told):
                owner(given[name])
    else:
        with pytest.raises(ValueError, match=told):
            dataclasses.replace(owner(1), **given)


def test_an_object_holds_plain_numbers_whatever_they_were_given_as() -> None:
    window = suffix_window.Cache(suffix=torch.tensor(8), refresh_blocks=np.int64(2))  # type: ignore[arg-type]
    assert (type(window.suffix), window) == (int, suffix_window.Cache(suffix=8, refresh_blocks=2))
    rule = Threshold(torch.tensor(0.5), strict=np.bool_(True))  # type: ignore[arg-type]
    assert (type(rule.threshold), rule) == (float, Threshold(0.5, True))
    assert pickle.loads(pickle.dumps(rule)) == dataclasses.replace(rule) == rule
    own = Own(np.int64(1), 1, [2, 3], either="x", pair=(2, "b"), weights=torch.ones(2))  # type: ignore[arg-type]
    assert (own.least, own.level, own.ids, own.either, own.pair) == (1, 1.0, (2, 3), "x", (2, "b"))
    assert dataclasses.replace(own, least=0).loose is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        Own(1, other=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'least'"):
        Own()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional arguments but"):
        Half(0.5, 1)  # type: ignore[call-arg]
    columns = torch.full((3, 1), 0.7)
    assert rule.of({"threshold": columns}).threshold is columns, "rows' own numbers are not looked at"


def test_a_class_that_makes_its_objects_itself_takes_what_it_likes() -> None:
    @dataclasses.dataclass(init=False)
    class Words(Everything):
        level: float = 0.5

    @dataclasses.dataclass
    class Read(Everything):
        level: float = 0.5

        def __init__(self, level: str = "high") -> None:
            self.level = {"high": 0.9}[level]

    assert Words().level == 0.5 and Read("high").level == 0.9


@pytest.mark.parametrize("weights", [torch.ones, np.ones], ids=["torch", "numpy"])
def test_configs_with_objects_that_hold_tensors_are_compared_by_content(weights: Any) -> None:
    def config(n: int, **more: Any) -> DecodeConfig:
        return DecodeConfig(decoder=Own(1, weights=weights(n)), **more)

    counts = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    quota = [DecodeConfig(decoder=registry.find("decoders", "quota")(counts + n)) for n in (0, 0, 1)]
    for a, b, c in ((config(3), config(3), config(4)), quota):
        assert a == b and hash(a) == hash(b) and a != c and a != DecodeConfig() and DecodeConfig() != a
        assert len({a, b, c}) == 2
        changed = a.replace(decoder=b.decoder, gen_length=8)
        assert changed == b.replace(gen_length=8) and changed.gen_length == 8
        assert a.replace(decoder=c.decoder) == c and a.replace(decoder="threshold") == DecodeConfig(decoder="threshold")
        assert a.replace(preset="fast").replace(decoder=b.decoder).decoder is b.decoder
    with pytest.raises(ValueError, match="are the same option"):
        DecodeConfig(gen_length=weights(2), max_tokens=weights(3))
    assert DecodeConfig(gen_length=8, decoder=Own(1, weights=weights(3))) == config(3, gen_length=8)
    assert config(1) != DecodeConfig(decoder=Own(1, weights=weights((1, 1))))


@pytest.mark.parametrize("kind", [int, str, np.int64, np.uint64, np.asarray, torch.tensor], ids=lambda kind: kind.__name__)
def test_integers_are_exact_whatever_library_they_come_from(kind: Any) -> None:
    assert DecodeConfig(seed=kind(2**53 + 1)).seed == 2**53 + 1
    assert type(DecodeConfig(seed=kind(5)).seed) is int
    for stops in (kind(5), [kind(5)]):
        assert DecodeConfig(stop_ids=stops).stop_ids == (5,)
    assert DecodeConfig(stop_ids=5.0).stop_ids == (5,)  # lm-eval's and a form's 5
    for bad in (np.bool_(True), True, torch.tensor(True), 5.5, object(), {5: 1}, None.__class__):
        with pytest.raises(ValueError, match="stop_ids="):
            DecodeConfig(stop_ids=bad)
    assert DecodeConfig(layer_subset=np.int64(2), reuse_k=2).layer_subset == "2"
    with pytest.raises(ValueError, match="layer_subset=True must be of type str"):
        DecodeConfig(layer_subset=True, reuse_k=2)


def test_a_config_with_objects_is_a_value_too() -> None:
    config = DecodeConfig(decoder=Half(0.3), cache=Everything())
    assert pickle.loads(pickle.dumps(DecodeConfig(decoder=Half(0.3)))) == DecodeConfig(decoder=Half(0.3))
    assert DecodeConfig(**config.given()) == config and hash(DecodeConfig(**config.given())) == hash(config)
    assert config.name_of("decoder") == "Half" and "Half(level=0.3)" in repr(config)
    assert config.replace(decoder="threshold", threshold=0.9).given().keys() == {"decoder", "threshold", "cache"}


@pytest.mark.parametrize(
    ("kind", "component", "options", "message"),
    [
        ("decoders", Everything, {}, "Everything must derive from fastdllm.decoders.base.DecoderRule"),
        ("decoders", Half(0.1), {}, "register takes a class"),
        ("rules", Half, {}, "kind='rules' is unknown; allowed are decoders, caches, runners"),
        ("decoders", Half, {"name": "threshold"}, "name='threshold' is a decoder that ships with fastdllm"),
        ("decoders", Half, {"name": "my rule"}, "name='my rule' must be an identifier"),
        ("decoders", Half, {"name": 5}, "name=5 must be an identifier"),
        ("decoders", Half, {"name": ""}, "name='' must be an identifier"),
    ],
)
def test_what_cannot_be_registered_says_why(kind: str, component: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastdllm.register(kind, component, **options)


def test_a_rule_whose_option_has_the_name_of_another_is_refused() -> None:
    for name in ("seed", "given", "replace"):
        rule = dataclasses.make_dataclass("Rule", [(name, int, 3)], bases=(DecoderRule,), frozen=True)
        with pytest.raises(ValueError, match=f"decoder Rule declares '{name}', a name of DecodeConfig"):
            DecodeConfig(decoder=rule)


@pytest.mark.parametrize("geometry", [lambda: [], lambda prompt, total: 5, lambda prompt, total: [prompt, total], int, str])
def test_what_is_no_geometry_is_named(geometry: Any) -> None:
    with pytest.raises(ValueError, match="geometry="):
        fastdllm.generate(random_model("llada"), prompts(5), gen_length=4, geometry=geometry)


def test_a_geometry_of_ones_own_cuts_the_answer() -> None:
    model, given = random_model(), prompts(5, 9)

    def growing(prompt: int, total: int) -> list[Block]:
        cuts = [prompt, min(prompt + 2, total), min(prompt + 6, total), total]
        return [Block(a, b, a, b, total, i, True, prompt, total) for i, (a, b) in enumerate(pairwise(cuts)) if a < b]

    options = {"gen_length": 12, "decoder": "quota", "stop_ids": ()}
    out = fastdllm.generate(model, given, geometry=growing, block_length=6, trace=True, **options)
    assert all(MASK not in s[len(p) :] and len(s) == len(p) + 12 for s, p in zip(out.sequences, given, strict=True))
    assert {b - a for step in out.trace for a, b in zip(step.starts, step.stops, strict=True)} == {2, 4, 6}
    with pytest.raises(ValueError, match="wider than block_length=4"):
        fastdllm.generate(model, given, geometry=growing, block_length=4, **options)
    with pytest.raises(ValueError, match=r"must cut .* into blocks that follow one another"):
        fastdllm.generate(model, given, geometry=lambda prompt, total: growing(prompt, total)[1:], **options)
    with pytest.raises(ValueError, match="geometry is a choice of families that read both ways"):
        fastdllm.generate(random_model("v2"), given, geometry=growing, **options)

# SPDX-License-Identifier: Apache-2.0
"""Options: coerced by their declared type, and refused with the option, the value and what is allowed."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastdllm
from fastdllm import DecodeConfig, registry
from fastdllm.blocks import Block, Pass, Progress
from fastdllm.build import assemble, resolve
from fastdllm.caches import suffix_window, top_rho
from fastdllm.caches.base import CachePlan
from fastdllm.config import OPTIONS
from fastdllm.decoders.base import DecoderRule
from fastdllm.decoders.threshold import Decoder as Threshold
from fastdllm.evaluation.options import decode_options, rename, split
from fastdllm.fields import coerce
from fastdllm.ui.options import add_decode_options, change, config_of
from fastdllm.view import View
from tests.random_models import FAMILIES, MASK, prompts, random_model


@pytest.mark.parametrize(
    "name, given_value, expected",
    [
        ("gen_length", "256", 256),
        ("gen_length", 256.0, 256),
        ("gen_length", "1e3", 1000),
        ("steps", "None", None),
        ("steps", 8.0, 8),
        ("threshold", "0.9", 0.9),
        ("threshold", 1, 1.0),
        ("top_k", 50.0, 50),
        ("top_k", 0, 0),
        ("top_p", "none", None),
        ("temperature", 0, 0.0),
        ("cache", "none", "none"),
        ("cache", None, None),
        ("strict", "true", True),
        ("strict", "False", False),
        ("strict", 1, True),
        ("strict", 0.0, False),
        ("stop_ids", "1,2", (1, 2)),
        ("stop_ids", [1.0, "2"], (1, 2)),
        ("stop_ids", 5, (5,)),
        ("stop_ids", (), ()),
        ("stop_ids", "()", ()),
        ("stop_ids", "(3,)", (3,)),
        ("stop_ids", "[3, 4]", (3, 4)),
        ("seed", 2**60 + 1, 2**60 + 1),
        ("seed", str(2**60 + 1), 2**60 + 1),
        ("batch_size", "4", 4),
        ("layer_subset", [2, 3], "2+3"),
        ("layer_subset", 2, "2"),
    ],
)
def test_values_are_coerced_by_their_declared_type(name: str, given_value: Any, expected: Any) -> None:
    config = DecodeConfig(**{name: given_value})
    value = getattr(config, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "flag", [True, np.bool_(True), np.array(True), torch.tensor(True)], ids=lambda flag: type(flag).__name__
)
@pytest.mark.parametrize("option", ["gen_length", "top_k", "temperature", "top_p", "stop_ids"])
def test_a_flag_is_no_number_whoever_made_it(option: str, flag: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}=.*must be of type"):
        DecodeConfig(**{option: (flag,) if option == "stop_ids" else flag})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gen_length": 0}, "gen_length=0 must be at least 1"),
        ({"gen_length": 2.5}, "gen_length=2.5 must be of type int"),
        ({"gen_length": True}, "gen_length=True must be of type int"),
        ({"gen_length": "many"}, "gen_length='many' must be of type int"),
        ({"gen_length": float("inf")}, "gen_length=inf must be of type int"),
        ({"gen_length": float("nan")}, "gen_length=nan must be of type int"),
        ({"block_length": 0}, "block_length=0 must be at least 1"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": 3300, "schedule": "cosine"}, "steps=3300 must be at most 100 times gen_length=32"),
        ({"steps": 10**9, "schedule": "timesteps"}, "steps=1000000000 must be at most 100 times"),
        ({"block_length": 257}, "block_length=257 must be at most the model's context of 256"),
        ({"gen_length": 10**9}, "gen_length=1000000000"),
        ({"decoder": "draft_verify", "depth": 10**6}, "depth=1000000 must be at most block_length=8"),
        ({"decoder": "lopa", "branches": 9}, "branches=9 must be at most block_length=8"),
        ({"decoder": "local_leap", "radius": 10**9, "block_length": 16}, "radius=.* must be at most block_length=16"),
        ({"seed": 10**30}, "seed=1000"),
        ({"temperature": "inf"}, "temperature='inf' must be of type float, and finite"),
        ({"temperature": "1e999"}, "temperature='1e999' must be of type float, and finite"),
        ({"temperature": 1e39}, r"temperature=1e\+39 must be of type float, and finite"),
        ({"temperature": 1e-50}, "temperature=1e-50 must be 0 or at least 1e-06"),
        ({"factor": float("inf")}, "factor=inf must be of type float, and finite"),
        ({"cfg_scale": float("inf")}, "cfg_scale=inf must be of type float, and finite"),
        ({"preset": "paper", "cfg_scale": 1}, "cfg_scale=1.0 needs cache='none', not 'prefix', which preset='paper' sets"),
        ({"max_length": 64}, "unknown option max_length=64: gen_length counts the new tokens only"),
        ({"stop": ["x"]}, r"stop=\['x'\] needs a tokenizer"),
        ({"do_sample": True}, "unknown option do_sample=True: temperature=0"),
        *(({"decoder": d, "rule": "x" * 9999}, "rule='x+[.]{3} is unknown") for d in ("adablock", "credit", "psd")),
        ({"decoder": "factor", "factor_rule": "x" * 9999}, "factor_rule='x+[.]{3} is unknown"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 would give the same answer 2 times"),
        ({"attention_mask": torch.ones(40, 40)}, r"attention_mask has rows of \[40, [40, ]*\.\.\. entries"),
        ({"gen_length": 8, "max_new_tokens": 9}, "gen_length=8 and max_new_tokens=9 are the same option"),
        ({"max_new_token": 9}, "did you mean 'max_new_tokens'"),
        ({"decoder": 5}, "decoder=5 must be a name .*threshold.*, or an object or class derived from .*DecoderRule"),
        ({"decoder": dict}, "decoder=<class 'dict'> must be a name"),
        ({"cache": 1j}, "cache=1j must be a name .*dual.*, or an object or class derived from .*CachePlan"),
        ({"geometry": 8}, r"geometry=8 must be a function \(prompt, total\)"),
        ({"threshold": 1.5}, r"threshold=1.5 must lie in \[0, 1\]"),
        ({"threshold": "high"}, "threshold='high' must be of type float"),
        ({"factor": 0}, "factor=0.0 must be above 0"),
        ({"factor_rule": "mine", "factor": 1}, "factor_rule='mine' is unknown; allowed are paper, published"),
        ({"temperature": -1}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"strict": "maybe"}, "strict='maybe' must be of type bool"),
        ({"cache": "duel"}, "cache='duel' is unknown; allowed are .*dual"),
        ({"decoder": "thresh"}, "decoder='thresh' is unknown; allowed are .*threshold"),
        ({"runner": "fast"}, "runner='fast' is unknown; allowed are cuda_graph, eager"),
        ({"schedule": "linear"}, "schedule='linear' is unknown; allowed are even, timesteps, cosine"),
        ({"confidence": "high"}, "confidence='high' is unknown; allowed are probability"),
        ({"confidence": "entropy"}, "confidence='entropy' has no meaning for decoder='threshold'"),
        ({"stopp": ["a"]}, "did you mean 'stop'. stop strings are the argument stop"),
        ({"max_lenght": 64}, "did you mean 'max_length'. gen_length counts the new tokens only"),
        ({"num_retrun_sequences": 2}, "did you mean 'num_return_sequences'. it is an argument of fastdllm.generate"),
        ({"sampling_params": 1}, "its fields are arguments here"),
        ({"gen_lenght": 64}, "unknown option gen_lenght=64; did you mean 'gen_length'"),
        ({"treshold": 0.5}, "unknown option treshold=0.5; did you mean 'threshold'"),
        ({"zzz": 1}, "unknown option zzz=1; allowed are"),
        (
            {"decoder": "quota", "threshold": 0.9},
            "threshold=0.9 is an option of decoder .*threshold.*, but decoder is 'quota'",
        ),
        ({"threshold": 0.9, "depth": 2}, "depth=2 is an option of decoder draft_verify, but decoder is 'threshold'"),
        ({"refresh_blocks": 2}, "refresh_blocks=2 is an option of cache lazy or suffix_window or top_rho, but cache is"),
        ({"cfg_scale": 1.0, "cache": "dual"}, "cfg_scale=1.0 needs cache='none', not 'dual'"),
    ],
    ids=str,
)
def test_bad_options_say_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastdllm.generate(random_model(), prompts(3), **{"gen_length": 32, **options})


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("llada", {"cache": "block"}, "cache='block' does not fit the family 'llada'; allowed are .*dual"),
        ("v2", {"cache": "dual"}, "cache='dual' does not fit the family 'fast_dllm_v2'; allowed are .*block"),
        ("llada", {"decoder": "quota", "steps": 3, "block_length": 4}, "steps=3 must be at least the number of blocks, 8"),
        (
            "llada",
            {"gen_length": 300},
            "prompt 0 has 3 tokens; with gen_length=300 at most 0 fit the model's context of 256",
        ),
        (
            "llada",
            {"gen_length": 254},
            "prompt 0 has 3 tokens; with gen_length=254 at most 2 fit the model's context of 256",
        ),
        ("llada", {"constraints": {32: 5}}, r"constraint at position 32 lies outside the answer, 0\.\.31"),
        ("llada", {"constraints": {0: MASK}}, f"constraint token {MASK} at position 0 is not a token that may be written"),
        ("llada", {"constraints": [{}, {}]}, "constraints has 2 entries for 1 prompts"),
    ],
    ids=str,
)
def test_bad_combinations_say_what_is_allowed(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastdllm.generate(random_model(family), prompts(3), **{"gen_length": 32, **options})


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "prompts is empty"),
        ([torch.tensor([], dtype=torch.long)], "a prompt is empty; at least one token is needed"),
        (torch.zeros(2, 0, dtype=torch.long), "a prompt is empty"),
        ([torch.tensor([1, 40])], r"a prompt has token ids outside 0\.\.39"),
        ([torch.tensor([-1])], r"a prompt has token ids outside 0\.\.39"),
        ("text", "has no tokenizer; pass token ids instead of text"),
        (["text"], "has no tokenizer"),
        ([[{"role": "user", "content": "hi"}]], "has no tokenizer"),
    ],
    ids=str,
)
def test_bad_prompts_say_what_is_wrong(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastdllm.generate(random_model(), prompt, gen_length=8)


def test_every_form_of_prompt_gives_the_same() -> None:
    model, batch = random_model(), torch.stack(prompts(5, 5))
    forms = [batch, list(batch), batch.int(), tuple(batch)]
    runs = [fastdllm.generate(model, form, gen_length=8, block_length=8) for form in forms]
    assert all(str(run.sequences) == str(runs[0].sequences) for run in runs)
    single = fastdllm.generate(model, batch[0], gen_length=8, block_length=8)
    assert torch.equal(single.sequences[0], runs[0].sequences[0])


@pytest.mark.parametrize("decoder", registry.names("decoders"))
def test_a_config_is_a_value(decoder: str) -> None:
    options = {option.name: option.default for option in registry.settable("decoders", decoder).values()}
    given = dict(decoder=decoder, cache="prefix", steps=4, gen_length=64, stop_ids=[3], **options)
    config = DecodeConfig(**given)
    assert all(getattr(config, name) == value for name, value in {**given, "stop_ids": (3,)}.items())
    for same in (DecodeConfig(**config.given()), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert same == config and hash(same) == hash(config) and same.given() == config.given()
    assert config != config.replace(gen_length=65) and config != DecodeConfig()
    assert config.replace(gen_length=32, steps=None) == DecodeConfig(
        decoder=decoder, cache="prefix", gen_length=32, stop_ids=(3,), **options
    )
    assert config.replace(**config.given()) == config == eval(repr(config))


def test_an_attribute_has_the_given_value_or_the_default() -> None:
    config = DecodeConfig(threshold=0.8, max_new_tokens=8)
    assert (config.threshold, config.strict, config.gen_length, config.cache) == (0.8, False, 8, None)
    assert config.given() == {"threshold": 0.8, "gen_length": 8}
    for name in ("factor", "suffix", "treshold", "_nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(config, name)


@pytest.mark.parametrize(
    ("given", "decoder"),
    [
        ({}, "threshold"),
        ({"factor": 1.0}, "factor"),
        ({"threshold": 0.8}, "threshold"),
        ({"steps": 8}, "quota"),
        ({"schedule": "cosine"}, "quota"),
        ({"steps": 8, "threshold": 0.8}, "threshold"),
        ({"steps": 8, "strict": True}, "threshold"),
        ({"steps": 8, "factor": 0.8}, "factor"),
        ({"steps": 8, "decoder": "lopa", "threshold": 0.8}, "lopa"),
        ({"steps": 8, "preset": "balanced"}, "quota"),
        ({"steps": 8, "preset": "balanced", "threshold": 0.8}, "threshold"),
        ({"preset": "exact"}, "draft_verify"),
        ({"preset": "exact", "factor": 0.8}, "factor"),
        ({"preset": "exact", "decoder": "frechet"}, "frechet"),
    ],
)
def test_which_decoder_options_select(given: dict[str, Any], decoder: str) -> None:
    """The same through every door: Python, the chat's flags and /set, lm-eval's arguments, the page."""
    assert DecodeConfig(**given).decoder == decoder
    assert DecodeConfig().replace(**given).decoder == decoder
    assert change(DecodeConfig(), {name.replace("_", "-"): str(value) for name, value in given.items()}).decoder == decoder
    assert DecodeConfig(**decode_options(rename(given), {"cache": "none"})).decoder == decoder
    parser = argparse.ArgumentParser()
    add_decode_options(parser, 64)
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    assert config_of(parser.parse_args(flags)).decoder == decoder
    page = pytest.importorskip("fastdllm.serving.page", reason="the page needs fastdllm[serve]")
    setting = {"name": "custom", **{name: str(value) for name, value in given.items()}}
    assert page.config_of(DecodeConfig(), random_model().spec, setting).decoder == decoder


def test_the_latest_wish_counts_in_a_replaced_config() -> None:
    config = DecodeConfig(decoder="hierarchical", threshold=0.9, low=0.5, cache="lazy", refresh_blocks=2)
    assert config.replace(threshold=0.8).decoder == "hierarchical", "an option of the decoder at hand selects none"
    assert config.replace(decoder="lopa").given() == {
        "decoder": "lopa", "threshold": 0.9, "cache": "lazy", "refresh_blocks": 2
    }  # fmt: skip
    assert config.replace(factor=1).given() == {"factor": 1.0, "cache": "lazy", "refresh_blocks": 2}
    assert config.replace(steps=8).given() == {"steps": 8, "cache": "lazy", "refresh_blocks": 2}
    assert config.replace(steps=8).replace(threshold=0.7).given() == {"threshold": 0.7, "cache": "lazy", "refresh_blocks": 2}
    assert config.replace(cache="dual", decoder=None).given() == {"cache": "dual"}
    assert config.replace(cache=None).given() == {"decoder": "hierarchical", "threshold": 0.9, "low": 0.5}
    assert config.replace(cache="suffix_window").refresh_blocks == 2, "what both have is kept"


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


@pytest.mark.parametrize("family", FAMILIES)
def test_resolving_again_changes_nothing(family: str) -> None:
    spec = random_model(family).spec
    for options in ({}, {"preset": "balanced"}, {"preset": "exact", "block_length": 2}, {"steps": 99}, {"cfg_scale": 1.0}):
        run = resolve(spec, DecodeConfig(gen_length=16, small_block_size=2, **options))
        assert resolve(spec, run) == run and run.preset is None and run.stop_ids == spec.stop_ids
        assert DecodeConfig(**run.given()) == run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.9, "steps": 10}, "steps=10 has no effect: decoder='threshold'"),
        ({"decoder": "threshold", "steps": 10}, "steps=10 has no effect: decoder='threshold'"),
        (
            {"factor": 1.0, "steps": 3, "schedule": "cosine"},
            "steps=3 and schedule='cosine' have no effect: decoder='factor'",
        ),
        ({"preset": "balanced", "threshold": 0.8, "steps": 9}, "steps=9 has no effect: decoder='threshold'"),
        ({"preset": "balanced", "strict": True, "steps": 9}, "steps=9 has no effect: decoder='threshold'"),
        ({"decoder": "lopa", "schedule": "even"}, "schedule='even' has no effect: decoder='lopa'"),
        ({"decoder": Threshold(0.5), "steps": 8}, "steps=8 has no effect: decoder='Decoder'"),
        ({"steps": 8}, None),
        ({"preset": "balanced", "steps": 8}, None),
        ({"threshold": 0.9}, None),
    ],
)
def test_steps_that_have_no_effect_are_told(options: dict[str, Any], message: str | None) -> None:
    """Published commands give steps beside a threshold, so they are no error; every run begins with `assemble`."""
    model, base = random_model("llada"), {"gen_length": 8, "block_length": 4}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assemble(model, DecodeConfig(**base, **options))
    told = [str(warning.message) for warning in caught]
    assert len(told) == bool(message), told
    assert all(text.startswith(message or "") for text in told)
    without = {name: value for name, value in options.items() if name not in ("steps", "schedule")}
    if message:
        first, second = (fastdllm.generate(model, torch.tensor([3, 4]), **base, **some) for some in (options, without))
        assert first.sequences[0].tolist() == second.sequences[0].tolist()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("v2", {"trim_ratio": 0.25}, "trim_ratio=0.25: no effect without reuse_k above 1"),
        ("v2", {"layer_subset": "first"}, "layer_subset='first': no effect without reuse_k above 1"),
        ("v2", {"layer_subset": "first", "trim_drift": 0.1}, "layer_subset='first' and trim_drift=0.1: no effect"),
        ("v2", {"reuse_k": 2, "layer_subset": "first", "trim_ratio": 0.5}, None),
        ("v2", {"small_block_size": 2}, None),
        ("llada", {"small_block_size": 2}, "small_block_size=2 has no effect: 'llada' decodes whole blocks"),
        ("dream", {"small_block_size": 4}, "small_block_size=4 has no effect: 'dream' decodes whole blocks"),
        ("llada", {}, None),
    ],
)
def test_options_that_others_lack_to_have_an_effect_are_told(
    family: str, options: dict[str, Any], message: str | None
) -> None:
    config = DecodeConfig(gen_length=16, block_length=8, **options)
    model = random_model(family)
    for asked in (config, resolve(model.spec, config)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assemble(model, asked)
        told = [str(warning.message) for warning in caught]
        assert len(told) == bool(message) and all(text.startswith(message or "") for text in told), told


def test_more_steps_than_tokens_are_one_token_a_step() -> None:
    """A number of steps that suits one task must not end a run at another, whose answers are short."""
    model, given = random_model(), prompts(5)
    runs = [fastdllm.generate(model, given, gen_length=8, decoder="quota", steps=s) for s in (None, 8, 9, 256, 10**9)]
    assert len({str(run.sequences) + str(run.stats.row_forwards) for run in runs}) == 1


def test_every_option_is_documented_in_one_line() -> None:
    text = DecodeConfig.__doc__
    for option in OPTIONS.values():
        lines = [line for line in text.splitlines() if line.strip().startswith(f"{option.name}  ")]
        assert len(lines) == 1 and option.doc.rstrip(".") in lines[0] and len(lines[0]) <= 125


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecodeConfig().gen_length = 3


@given(
    st.one_of(st.text(max_size=5), st.floats(), st.integers(), st.booleans(), st.lists(st.integers(), max_size=2), st.none())
)
def test_coercion_gives_the_type_or_a_value_error(value: Any) -> None:
    for kind in (int, float, bool, str, tuple[int, ...]):
        try:
            out = coerce("option", value, kind)
        except ValueError as error:
            assert "option=" in str(error)
        else:
            assert isinstance(out, tuple if kind == tuple[int, ...] else kind)


def test_names_are_the_files_of_the_folders() -> None:
    core = Path(fastdllm.__file__).parent
    for kind in ("decoders", "caches", "runners"):
        assert set(registry.names(kind)) == {p.stem for p in (core / kind).glob("*.py")} - {"__init__", "base"}
        for name in registry.names(kind):
            registry.find(kind, name)
    assert {"none", "prefix", "dual", "block", "sub_block"} <= set(registry.names("caches"))
    assert {"quota", "threshold", "factor"} <= set(registry.names("decoders"))
    assert "counts" not in registry.options("decoders", "quota"), "what build.py fills in is no option"


def test_sub_blocks_are_cut_to_the_length_of_blocks_and_refused_beyond_it() -> None:
    spec = random_model("v2").spec
    assert resolve(spec, DecodeConfig(block_length=4)).small_block_size == 4
    assert resolve(spec, DecodeConfig(block_length=8)).small_block_size == 8
    with pytest.raises(ValueError, match="small_block_size=8 must be at most block_length=4"):
        resolve(spec, DecodeConfig(block_length=4, small_block_size=8))

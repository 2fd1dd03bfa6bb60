# SPDX-License-Identifier: Apache-2.0
"""Options: coerced by their declared type, and refused with the option, the value and what is allowed."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastdllm
from fastdllm import DecodeConfig, registry
from fastdllm.build import assemble, resolve
from fastdllm.config import OPTIONS
from fastdllm.decoders.threshold import Decoder as Threshold
from fastdllm.evaluation.options import decode_options, rename
from fastdllm.fields import coerce
from fastdllm.ui.options import add_decode_options, change, config_of
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

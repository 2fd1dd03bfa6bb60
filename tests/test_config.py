# SPDX-License-Identifier: Apache-2.0
"""Options: coerced by their declared type, and refused with the option, the value and what is allowed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastdllm
from fastdllm import DecodeConfig, registry
from fastdllm.config import coerce
from tests.random_models import MASK, prompts, random_model


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
        ("batch_size", "4", 4),
        ("layer_subset", [2, 3], "2+3"),
        ("layer_subset", 2, "2"),
    ],
)
def test_values_are_coerced_by_their_declared_type(name: str, given_value: Any, expected: Any) -> None:
    config = DecodeConfig(**{name: given_value})
    value = config.options[name] if name in config.options else getattr(config, name)
    assert value == expected
    assert type(value) is type(expected)


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
        ({"decoder": "quota", "steps": 300}, "steps=300 must be at most gen_length=32"),
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
        ({"gen_lenght": 64}, "unknown option gen_lenght=64; did you mean 'gen_length'"),
        ({"treshold": 0.5}, "unknown option treshold=0.5; did you mean 'threshold'"),
        ({"zzz": 1}, "unknown option zzz=1; allowed are"),
        (
            {"decoder": "quota", "threshold": 0.9},
            "threshold=0.9 is an option of decoder .*threshold.*, but decoder is 'quota'",
        ),
        ({"refresh_blocks": 2}, "refresh_blocks=2 is an option of cache lazy or suffix_window, but cache is"),
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
        ("v2", {"cache": "dual"}, "cache='dual' does not fit the family 'v2'; allowed are .*block"),
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
def test_given_rebuilds_the_config(decoder: str) -> None:
    options = {n: getattr(registry.find("decoders", decoder), n) for n in registry.options("decoders", decoder)}
    config = DecodeConfig(decoder=decoder, cache="prefix", steps=4, gen_length=64, stop_ids=(3,), **options)
    assert DecodeConfig(**config.given()) == config
    assert config.replace(gen_length=32, steps=None) == DecodeConfig(
        decoder=decoder, cache="prefix", gen_length=32, stop_ids=(3,), **options
    )


def test_an_option_named_like_a_decoder_selects_it() -> None:
    assert DecodeConfig(factor=1.0).decoder == "factor"
    assert DecodeConfig(threshold=0.8).decoder == "threshold"
    assert DecodeConfig().decoder == "threshold"


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

# SPDX-License-Identifier: Apache-2.0
"""Published option names: what they mean here, and what happens to those that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from fastdllm.build import resolve
from fastdllm.config import DecodeConfig
from fastdllm.evaluation.options import HarnessOptions, check_names, decode_options, latest, parse_arguments, rename, split
from tests.random_models import random_model

LLADA = {"decoder": "quota", "confidence": "probability", "cache": "none"}
DREAM = {"decoder": "quota", "confidence": "entropy", "cache": "none"}
V2 = {"cache": "block"}


def configure(given: dict[str, Any], defaults: dict[str, Any]) -> DecodeConfig:
    return DecodeConfig(**decode_options(split(rename(given))[1], defaults))


@pytest.mark.parametrize(
    ("given", "defaults", "expected"),
    [
        ({}, LLADA, {"decoder": "quota", "cache": "none", "confidence": "probability"}),
        (
            {"gen_length": "256", "steps": 256.0, "block_length": 32},
            LLADA,
            {"gen_length": 256, "steps": 256, "block_length": 32},
        ),
        ({"use_cache": "True", "threshold": 0.9}, LLADA, {"cache": "prefix", "decoder": "threshold", "threshold": 0.9}),
        ({"use_cache": True, "dual_cache": True, "factor": 1}, LLADA, {"cache": "dual", "decoder": "factor", "factor": 1.0}),
        ({"use_cache": False, "dual_cache": False}, LLADA, {"cache": "none"}),
        ({"cache": "dual", "cfg": "0"}, LLADA, {"cache": "dual", "cfg_scale": 0.0}),
        ({"remasking": "random"}, LLADA, {"decoder": "quota", "confidence": "random"}),
        ({"remasking": "low_confidence", "threshold": 0.8}, LLADA, {"decoder": "threshold", "confidence": "probability"}),
        ({"threshold": None}, LLADA, {"decoder": "quota"}),
        ({"max_new_tokens": 64, "diffusion_steps": 16}, DREAM, {"gen_length": 64, "steps": 16, "confidence": "entropy"}),
        ({"alg": "topk_margin"}, DREAM, {"decoder": "quota", "confidence": "margin"}),
        ({"alg": "maskgit_plus"}, DREAM, {"decoder": "quota", "confidence": "probability"}),
        ({"alg": "origin"}, DREAM, {"decoder": "quota", "confidence": "random"}),
        ({"decoder": "quota"}, DREAM, {"decoder": "quota", "confidence": "entropy"}),
        ({"alg": "confidence_threshold"}, DREAM, {"decoder": "threshold", "confidence": "probability"}),
        ({"threshold": 0.7}, DREAM, {"decoder": "threshold", "threshold": 0.7, "confidence": "probability"}),
        ({}, V2, {"cache": "block", "decoder": "threshold"}),
        ({"bd_size": 16, "small_block_size": 4}, V2, {"block_length": 16, "small_block_size": 4}),
        ({"use_block_cache": "true", "threshold": 1}, V2, {"cache": "sub_block", "threshold": 1.0}),
        ({"use_block_cache": False}, V2, {"cache": "block"}),
        ({"factor": 0.5}, V2, {"decoder": "factor", "factor": 0.5}),
        ({"steps": 8}, V2, {"decoder": "quota", "steps": 8}),
        ({"steps": 256, "gen_length": 32, "threshold": 0.9}, LLADA, {"decoder": "threshold", "threshold": 0.9}),
        ({"steps": 99, "gen_length": 8}, LLADA, {"decoder": "quota", "steps": 99}),
    ],
)
def test_published_names_mean_what_they_meant(given: dict, defaults: dict, expected: dict) -> None:
    config = configure(given, defaults)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "defaults", "family", "expected"),
    [
        ({"preset": "exact"}, DREAM, "dream", {"decoder": "draft_verify", "cache": "dual", "confidence": "probability"}),
        (
            {"preset": "paper", "decoder": "quota"},
            DREAM,
            "dream",
            {"decoder": "quota", "cache": "prefix", "confidence": "entropy"},
        ),
        ({"preset": "paper", "steps": 8}, LLADA, "llada", {"decoder": "quota", "cache": "prefix", "steps": 8}),
        ({"preset": "balanced"}, V2, "v2", {"decoder": "threshold", "cache": "fused"}),
        ({"preset": "fast"}, V2, "v2", {"decoder": "threshold", "threshold": 0.95, "cache": "fused"}),
        ({"preset": "fast", "cache": "sub_block"}, V2, "v2", {"decoder": "threshold", "cache": "sub_block"}),
        ({"preset": "exact"}, V2, "v2", {"decoder": "draft_verify", "cache": "block"}),
    ],
)
def test_published_defaults_lie_beneath_a_preset(given: dict, defaults: dict, family: str, expected: dict) -> None:
    config = resolve(random_model(family).spec, configure(given, defaults).replace(gen_length=16))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"treshold": 0.9}, "unknown option treshold=0.9; did you mean 'threshold'?"),
        ({"gen_lenght": 8}, "unknown option gen_lenght=8; did you mean 'gen_length'?"),
        ({"gen_length": 8, "max_new_tokens": 9}, "gen_length=8 and max_new_tokens=9 are the same option"),
        ({"gen_length": 0}, "gen_length=0 must be at least 1"),
        ({"gen_length": 2.5}, "gen_length=2.5 must be of type int"),
        ({"use_cache": "maybe"}, "use_cache='maybe' must be of type bool"),
        ({"show_speed": "fast"}, "show_speed='fast' must be of type bool"),
        ({"dual_cache": True, "use_cache": False}, "dual_cache=True contradicts use_cache=False"),
        ({"use_cache": True, "cache": "dual"}, "cache='dual' and use_cache"),
        ({"use_cache": True, "use_block_cache": True}, "give one kind"),
        ({"cache": "fast"}, "cache='fast' is unknown; allowed are"),
        ({"decoder": "fast"}, "decoder='fast' is unknown; allowed are"),
        ({"alg": "nonsense"}, "alg='nonsense' is unknown; allowed are entropy, .*confidence_threshold"),
        ({"remasking": "high"}, "remasking='high' is unknown; allowed are low_confidence, random"),
        ({"alg": "entropy", "confidence": "margin"}, "alg='entropy' is confidence='entropy', not 'margin'"),
        (
            {"alg": "confidence_threshold", "decoder": "factor"},
            "alg='confidence_threshold' is decoder='threshold', not 'factor'",
        ),
        ({"alg": "entropy", "decoder": "factor"}, "leave alg out"),
        ({"alg": "entropy", "threshold": 0.9}, "threshold=0.9 is an option of decoder .*threshold.*, but decoder is .quota"),
        ({"remasking": "random", "threshold": 0.9}, "confidence='random' has no meaning for decoder='threshold'"),
        ({"cfg": 1.0, "cache": "dual"}, "cfg_scale=1.0 needs cache='none'"),
    ],
)
def test_a_bad_option_is_named_with_what_is_allowed(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(given, LLADA)


def test_own_options_are_coerced_by_their_type() -> None:
    given = {
        "model_path": 2026,
        "dtype": "float32",
        "mc_num": "16",
        "is_check_greedy": "False",
        "escape_until": 1,
        "top_k": 3,
    }
    own, rest = split(rename(given))
    assert own == {"pretrained": "2026", "dtype": "float32", "mc_num": 16, "is_check_greedy": False, "escape_until": True}
    assert rest == {"top_k": 3}
    assert HarnessOptions(**own).show_speed is False


TEXT_OPTIONS = ["dtype", "revision", "quantize", "adapter", "save_dir", "likelihood", "preset", "decoder", "confidence"]
TEXT_OPTIONS += ["runner", "schedule", "layer_subset", "alg", "remasking", "first_token"]
OTHERS = ["threshold", "steps", "use_cache", "show_speed", "mc_num", "stop_ids", "top_p"]


@pytest.mark.parametrize("name", [*TEXT_OPTIONS, *OTHERS])
@pytest.mark.parametrize("text", ["none", "None", "NONE"])
def test_none_leaves_an_option_open_whichever_way_it_comes(name: str, text: str) -> None:
    """In Python lm-eval makes None of the text, on its command line it leaves it; the cache alone has that name."""
    ways = [{name: None}, {name: text}, parse_arguments(f"{name}={text}"), parse_arguments(f" {name}={text},")]
    assert [rename(way) for way in ways] == [latest(way) for way in ways] == [{}] * len(ways)
    assert rename(parse_arguments("cache=none")) == {"cache": "none"} and rename({"cache": None}) == {}


@pytest.mark.parametrize("defaults", [LLADA, DREAM, V2], ids=["llada", "dream", "v2"])
@pytest.mark.parametrize(
    ("name", "value", "spellings"),
    [
        ("threshold", 0.9, ["0.9", ".9", "9e-1", "'0.9'", '"0.9"', " 0.9"]),
        ("steps", 64, ["64", "64.0", "6.4e1", "'64'", "+64"]),
        ("temperature", 0.001, ["1e-3", "0.001", "1E-3"]),
        ("use_block_cache", True, ["true", "True", "TRUE", "1", "1.0", "yes", "'true'"]),
        ("cache", "none", ["none", "None", "'none'", '"none"']),
        ("stop_ids", (7,), ["7", "(7)", "[7]"]),
        ("layer_subset", "2+3", ["2+3", "'2+3'"]),
    ],
)
def test_every_spelling_decodes_as_its_value_does(defaults: dict, name: str, value: object, spellings: list[str]) -> None:
    if name == "use_block_cache" and defaults is not V2:
        pytest.skip("Fast-dLLM v2's")
    for text in spellings:
        given = split(rename(parse_arguments(f"{name}={text}")))[1]
        assert DecodeConfig(**decode_options(given, defaults)) == configure({name: value}, defaults), text


@pytest.mark.parametrize(
    "text", ["gen_length=8,gen_length=9", "gen_length=8,threshold=0.9,gen_length=8.5", "cache=none,cache=dual"]
)
def test_one_name_twice_is_an_error_unless_both_agree(text: str) -> None:
    with pytest.raises(ValueError, match=r"(gen_length|cache)=\S+ and \1=.*give one of them"):
        parse_arguments(text)
    assert parse_arguments("gen_length=8,gen_length=8") == {"gen_length": 8}


@pytest.mark.parametrize("value", [None, "none", 3])
def test_a_name_that_is_unknown_is_an_error_whatever_its_value(value: object) -> None:
    for name, near in (("cahce", "cache"), ("treshold", "threshold"), ("show_sped", "show_speed")):
        with pytest.raises(ValueError, match=f"unknown option {name}=.*did you mean '{near}'"):
            check_names({name: value, "threshold": 0.9, "model_path": "tiny-llada"})


@pytest.mark.parametrize("given", [["a", "b"], 5, True, [["pretrained", "x"]]])
def test_arguments_of_another_type_are_named(given: Any) -> None:
    """A YAML file may hold anything."""
    with pytest.raises(ValueError, match=r"gen_kwargs=.* must be a text, name=value,name=value, or a table"):
        parse_arguments(given, "gen_kwargs")

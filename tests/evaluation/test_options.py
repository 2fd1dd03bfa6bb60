# SPDX-License-Identifier: Apache-2.0
"""Published option names: what they mean here, and what happens to those that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from fastdllm.config import DecodeConfig
from fastdllm.evaluation.options import HarnessOptions, decode_options, rename, split

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
        ({"preset": "exact"}, DREAM, {"decoder": "draft_verify", "cache": "dual", "confidence": "probability"}),
        ({"preset": "paper", "decoder": "quota"}, DREAM, {"decoder": "quota", "cache": "prefix", "confidence": "entropy"}),
        ({"preset": "paper", "steps": 8}, LLADA, {"decoder": "quota", "cache": "prefix", "steps": 8}),
    ],
)
def test_published_names_mean_what_they_meant(given: dict, defaults: dict, expected: dict) -> None:
    config = configure(given, defaults)
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
    given = {"model_path": 2026, "dtype": "none", "mc_num": "16", "is_check_greedy": "False", "escape_until": 1, "top_k": 3}
    own, rest = split(rename(given))
    assert own == {"pretrained": "2026", "dtype": "none", "mc_num": 16, "is_check_greedy": False, "escape_until": True}
    assert rest == {"top_k": 3}
    assert HarnessOptions(**own).show_speed is False

# SPDX-License-Identifier: Apache-2.0
"""Presets: usable by name, for every family, and overridden by what is given beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import registry
from fastdllm.build import assemble, resolve
from fastdllm.decoding import Decoding
from fastdllm.evaluation.options import decode_options
from fastdllm.models import FAMILIES as MODELS
from fastdllm.models import Model
from fastdllm.presets import OWN, PRESETS
from fastdllm.prompts import Prompts
from fastdllm.tasks import TASKS_DIR
from fastdllm.ui.options import change
from tests.published_checkpoints import write_checkpoint
from tests.random_models import FAMILIES, MASK, prompts, random_model


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_every_preset(preset: str, family: str) -> None:
    given = prompts(5, 12)
    out = fastdllm.generate(random_model(family), given, preset=preset, gen_length=16, stop_ids=())
    for sequence, prompt in zip(out.sequences, given, strict=True):
        assert len(sequence) == len(prompt) + 16 and MASK not in sequence[len(prompt) :]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", sorted(set(MODELS.values())))
def test_every_family_that_a_checkpoint_may_be_takes_every_preset(
    preset: str, family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And what is resolved names no preset, and stays as it is."""
    model = checkpoint(family, tmp_path_factory)
    given = [torch.arange(300, 300 + n) for n in (5, 9)]
    out = fastdllm.generate(model, given, preset=preset, gen_length=16, stop_ids=())
    for sequence, prompt in zip(out.sequences, given, strict=True):
        assert len(sequence) == len(prompt) + 16 and model.spec.mask_id not in sequence[len(prompt) :]
    run = resolve(model.spec, fastdllm.DecodeConfig(preset=preset, gen_length=16))
    assert run.preset is None and resolve(model.spec, run) == run


LOADED: dict[str, Model] = {}
KINDS = {"fast_dllm_v2": "v2", "a2d": "a2d-qwen3"}  # how the test checkpoints call them


def checkpoint(family: str, folders: pytest.TempPathFactory) -> Model:
    """A small random checkpoint of the family, written and loaded once."""
    if family not in LOADED:
        folder = folders.mktemp(family)
        write_checkpoint(folder, KINDS.get(family, family))
        LOADED[family] = fastdllm.load(str(folder), device="cpu")
    return LOADED[family]


def test_families_with_options_of_their_own_exist_and_so_do_the_presets() -> None:
    assert set(OWN) <= set(MODELS.values())
    assert {preset for own in OWN.values() for preset in own} <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_v2_keeps_its_own_blocks(preset: str) -> None:
    model = random_model("v2")
    built = assemble(model, fastdllm.DecodeConfig(preset=preset, gen_length=16))
    assert built.block_causal == 8 and fits(model, built)
    assert assemble(model, fastdllm.DecodeConfig(preset=preset, gen_length=16, block_length=16)).block_causal == 16


def fits(model: Model, built: Decoding) -> bool:
    return registry.fits(built.cache, model.spec)


def test_a_preset_is_a_name_until_the_model_is_known() -> None:
    """What all families make of it is known before; the rest is None, and each family's own once there is a model."""
    config = fastdllm.DecodeConfig(preset="balanced", gen_length=16)
    assert config.threshold is None and config.cache is None and config.given() == {"preset": "balanced", "gen_length": 16}
    assert config.decoder == "threshold", "the rule of each family"
    llada, v2 = (resolve(random_model(family).spec, config) for family in ("llada", "v2"))
    assert (llada.decoder, llada.threshold, llada.cache) == ("threshold", 0.97, "suffix_window")
    assert (v2.threshold, v2.cache, v2.small_block_size) == (0.99, "fused", 8), "32, cut to the block's 8"


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        ("balanced", {"threshold": 0.8}, {"decoder": "threshold", "threshold": 0.8, "cache": "fused"}),
        ("balanced", {"small_block_size": 4}, {"decoder": "threshold", "cache": "fused", "small_block_size": 4}),
        ("balanced", {"block_length": 48}, {"cache": "fused", "block_length": 48, "small_block_size": 16}),
        ("balanced", {"decoder": "quota"}, {"decoder": "quota", "cache": "fused"}),
        ("fast", {"cache": "block"}, {"decoder": "threshold", "threshold": 0.95, "cache": "block"}),
        ("fast", {"threshold": 0.8}, {"threshold": 0.8, "cache": "fused"}),
    ],
)
def test_what_is_given_overrides_v2s_own_preset(preset: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = replace(random_model("v2").spec, max_length=96)
    for config in (
        fastdllm.DecodeConfig(preset=preset, gen_length=16, **given),
        fastdllm.DecodeConfig(gen_length=16).replace(preset=preset, **given),
        fastdllm.DecodeConfig(preset=preset, gen_length=16).replace(**given),
    ):
        run = resolve(spec, config)
        assert {name: getattr(run, name) for name in expected} == expected


def test_what_a_preset_leaves_behind_goes_with_it() -> None:
    """An option of the cache that one family takes is left out when another cache is chosen."""
    config = fastdllm.DecodeConfig(preset="balanced", suffix=16)
    assert config.replace(cache="dual") == fastdllm.DecodeConfig(preset="balanced", cache="dual")
    assert resolve(random_model("llada").spec, config.replace(gen_length=16)).suffix == 16
    with pytest.raises(ValueError, match="suffix=16 is an option of cache suffix_window or top_rho, but cache is 'fused'"):
        resolve(random_model("v2").spec, config.replace(gen_length=16))


def test_an_option_of_no_family_is_refused_before_the_model_is_known() -> None:
    for options, message in (
        ({"depth": 3}, "depth=3 is an option of decoder draft_verify, but decoder is 'threshold'"),
        ({"cache": "dual", "suffix": 16}, "suffix=16 is an option of cache suffix_window or top_rho, but cache is 'dual'"),
        ({"treshold": 0.9}, "did you mean 'threshold'"),
        ({"threshold": 2}, "threshold=2.0 must lie in"),
        ({"small_block_size": 0}, "small_block_size=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fastdllm.DecodeConfig(preset="balanced", **options)


def test_guidance_is_refused_where_a_family_takes_a_presets_cache() -> None:
    config = fastdllm.DecodeConfig(preset="paper", cfg_scale=1, gen_length=16)
    with pytest.raises(ValueError, match=r"cfg_scale=1\.0 needs cache='none', not 'prefix', which preset='paper' sets"):
        resolve(random_model("llada").spec, config)
    assert resolve(random_model("v2").spec, config).cache == "none"


def test_the_first_token_of_a_preset_is_dreams_alone() -> None:
    for family, lead in (("llada", 0), ("dream", 1), ("v2", 0)):
        assert assemble(random_model(family), fastdllm.DecodeConfig(preset="balanced", gen_length=16)).lookback == lead
    forced = fastdllm.DecodeConfig(preset="balanced", first_token="forced", gen_length=16)
    assert assemble(random_model("dream"), forced).lookback == 0
    with pytest.raises(ValueError, match="first_token='rule'"):
        assemble(random_model("llada"), fastdllm.DecodeConfig(preset="paper", first_token="rule", gen_length=16))


def test_what_is_given_overrides_the_preset() -> None:
    config = fastdllm.DecodeConfig(preset="paper", cache="dual", threshold=0.8)
    assert (config.decoder, config.cache, config.threshold) == ("threshold", "dual", 0.8)
    for preset in PRESETS:
        config = fastdllm.DecodeConfig(preset=preset, decoder="factor", cache="vicinity")
        assert (config.decoder, config.cache, config.factor, config.before) == ("factor", "vicinity", 1.0, 16)
    other = fastdllm.DecodeConfig(preset="balanced", decoder="hierarchical")
    assert other.threshold == 0.8, "the preset's threshold is meant for its own decoder"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("preset", "name"), [(p, name) for p, options in PRESETS.items() for name in options])
def test_a_value_that_equals_the_presets_is_honoured(preset: str, name: str, family: str) -> None:
    """It is what the user gave, and not a part of the preset that a family may leave out."""
    spec, value = replace(random_model(family).spec, max_length=512), PRESETS[preset][name]
    config = fastdllm.DecodeConfig(preset=preset, **{name: value})
    try:
        run = resolve(spec, config)
    except ValueError as error:
        assert f"{name}=" in str(error), "what cannot be honoured is refused by name"
    else:
        assert getattr(run, name) == value


def test_the_block_length_of_a_preset_can_be_given_to_v2() -> None:
    given = prompts(5)
    options = {"gen_length": 40, "stop_ids": (), "preset": "balanced"}
    wide, plain = (fastdllm.generate(random_model("v2"), given, **options, **o) for o in ({"block_length": 64}, {}))
    own = {**options, "preset": None, "threshold": 0.99, "cache": "fused", "small_block_size": 32}
    same = fastdllm.generate(random_model("v2"), given, block_length=64, **own)
    assert wide.sequences[0].tolist() == same.sequences[0].tolist()
    assert wide.sequences[0].tolist() != plain.sequences[0].tolist()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_harness_and_the_chat_take_presets(preset: str) -> None:
    """The published defaults of an evaluation (one token a step, no cache) lie beneath the preset."""
    defaults = {"decoder": "quota", "confidence": "entropy", "cache": "none", "gen_length": 64}
    want = fastdllm.DecodeConfig(preset=preset, gen_length=64)
    assert fastdllm.DecodeConfig(**decode_options({"preset": preset}, defaults)) == want
    assert change(fastdllm.DecodeConfig(factor=1.5, cache="prefix", gen_length=64), {"preset": preset}) == want


def test_a_preset_replaces_what_it_sets_in_a_config() -> None:
    config = fastdllm.DecodeConfig(factor=1.5, cache="vicinity", before=3, block_length=16, gen_length=64)
    exact = config.replace(preset="exact")
    assert exact == fastdllm.DecodeConfig(preset="exact", block_length=16, gen_length=64)
    assert exact.replace(gen_length=32).decoder == "draft_verify"
    assert config.replace(preset="fast") == fastdllm.DecodeConfig(preset="fast", gen_length=64)
    assert resolve(random_model().spec, fastdllm.DecodeConfig(threshold=0.8).replace(preset="fast")).threshold == 0.9


def test_a_preset_fits_a_short_context() -> None:
    spec = replace(random_model("llada").spec, max_length=40)
    assert resolve(spec, fastdllm.DecodeConfig(preset="balanced", gen_length=16)).block_length == 40
    with pytest.raises(ValueError, match="block_length=64 must be at most the model's context of 40"):
        resolve(spec, fastdllm.DecodeConfig(preset="balanced", block_length=64, gen_length=16))


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"preset='quick'.*{', '.join(PRESETS)}"):
        fastdllm.DecodeConfig(preset="quick")


def assert_lossless(model: Model, given: Prompts, **options: Any) -> None:
    """`exact` against one token per step under the same cache: the same tokens, and with branches in fewer forwards."""
    one = fastdllm.generate(model, given, decoder="quota", **options)
    for more in ({"depth": 4}, {}):
        exact = fastdllm.generate(model, given, preset="exact", **options, **more)
        assert [s.tolist() for s in exact.sequences] == [s.tolist() for s in one.sequences]
        assert sum(exact.stats.row_forwards) <= sum(one.stats.row_forwards)
        assert not more or sum(exact.stats.row_forwards) < sum(one.stats.row_forwards)


def questions(count: int, task: str = "gsm_symbolic") -> list[list[dict[str, str]]]:
    lines = (TASKS_DIR / task / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_gives_the_tokens_of_one_token_per_step(family: str) -> None:
    """100 prompts for each of the three conventions, their confidences spread over all of (0, 1)."""
    for seed in range(4):
        given = prompts(*(4 + (7 * i + seed) % 13 for i in range(25)))
        assert_lossless(random_model(family, seed), given, gen_length=16, block_length=8)


@pytest.mark.parametrize(
    "name, task, count, options",
    [
        ("tiny-sudoku", "mini_sudoku", 100, {"gen_length": 20, "block_length": 20, "cache": "none"}),
        ("tiny-llada", "gsm_symbolic", 6, {"gen_length": 32, "block_length": 16}),
    ],
)
def test_exact_is_lossless_on_trained_models(name: str, task: str, count: int, options: dict[str, Any]) -> None:
    """Trained confidences crowd near 1, where rounding could change an order. Whole puzzles, the start of some answers."""
    model = fastdllm.load(name, device="cpu", dtype="float32")
    assert_lossless(model, questions(count, task), batch_size=50, **options)


@pytest.mark.gpu
def test_exact_is_lossless_on_whole_answers() -> None:
    model = fastdllm.load("tiny-llada", device="cuda", dtype="float32")
    assert_lossless(model, questions(300), gen_length=256, block_length=32, batch_size=100, runner="eager")

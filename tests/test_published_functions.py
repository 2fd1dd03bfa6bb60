# SPDX-License-Identifier: Apache-2.0
"""The functions users of the published code know give the published tokens, with the same forwards or fewer.

`tests/reference` holds the published loops, written out plainly over a network of their own.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dream.generate as dream
import fastdllm
import llada.generate as llada
import v2.generation_functions as v2
from fastdllm import schedules
from fastdllm.models import Model
from tests.random_models import MASK, STOP, random_model
from tests.reference import dream as dream_reference
from tests.reference import llada as llada_reference
from tests.reference import v2 as v2_reference
from tests.reference.network import PlainNetwork
from tests.scripted_model import with_logits

LLADA = {"none": llada.generate, "prefix": llada.generate_with_prefix_cache, "dual": llada.generate_with_dual_cache}
V2 = {"none": v2.generate, "prefix": v2.generate_with_prefix_cache, "dual": v2.generate_with_dual_cache}

property_based = settings(max_examples=40, deadline=None, derandomize=True)


def prompt_of(length: int, seed: int) -> torch.Tensor:
    """Text without the mask id: the published LLaDA and Dream loops overwrite it, ours do not."""
    return torch.randint(0, STOP, (length,), generator=torch.Generator().manual_seed(seed))


def same_or_fewer(result: tuple[torch.Tensor, int], expected: tuple[list[int], int]) -> None:
    x, nfe = result
    assert x[0].tolist() == expected[0]
    assert nfe <= expected[1]


@pytest.mark.parametrize("mode", LLADA)
@property_based
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(1, 20),
    size=st.sampled_from([1, 3, 4, 8, 16]),
    blocks=st.integers(1, 3),
    rule=st.sampled_from(["quota", "threshold", "factor"]),
    value=st.floats(0.05, 1.0),
    per_block=st.integers(1, 16),
)
def test_llada(mode: str, seed: int, length: int, size: int, blocks: int, rule: str, value: float, per_block: int) -> None:
    model, prompt = random_model("llada", seed % 7), prompt_of(length, seed)
    steps = blocks * (min(per_block, size) if seed % 3 else per_block)  # more steps than tokens work as published, too
    options: dict[str, Any] = {"gen_length": blocks * size, "block_length": size, "steps": steps}
    options |= {} if rule == "quota" else {rule: value}
    expected = llada_reference.generate(PlainNetwork(model), prompt, mode=mode, **options)
    x, nfe = LLADA[mode](model, prompt[None], **options)
    same_or_fewer((x, nfe), expected)
    assert x.shape == (1, length + blocks * size) and x.dtype == torch.long


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@property_based
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(1, 20),
    size=st.sampled_from([1, 3, 4, 8, 16]),
    blocks=st.integers(1, 3),
    alg=st.sampled_from([a for a in dream.ALGS if a != "origin"]),
    threshold=st.floats(0.05, 1.0),
    per_block=st.integers(2, 40),
)
def test_dream(
    cache: str, seed: int, length: int, size: int, blocks: int, alg: str, threshold: float, per_block: int
) -> None:
    """More steps than tokens included: the steps that commit nothing are dropped, and no token changes."""
    model, prompt = random_model("dream", seed % 7), prompt_of(length, seed)
    options: dict[str, Any] = {
        "max_new_tokens": blocks * size,
        "steps": blocks * per_block,
        "alg": alg,
        "threshold": threshold,
    }
    options |= {"cache": cache, "block_length": None if cache == "none" else size}
    expected = dream_reference.generate(PlainNetwork(model), prompt, **options)
    x, nfe = dream.diffusion_generate(model, prompt[None], **options)
    same_or_fewer((x, nfe), expected)
    assert x.shape == (1, length + blocks * size)


@pytest.mark.parametrize("mode", V2)
@property_based
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(1, 35),
    sub=st.sampled_from([1, 2, 4, 8]),
    blocks=st.integers(1, 3),
    threshold=st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]),
    stop=st.sampled_from([STOP, 5]),
)
def test_v2(mode: str, seed: int, length: int, sub: int, blocks: int, threshold: float, stop: int) -> None:
    """Answers that end on the grid, where the published budget is exact."""
    model, prompt = random_model("v2", seed % 7), prompt_of(length, seed)
    options: dict[str, Any] = {"block_size": 8, "small_block_size": sub, "threshold": threshold}
    ids, forwards = v2_reference.generate(PlainNetwork(model, 8), prompt, mode=mode, blocks=blocks, stop=stop, **options)
    budget = (length // 8 + blocks) * 8 - length
    x, nfe = V2[mode](model, prompt[None], budget, stop_token=stop, **options)
    assert x.shape == (1, length + budget)
    assert x[0, : len(ids)].tolist() == ids
    assert (x[0, len(ids) :] == model.spec.pad_id).all()
    assert nfe <= forwards


def test_v2_one_sub_block_is_the_whole_block() -> None:
    """Also where the answer ends off the grid: the published code feeds all rows of a sub-block."""
    for seed in range(3):
        model = random_model("v2", seed)
        for length, budget in ((5, 7), (5, 13), (13, 7), (9, 19), (8, 8)):
            prompt = torch.randint(0, 30, (length,), generator=torch.Generator().manual_seed(seed))
            options: dict[str, Any] = {"gen_length": budget, "block_length": 8, "small_block_size": 8, "threshold": 0.5}
            whole, part = (
                fastdllm.generate(model, [prompt], cache=cache, stop_ids=(), **options) for cache in ("block", "sub_block")
            )
            assert part.sequences[0].tolist() == whole.sequences[0].tolist()
            assert part.stats.row_forwards == whole.stats.row_forwards


@pytest.mark.parametrize("mode", V2)
def test_v2_answers_of_any_length_begin_as_longer_ones(mode: str) -> None:
    """The budget is exact: neither floored to blocks nor shortened by the prompt's tail. Whole sub-blocks do not depend on
    where the answer ends within the block."""
    for seed in range(6):
        model, prompt = random_model("v2", seed), prompt_of(3 + 4 * seed, seed)
        options: dict[str, Any] = {"block_size": 8, "small_block_size": 2, "threshold": 0.4, "stop_token": STOP}
        long, _ = V2[mode](model, prompt[None], 24, **options)
        for budget in (1, 5, 8, 13):
            short, _ = V2[mode](model, prompt[None], budget, **options)
            assert short.shape == (1, len(prompt) + budget)
            whole = (len(prompt) + budget) // 2 * 2
            assert short[0, :whole].tolist() == long[0, :whole].tolist()


def test_dream_schedule_equals_the_published_one_in_fp32() -> None:
    """The published code floors fp32 products; so the plan must not depend on the arithmetic's width."""
    for steps in [*range(1, 40), 64, 127, 128, 250, 256, 1000]:
        for masks in {1, 7, 32, 256, steps // 2, steps - 1, steps, 2 * steps} - {0}:
            for begin in (0, 1) if steps > 1 else (0,):
                left, expected = masks, []
                for i in range(begin, steps):
                    expected.append(dream_reference.timestep_quota(left, i, steps))
                    left -= expected[-1]
                assert schedules.timesteps(masks, steps, begin) == [n for n in expected if n], (steps, masks, begin)


def test_even_schedule_equals_the_published_one() -> None:
    for masks in range(1, 40):
        for steps in range(1, 60):
            assert schedules.even(masks, steps) == [n for n in llada_reference.even_split(masks, steps) if n]


def signature(function: Any) -> str:
    return ", ".join(
        name if p.default is p.empty else f"{name}={p.default!r}"
        for name, p in inspect.signature(function).parameters.items()
    )


def test_signatures_are_the_published_ones() -> None:
    for function in LLADA.values():
        assert signature(function) == (
            "model, prompt, steps=128, gen_length=128, block_length=128, temperature=0.0, "
            "remasking='low_confidence', mask_id=126336, threshold=None, factor=None, attention_mask=None, cfg_scale=0.0, "
            "others"
        )
    for function in V2.values():
        assert signature(function) == (
            "model, input_ids, max_new_tokens, block_size=32, small_block_size=8, threshold=0.9, temperature=0.0, "
            "top_p=0.95, stop_token=None, mask_id=None, reuse_k=1, layer_subset=None, trim_ratio=None"
        )
    assert signature(dream.diffusion_generate) == (
        "model, input_ids, attention_mask=None, max_new_tokens=128, steps=128, alg='entropy', alg_temp=0.0, "
        "temperature=0.0, top_p=None, top_k=None, threshold=0.9, block_length=None, cache='none'"
    )


@pytest.mark.parametrize("function", [*LLADA.values(), v2.generate, v2.generate_with_dual_cache, dream.diffusion_generate])
def test_padded_batches_and_texts_are_prompts_as_well(function: Any) -> None:
    """Each row gets the answer it gets alone; x begins with the padding."""
    family = (
        "tiny-llada"
        if function in LLADA.values()
        else "tiny-dream"
        if function in vars(dream).values()
        else "tiny-fast-dllm-v2"
    )
    model = fastdllm.load(family, "cpu")
    options = {"max_new_tokens": 8} if "max_new_tokens" in inspect.signature(function).parameters else {"gen_length": 8}
    texts = ["far away", "Ann has 3 apples."]
    rows = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    encoding = {
        "input_ids": [[0] * (width - len(row)) + row for row in rows],
        "attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in rows],
    }
    together, _ = function(model, encoding, **options)
    assert together.shape == (2, width + 8)
    assert torch.equal(together, function(model, texts, **options)[0])
    for row, x in zip(rows, together, strict=True):
        alone, _ = function(model, torch.tensor([row]), **options)
        assert x[width - len(row) :].tolist() == alone[0].tolist()


@pytest.mark.parametrize("function", [*LLADA.values(), v2.generate, dream.diffusion_generate])
def test_answers_begin_where_the_given_ids_end(function: Any) -> None:
    """Also where every row has padding, as `pad_to_multiple_of` makes it."""
    model = random_model(function.__module__.split(".")[0])
    options = {"max_new_tokens": 8} if "max_new_tokens" in inspect.signature(function).parameters else {"gen_length": 8}
    ids, mask = torch.nn.functional.pad(prompt_of(5, 0)[None], (3, 0)), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    alone = function(model, ids[:, 3:], **options)[0][0]
    for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}):
        assert function(model, inputs, **options)[0][:, 3:].tolist() == [alone.tolist()]
    if "attention_mask" in inspect.signature(function).parameters:
        assert function(model, ids, attention_mask=mask, **options)[0][:, 3:].tolist() == [alone.tolist()]


@pytest.mark.parametrize("function", [*LLADA.values(), dream.diffusion_generate])
@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_floats_on_either_side(function: Any, side: str) -> None:
    """What 0.0 and 1.0 say is heeded; a mask of 0 and -inf says the reverse, and was taken for one of 0 and 1."""
    model, prompt = random_model(function.__module__.split(".")[0]), prompt_of(5, 0)
    options = {"max_new_tokens": 8} if function is dream.diffusion_generate else {"gen_length": 8}
    alone, _ = function(model, prompt[None], **options)
    pad = (3, 0) if side == "left" else (0, 3)
    ids = torch.nn.functional.pad(prompt, pad, value=STOP)[None]
    mask = torch.nn.functional.pad(torch.ones(1, 5), pad)
    for form in (mask, mask.bool(), mask.long(), mask.tolist(), mask.numpy()):
        assert function(model, ids, attention_mask=form, **options)[0][:, 3:].tolist() == alone.tolist()
    for wrong in (mask.log(), 1 - mask * 0.5, mask * torch.nan):
        with pytest.raises(ValueError, match="attention_mask has values other than 0 and 1; a mask has 1 at tokens"):
            function(model, ids, attention_mask=wrong)


@pytest.mark.parametrize("function", LLADA.values())
def test_arguments_of_lladas_own_function(function: Any) -> None:
    """What can be honoured is; padding on the right moves to the left, so that the answer follows the prompt."""
    model, prompt = random_model("llada"), prompt_of(5, 0)
    alone, _ = function(model, prompt[None], gen_length=8, logits_eos_inf=False, confidence_eos_eot_inf=False)
    ids = torch.stack([torch.nn.functional.pad(prompt, (0, 2), value=STOP), prompt_of(7, 1)])
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    x, _ = function(model, ids, attention_mask=mask, gen_length=8)
    assert x.shape == (2, 15) and x[0, 2:].tolist() == alone[0].tolist()
    assert x[1].tolist() == function(model, ids[1:], gen_length=8)[0][0].tolist()
    if function is llada.generate:
        guided = fastdllm.generate(
            model, prompt[None], gen_length=8, decoder="quota", cfg_scale=2.0, block_length=128, stop_ids=()
        )
        assert function(model, prompt[None], gen_length=8, cfg_scale=2.0)[0].tolist() == [guided.sequences[0].tolist()]
        assert guided.sequences[0].tolist() != alone[0].tolist()
    for wrong, message in (
        ({"logits_eos_inf": True}, "logits_eos_inf=True is not supported: .* allowed is False"),
        ({"confidence_eos_eot_inf": "x"}, "confidence_eos_eot_inf='x' must be of type bool"),
        ({"attention_mask": mask[:1, :3]}, "attention_mask"),
        ({"attention_mask": torch.zeros_like(prompt)[None]}, "is empty"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0 must"),
        ({"tresholt": 1}, r"unknown argument tresholt=1 .*did you mean 'threshold'\?"),
        ({"top_p": 0.9}, "unknown argument top_p=0.9 .*fastdllm.generate has more"),
        *([] if function is llada.generate else [({"cfg_scale": 1.0}, "cfg_scale=1.0 needs cache='none', not")]),
    ):
        with pytest.raises(ValueError, match=message):
            function(model, prompt[None], gen_length=8, **wrong)


def test_defaults_run_whatever_the_length() -> None:
    """steps=128 is everybody's default, also for shorter answers."""
    for generate in LLADA.values():
        x, nfe = generate(random_model("llada"), prompt_of(5, 0)[None], gen_length=12)
        assert x.shape == (1, 17) and nfe == 12
    x, _ = dream.diffusion_generate(random_model("dream"), prompt_of(5, 0)[None], max_new_tokens=12)
    assert x.shape == (1, 17) and not (x == MASK).any()


@pytest.mark.parametrize("steps", [torch.ones(1, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long), None, 8.5, "x"])
def test_what_is_no_number_of_steps_is_named(steps: object) -> None:
    """Other codes' function takes an attention mask in second place."""
    for generate in LLADA.values():
        with pytest.raises(ValueError, match="steps="):
            generate(random_model("llada"), prompt_of(5, 0)[None], steps, gen_length=8)


def test_llada_and_dream_run_to_the_end_v2_stops() -> None:
    prompt = prompt_of(6, 1)[None]
    stopping = {f: forced(random_model(f), STOP) for f in ("llada", "dream", "v2")}
    x, _ = llada.generate(stopping["llada"], prompt, gen_length=8, block_length=8, threshold=0.0)
    assert x[0, 6:].tolist() == [STOP] * 8
    x, _ = dream.diffusion_generate(stopping["dream"], prompt, max_new_tokens=8)
    assert x[0, 6:].tolist() == [STOP] * 8
    x, nfe = v2.generate(stopping["v2"], prompt, 64, block_size=8)
    assert x[0, 6:].tolist() == [STOP] + [stopping["v2"].spec.pad_id] * 63
    assert nfe == 1


def forced(model: Model, token: int) -> Model:
    """A model that always predicts `token`: the final norm gives ones, the head sums them for that row."""
    with torch.no_grad():
        model.network.head.weight.zero_()
        model.network.embed.weight.abs_()
        model.network.norm.zero_()
    return with_logits(model, lambda logits: logits + 20 * torch.eye(logits.shape[-1])[token])


def test_batches() -> None:
    prompts = torch.stack([prompt_of(9, s) for s in range(3)])
    for name, functions in (("llada", LLADA), ("v2", V2)):
        model = random_model(name)
        for generate in functions.values():
            options = {"threshold": 0.3} | (
                {"block_length": 8, "gen_length": 16} if name == "llada" else {"max_new_tokens": 16, "block_size": 8}
            )
            x, nfe = generate(model, prompts, **options)
            alone = [generate(model, p[None], **options) for p in prompts]
            assert torch.equal(x, torch.cat([a for a, _ in alone]))
            assert nfe == max(n for _, n in alone)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_dream_left_padded_rows_equal_the_rows_alone(cache: str) -> None:
    model, lengths = random_model("dream"), (4, 9, 7)
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, 9 - n :], mask[row, 9 - n :] = prompt_of(n, row), 1
    options: dict[str, Any] = {"max_new_tokens": 10, "steps": 5, "cache": cache, "block_length": 5}
    x, _ = dream.diffusion_generate(model, ids, attention_mask=mask, **options)
    assert torch.equal(x[:, :9], ids)
    for row, n in enumerate(lengths):
        alone, _ = dream.diffusion_generate(model, ids[row : row + 1, 9 - n :], **options)
        assert torch.equal(x[row, 9:], alone[0, n:])


def test_dream_algs_choose_positions_differently() -> None:
    """The published cached loops run every alg as entropy; here any two differ somewhere, with and without a cache."""
    algs = [a for a in dream.ALGS if a != "confidence_threshold"]
    options: dict[str, Any] = {"max_new_tokens": 16, "steps": 16, "block_length": 16}
    for cache in ("none", "dual"):
        runs = dict.fromkeys(algs, "")
        for seed in range(6):
            for alg in algs:
                x, _ = dream.diffusion_generate(
                    random_model("dream", seed), prompt_of(8, seed)[None], alg=alg, cache=cache, **options
                )
                runs[alg] += str(x.tolist())
        assert len(set(runs.values())) == len(algs)


def test_dream_steps_have_no_effect_on_the_threshold() -> None:
    model, prompt = random_model("dream", 2), prompt_of(8, 3)[None]
    runs = [
        dream.diffusion_generate(model, prompt, max_new_tokens=16, steps=steps, alg="confidence_threshold", threshold=0.5)
        for steps in (1, 16, 1000)
    ]
    assert all(torch.equal(x, runs[0][0]) and nfe == runs[0][1] for x, nfe in runs)


@pytest.mark.pairwise
@pytest.mark.parametrize("alg", dream.ALGS)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_dream_leaves_no_mask_at_one_step_a_block(alg: str, cache: str, blocks: int) -> None:
    x, _ = dream.diffusion_generate(
        random_model("dream"),
        prompt_of(5, 0)[None],
        max_new_tokens=16,
        steps=blocks,
        alg=alg,
        cache=cache,
        block_length=16 // blocks,
    )
    assert not (x == MASK).any()


def test_v2_reuse_options_reach_the_core() -> None:
    model, prompt = random_model("v2"), prompt_of(8, 0)[None]
    options = {"block_size": 8, "threshold": 1.0, "reuse_k": 3, "layer_subset": "first"}
    x, _ = v2.generate_with_dual_cache(model, prompt, 16, **options)
    assert not (x[0] == MASK).any()
    same, _ = v2.generate_with_prefix_cache(model, prompt, 16, trim_ratio=1.0, **options)
    none, _ = v2.generate(model, prompt, 16, block_size=8, threshold=1.0)
    assert torch.equal(same, none)
    with pytest.raises(ValueError, match="reuse_k=3 needs cache='block' or 'sub_block'"):
        v2.generate(model, prompt, 16, **options)


@pytest.mark.parametrize(
    "function, options, message",
    [
        (llada.generate, {"remasking": "lowest"}, "remasking='lowest' is unknown; allowed are low_confidence, random"),
        (llada.generate, {"mask_id": 3}, "mask_id=3 is not the model's, 38"),
        (
            llada.generate,
            {"gen_length": 16, "block_length": 4, "steps": 3},
            "steps=3 must be at least the number of blocks, 4",
        ),
        (llada.generate, {"remasking": "random", "threshold": 0.9}, "confidence='random' has no meaning"),
        (llada.generate, {"threshold": 1.5}, "threshold=1.5 must lie in"),
        (dream.diffusion_generate, {"alg": "nonsense"}, "alg='nonsense' is unknown; allowed are origin"),
        (dream.diffusion_generate, {"cache": "double"}, "cache='double' is unknown; allowed are"),
        (dream.diffusion_generate, {"attention_mask": torch.tensor([[1, 0, 1]])}, "attention_mask has a gap in row 0"),
        (dream.diffusion_generate, {"attention_mask": torch.ones(1, 2)}, r"attention_mask has rows of \[2\] entries"),
        (v2.generate, {"max_new_tokens": 8, "block_size": 8, "small_block_size": 3}, "small_block_size=3 must divide"),
        (v2.generate, {"max_new_tokens": 8, "mask_id": 3}, "mask_id=3 is not the model's, 38"),
        (v2.generate, {"max_new_tokens": 0}, "gen_length=0 must be at least 1"),
    ],
)
def test_bad_arguments_say_what_is_allowed(function: Any, options: dict[str, Any], message: str) -> None:
    family = function.__module__.split(".")[0]
    with pytest.raises(ValueError, match=message):
        function(random_model(family), prompt_of(3, 0)[None], **options)

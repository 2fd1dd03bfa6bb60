# SPDX-License-Identifier: Apache-2.0
"""SDAR, Stable-DiffCoder, LLaDA2.0 and A2D's bd3lm give the tokens and the forwards of their published samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdllm
from fastdllm.likelihood import log_likelihoods
from tests.published_checkpoints import write_checkpoint
from tests.reference import block
from tests.reference.network import PlainNetwork

SIZES = {"llada2_moe": 8, "sdar": 4, "stable_diffcoder": 4, "a2d-qwen3": 8, "a2d-qwen2": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fastdllm.Model]:
    made = {}
    for kind, size in SIZES.items():
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp(kind)
        write_checkpoint(folder, kind)
        made[kind] = fastdllm.load(str(folder), device="cpu", block_size=size)
        made[kind].network.head.weight.mul_(5)  # sharper, so that thresholds part the tokens
    return made


def prompt(model: fastdllm.Model, length: int) -> torch.Tensor:
    ids = torch.randint(300, 500, (length,))
    if length > 2:  # a block of nothing but masks would be full of ties
        ids[0] = model.spec.mask_id  # text like any other
    return ids


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("length", [1, 3, 8, 13])
@pytest.mark.parametrize(
    "rule",
    [
        {"decoder": "threshold", "threshold": 0.3},
        {"decoder": "threshold", "threshold": 0.9},
        {"decoder": "quota", "steps": "all"},
        {"decoder": "quota", "steps": "half"},
        {"decoder": "quota", "steps": "some"},  # which do not divide the block
    ],
    ids=str,
)
@pytest.mark.parametrize("cache", ["block", "none"])
def test_the_published_sampler(
    models: dict[str, fastdllm.Model], kind: str, length: int, rule: dict[str, Any], cache: str
) -> None:
    model, size = models[kind], SIZES[kind]
    if rule["decoder"] == "quota" and not kind.startswith(
        "a2d"
    ):  # what a partial block's share of the steps is, the samplers answer differently
        length = -(-length // size) * size
    ids = prompt(model, length)
    at_prompt = kind.startswith("a2d")
    answer = 2 * size if at_prompt else -(-length // size) * size - length + 2 * size
    shares = {"all": size, "half": size // 2, "some": size // 2 + 1}
    per_block = shares[rule["steps"]] if rule["decoder"] == "quota" else None
    options = dict(rule) if per_block is None else {"decoder": "quota", "steps": per_block * (answer // size)}
    strict = model.spec.defaults.get("strict", False)
    expected, forwards = block.generate(
        PlainNetwork(model, size, length if at_prompt else 0),
        ids,
        length=answer,
        block_size=size,
        steps=per_block,
        threshold=rule.get("threshold"),
        strict=strict,
        at_prompt=at_prompt,
    )
    shape = {"gen_length": answer, "block_length": size, "small_block_size": size, "stop_ids": ()}
    out = fastdllm.generate(model, [ids], cache=cache, **shape, **options)
    assert out.sequences[0].tolist() == expected
    if cache == "block":
        assert out.stats.forwards == forwards


def test_rows_of_a_batch_have_grids_of_their_own(models: dict[str, fastdllm.Model]) -> None:
    """Blocks are counted from each prompt's end; a last block that is cut short sees no masks after itself."""
    model, size = models["a2d-qwen3"], SIZES["a2d-qwen3"]
    given = [prompt(model, length) for length in (1, 13, 8, 5, 16, 31)]
    for answer in (3, 8, 21):
        shape = {"gen_length": answer, "block_length": size, "small_block_size": size, "stop_ids": (), "threshold": 0.3}
        for cache in ("block", "none"):
            out = fastdllm.generate(model, given, cache=cache, batch_size=4, **shape)
            for ids, sequence in zip(given, out.sequences, strict=True):
                net = PlainNetwork(model, size, len(ids))
                options = {"length": answer, "block_size": size, "threshold": 0.3, "strict": False, "at_prompt": True}
                assert sequence.tolist() == block.generate(net, ids, **options)[0]


@pytest.mark.parametrize("context", [1, 5, 8, 13])
def test_the_chain_rule_counts_blocks_from_the_targets_start(models: dict[str, fastdllm.Model], context: int) -> None:
    model, size = models["a2d-qwen2"], SIZES["a2d-qwen2"]
    ids = torch.cat([prompt(model, context), torch.randint(300, 500, (11,))])
    (score,) = log_likelihoods(model, [(ids[:context], ids[context:])])
    total = 0.0
    for at in range(context, len(ids)):
        end = context + ((at - context) // size + 1) * size
        canvas = torch.cat([ids[:at], torch.full((end - at,), model.spec.mask_id)])
        net = PlainNetwork(model, size, context)
        net.banned = torch.zeros_like(model.banned)
        total += float(net(canvas)[at].log_softmax(-1)[ids[at]])
    assert score.log_likelihood == pytest.approx(total, abs=1e-3)

# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts under everything that the engine offers: decoders, caches, samplers, quantisation, adapters, reuse."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdllm
from fastdllm import registry, testing
from fastdllm.kernels.experts import reference
from fastdllm.models import Model
from fastdllm.models.routing import route
from fastdllm.models.spec import Experts
from fastdllm.testing import MIXTURES, prompts, random_model
from tests.models.test_families import check
from tests.models.test_networks import our_logits
from tests.published_checkpoints import write_adapter, write_checkpoint
from tests.reference import llada
from tests.reference.network import PlainNetwork


@pytest.mark.each_choice
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("decoder", registry.names("decoders"))
def test_decoders_and_caches(family: str, decoder: str) -> None:
    """Each ends without masks under every cache that goes with it, and rows of a batch do not see each other."""
    if not testing.fits(decoder, family):
        assert decoder in ("self_speculate", "self_verify"), "these draft for models that predict the next token"
        return
    testing.check_generation(decoder, family)
    if testing.rule_of(decoder).lossless:
        testing.check_lossless(decoder, family)


@pytest.mark.parametrize("family", MIXTURES)
def test_logits_are_those_of_the_plain_network(family: str) -> None:
    model = random_model(family, 3)
    ids = torch.randint(0, testing.STOP, (1, 70))  # more than those for which all experts compute
    want = PlainNetwork(model, model.spec.block_causal)(ids[0])
    keep = ~model.banned
    torch.testing.assert_close(our_logits(model, ids)[0][:, keep], want[:, keep], atol=5e-5, rtol=1e-5)
    blocks = [(i, min(i + 8, 70)) for i in range(0, 70, 8)] if model.spec.block_causal else [(0, 70)]
    torch.testing.assert_close(our_logits(model, ids, blocks)[0][:, keep], want[:, keep], atol=5e-5, rtol=1e-5)


@pytest.mark.skipif(reference.GROUPED is None, reason="this torch has no grouped product")
@pytest.mark.parametrize("family", MIXTURES)
def test_positions_sorted_by_expert_have_transformers_logits(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "FEW", 8)
    check(tmp_path, family)


@pytest.mark.parametrize("mode", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", [{"steps": 16}, {"steps": 8}, {"threshold": 0.3}], ids=str)
def test_llada_moe_has_lladas_sampler(mode: str, rule: dict[str, Any]) -> None:
    """The model card's function is LLaDA's: blocks by low confidence, all positions anew; the caches are Fast-dLLM's."""
    model, (prompt,) = random_model("llada_moe", 1), prompts(9)
    want, forwards = llada.generate(
        PlainNetwork(model), prompt, mode=mode, gen_length=16, block_length=8, **{"steps": 16} | rule
    )
    decoder = {"decoder": "threshold", **rule} if "threshold" in rule else {"decoder": "quota", **rule}
    out = fastdllm.generate(model, [prompt], cache=mode, gen_length=16, block_length=8, stop_ids=(), **decoder)
    assert out.sequences[0].tolist() == want and out.stats.forwards == forwards


def test_a_bias_chooses_but_does_not_weigh() -> None:
    e = Experts(4, 2, 8, score="sigmoid", scale=2.0)
    router, y = torch.zeros(4, 3), torch.randn(5, 3)
    chosen, weight = route(y, router, torch.tensor([0.0, 9.0, -9.0, 1.0]), e)
    assert chosen.sort(-1).values.tolist() == [[1, 3]] * 5
    torch.testing.assert_close(weight, torch.ones(5, 2))  # equal scores, which add up to the scale


def test_only_experts_of_the_best_groups_are_chosen() -> None:
    e = Experts(6, 2, 8, score="sigmoid", groups=3, active_groups=1)
    bias = torch.tensor([0.9, 0.0, 0.6, 0.5, 0.8, 0.1])  # the best expert stands alone in its group
    chosen, _ = route(torch.zeros(1, 3), torch.zeros(6, 3), bias, e)
    assert sorted(chosen[0].tolist()) == [2, 3]
    low = route(torch.zeros(1, 3), torch.zeros(6, 3), bias - 5, e)[0]  # below zero is not out of the running
    assert sorted(low[0].tolist()) == [2, 3]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"active": 5}, "active=5 is outside of 1 to 4"),
        ({"groups": 2, "active_groups": 1, "active": 3}, "active=3 is outside of 1 to 2"),
        ({"count": 5, "groups": 2}, "5 cannot be divided into 2 groups"),
        ({"groups": 4, "active": 1}, "4 cannot be divided into 4 groups of two"),
        ({"active_groups": 2}, "active_groups=2 is outside of 1 to 1"),
    ],
    ids=str,
)
def test_experts_that_cannot_be(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(**{"count": 4, "active": 2, "inner": 8, **fields})


def test_channels_are_counted() -> None:
    spec = random_model("llada2_moe").spec
    assert [spec.inner(i) for i in range(2)] == [48, 8 * 12 + 12]
    assert [spec.working(i) for i in range(2)] == [48, 3 * 12 + 12]


LLADA2_WRONG = [
    ({"norm_topk_prob": False}, "norm_topk_prob=False; only True"),
    ({"score_function": "softmax"}, "score_function='softmax'; only 'sigmoid'"),
    ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias=False; only True"),
    ({"use_qk_norm": False}, "use_qk_norm=False; only True"),
    ({"norm_head": True}, "norm_head=True; only False"),
    ({"norm_softmax": True}, "norm_softmax=True; only False"),
    ({"router_dtype": "bf16"}, "router_dtype='bf16'; only 'fp32'"),
    ({"use_bias": True}, "use_bias=True; only False"),
    ({"image_token_offset": 157184}, "image_token_offset=157184; only None"),
    ({"using_split_qkv_in_self_attention": True}, "using_split_qkv_in_self_attention=True"),
    ({"rotary_dim": 4}, "rotary_dim=4; partial_rotary_factor makes it 8"),
    ({"partial_rotary_factor": 0.2}, "rotary=3 is odd"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    ({"n_group": 3}, "n_group=3; num_experts=8 is no multiple of it"),
    ({"topk_group": 5}, "topk_group=5; it must be a whole number from 1 to 4"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok=5; it must be a whole number from 1 to 4"),
    ({"first_k_dense_replace": 4}, "first_k_dense_replace=4; it must be a whole number from 0 to 3"),
    ({"use_sliding_window": True}, "use_sliding_window=True; only null or"),
    ({"model_type": "llada2_moe_veomni"}, "a mixture of experts"),
]


@pytest.mark.parametrize("change, message", LLADA2_WRONG, ids=str)
def test_another_llada2_is_refused_by_its_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path, "llada2_moe")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        fastdllm.load(str(tmp_path), device="cpu")


def test_experts_merged_into_one_tensor_are_named(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, "llada2_moe")
    name = "model.layers.1.mlp.experts.gate_proj"
    save_file({**tensors, name: torch.zeros(8, 16, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"unexpected tensor '{name}' for the family 'llada2_moe'$"):
        fastdllm.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("quantize, allowed", [("fp8", 0.25), ("int8", 0.05), ("int4", 0.5)])
def test_projections_are_quantised_and_routers_are_not(tmp_path: Path, kind: str, quantize: str, allowed: float) -> None:
    write_checkpoint(tmp_path, kind)
    model, smaller = (fastdllm.load(str(tmp_path), device="cpu", quantize=q) for q in (None, quantize))
    layer = smaller.network.layers[-1]
    assert layer.router.dtype == torch.float32 and layer.gate_up.weight.dtype != torch.float32
    ids = torch.randint(0, 300, (2, 40))  # few positions, and many: the path of all experts for either
    for part in (ids[:, :12], ids):
        want = our_logits(model, part)
        assert (our_logits(smaller, part) - want).abs().mean() / want.abs().mean() < allowed


def test_packed_experts_are_refused(tmp_path: Path) -> None:
    for kind, name in (
        ("llada_moe", "model.layers.0.mlp.experts.0.gate_proj"),
        ("llada2_moe", "model.layers.0.attention.dense"),
    ):
        quantization = {"quant_method": "gptq", "bits": 4, "desc_act": False}
        tensors = write_checkpoint(tmp_path / kind, kind, quantization_config=quantization)
        out, into = tensors.pop(f"{name}.weight").shape
        packed = {"qweight": torch.zeros(into // 8, out, dtype=torch.int32), "scales": torch.zeros(1, out)}
        packed["qzeros"] = torch.zeros(1, out // 8, dtype=torch.int32)
        save_file(tensors | {f"{name}.{part}": t for part, t in packed.items()}, tmp_path / kind / "model.safetensors")
        with pytest.raises(ValueError, match="a mixture of experts is not read in 4 bits"):
            fastdllm.load(str(tmp_path / kind), device="cpu")


TARGETS = {
    "llada_moe": ["model.layers.1.self_attn.q_proj"]
    + [f"model.layers.1.mlp.experts.{e}.{n}_proj" for e in (0, 5) for n in ("gate", "up", "down")],
    "llada2_moe": ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.attention.query_key_value"]
    + [f"model.layers.2.mlp.{part}.{n}_proj" for part in ("experts.7", "shared_experts") for n in ("gate", "down")],
}


@pytest.mark.parametrize("kind", TARGETS)
def test_an_adapter_is_merged_into_the_expert_it_names(tmp_path: Path, kind: str) -> None:
    tensors = write_checkpoint(tmp_path / "base", kind)
    write_adapter(tmp_path / "lora", {n: tuple(t.shape) for n, t in tensors.items()}, TARGETS[kind])
    pair = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in TARGETS[kind]:
        a, b = (pair[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + 2.0 * (b @ a)
    merged = fastdllm.load(str(tmp_path / "base"), device="cpu", adapter=tmp_path / "lora")
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    expected = dict(fastdllm.load(str(tmp_path / "base"), device="cpu").network.named_parameters())
    for name, value in merged.network.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", MIXTURES)
def test_lm_eval_and_the_chat_take_the_folder(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("lm_eval")
    from fastdllm.evaluation.harness import DiffusionLM
    from fastdllm.ui import terminal
    from tests.evaluation.asking import evaluate

    write_checkpoint(tmp_path, kind, shards=2, max_position_embeddings=2048)
    adapter = DiffusionLM(pretrained=str(tmp_path), device="cpu", batch_size=2, gen_length=16, show_speed=True)
    speed = evaluate(adapter, "gsm_symbolic", limit=2, num_fewshot=0, apply_chat_template=True)["config"]["speed"]
    assert speed["samples"] == 2 and speed["nfe"] > 0
    scored = evaluate(adapter, "gsm_symbolic_mc", limit=2, num_fewshot=0)["results"]["gsm_symbolic_mc"]
    assert 0 <= scored["acc,none"] <= 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Tom has 5 apples.\nAnd now?")))
    assert terminal.main(["--model", str(tmp_path), "--max-new-tokens", "24", "--stop-ids", "()"]) == 0
    assert capsys.readouterr().out.count("tokens/forward") == 2


def deep(layers: int) -> Model:
    """LLaDA2.x's network with more layers, so that some of them can be left out."""
    model = random_model("llada2_moe")
    spec = dataclasses.replace(model.spec, layers=layers)
    network = type(model.network)(spec)
    for name, weight in network.named_parameters():
        if weight.ndim == 2 or name.endswith("router_bias"):
            torch.nn.init.normal_(weight, std=0.3)
    return Model(network.requires_grad_(False), spec)


@pytest.mark.parametrize("cache", ["block", "sub_block"])
def test_layer_reuse_and_trim_meet_experts(cache: str) -> None:
    """Neutral settings change nothing, others skip layers and still end; rows of a batch do not see each other."""
    model, given = deep(5), prompts(5, 13)
    options = {"cache": cache, "gen_length": 16, "block_length": 8, "small_block_size": 4, "stop_ids": (), "threshold": 0.5}
    plain = fastdllm.generate(model, given, **options)
    for neutral in ({"reuse_k": 1}, {"reuse_k": 3, "layer_subset": "first", "trim_ratio": 1.0}):
        same = fastdllm.generate(model, given, **options, **neutral)
        assert [s.tolist() for s in same.sequences] == [s.tolist() for s in plain.sequences]
    less = {"reuse_k": 3, "layer_subset": "1+2+3", "trim_ratio": 0.3}
    out = fastdllm.generate(model, given, **options, **less)
    assert sum(out.stats.row_layer_tokens) < 5 * sum(out.stats.row_positions)
    for i, prompt in enumerate(given):
        assert testing.MASK not in out.sequences[i][len(prompt) :]
        alone = fastdllm.generate(model, prompt, **options, **less)
        assert torch.equal(alone.sequences[0], out.sequences[i])

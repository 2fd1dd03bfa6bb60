# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.0-mini and 2.1-mini (arXiv 2512.15745, 2602.08676): block diffusion over 256 experts, of which 8 and a shared one
work for a token; no token shift.

Fields and names are those of configuration_llada2_moe.py and modeling_llada2_moe.py (inclusionAI/LLaDA2.0-mini). Blocks
are counted from position 0; their size is an argument of the published sampler, by default 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdllm.models import qwen2
from fastdllm.models.files import Fields
from fastdllm.models.spec import EXPERTS, WIDTH, Experts, Family, ModelSpec, mask_id, pad_id, stop_ids

# What the published network computes, whatever config.json says; LLaDA2.0-Uni has an offset of pictures' tokens.
PLAIN: dict[str, Any] = {"image_token_offset": None, "router_dtype": "fp32", "score_function": "sigmoid"}
PLAIN |= dict.fromkeys(("moe_router_enable_expert_bias", "norm_topk_prob", "use_qk_norm", "use_rmsnorm"), True)
PLAIN |= dict.fromkeys(("norm_head", "norm_softmax", "using_split_qkv_in_self_attention"), False)


def read(config: Fields, ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids; the mask and the stops are published in the tokenizer only."""
    shapes = qwen2.shapes(config, qkv_bias=config.flag("use_qkv_bias"), qk_norm=True, partial=True)
    for name in [name for name, usual in PLAIN.items() if config.get(name, usual) != usual]:
        raise config.wrong(name, f"only {PLAIN[name]!r} is supported")
    turned = shapes["rotary"] or shapes["head_dim"]
    if config.get("rotary_dim", turned) != turned:
        raise config.wrong("rotary_dim", f"partial_rotary_factor makes it {turned}")
    count, inner = config.integer("num_experts", 1, EXPERTS), config.integer("moe_intermediate_size", 1, WIDTH * 8)
    groups = config.integer("n_group", 1, count, 1)
    if count % groups:
        raise config.wrong("n_group", f"num_experts={count} is no multiple of it")
    best = config.integer("topk_group", 1, groups, groups)
    active = config.integer("num_experts_per_tok", 1, count // groups * best)
    shared = inner * config.integer("num_shared_experts", 0, EXPERTS, 0)
    dense = config.integer("first_k_dense_replace", 0, shapes["layers"], 0)
    scale = config.number("routed_scaling_factor", 1e-3, 1e3, 1.0)
    size = config.integer("block_size", 1, shapes["max_length"], 32)
    stops = stop_ids(config, ids, "<|endoftext|>", "<|role_end|>")
    return ModelSpec(
        family="llada2_moe",
        **shapes,
        shift=0,
        block_causal=size,
        mask_id=mask_id(config, ids, "<|mask|>", 156895),
        stop_ids=stops,
        pad_id=pad_id(config, stops, 0),
        defaults={"cache": "block", "block_length": size, "strict": True, "schedule": "even", "small_block_size": size},
        experts=Experts(count, active, inner, shared, dense, "sigmoid", groups, best, scale),
    )


ATTENTION = {"query_layernorm.weight": "q_norm", "key_layernorm.weight": "k_norm", "dense.weight": "out.weight"}


def names(spec: ModelSpec) -> dict[str, tuple[str, int]]:
    """Published tensor name -> (parameter of the network, first row, or of `.T` first column)."""
    table, e = qwen2.outer_names(spec, embed="word_embeddings"), spec.experts
    for i in range(spec.layers):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        kinds = ("weight", "bias") if spec.qkv_bias else ("weight",)
        fused = {f"query_key_value.{kind}": f"qkv.{kind}" for kind in kinds}
        table |= {f"{old}attention.{name}": (new + place, 0) for name, place in (ATTENTION | fused).items()}
        starts, mlp = {"": 0}, old + "mlp."
        if e and i >= e.dense:
            starts = e.starts() | ({"shared_experts.": e.count * e.inner} if e.shared else {})
            table |= {mlp + "gate.weight": (new + "router", 0), mlp + "gate.expert_bias": (new + "router_bias", 0)}
        table |= qwen2.ffn_names(mlp, new, starts, spec.inner(i))
    return table


HARMLESS = frozenset({"output_dropout", "output_router_logits"})
FAMILY = Family(read, names, lambda spec: set(), qwen2.TIED, HARMLESS, block_field="block_size", experts=True)

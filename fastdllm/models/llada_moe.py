# SPDX-License-Identifier: Apache-2.0
"""LLaDA-MoE-7B-A1B Base and Instruct: LLaDA with 64 experts, of which 8 work for a token (arXiv 2509.24389).

Fields are those of configuration_lladamoe.py, names those of modeling_lladamoe.py (inclusionAI/LLaDA-MoE-7B-A1B-Base).
config.json calls the model "llada" like the dense one, so the architecture says which it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastdllm.models import qwen2
from fastdllm.models.files import Fields
from fastdllm.models.spec import EXPERTS, Experts, Family, ModelSpec, mask_id, pad_id, stop_ids

# What the layers compute where config.json says nothing, and all that is read here.
PLAIN = {
    "moe_router_enable_expert_bias": (False,),
    "moe_router_score_function": ("softmax",),
    "routed_scaling_factor": (1,),
    "router_num_group": (-2, 1),
    "router_topk_group": (-2, 1),
    "shared_expert_intermediate_size": (-1, 0),
}


def read(config: Fields, ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids; `<|role_end|>` ends an answer of the Instruct model."""
    norms = config.flag("qk_layernorm")
    shapes = qwen2.shapes(config, qkv_bias=False, qk_norm=norms, ffn="expert_intermediate_size")
    count = config.integer("num_experts", 1, EXPERTS)
    for name, usual in PLAIN.items():
        if config.get(name, usual[0]) not in usual:
            raise config.wrong(name, f"only {' or '.join(map(repr, usual))} is supported")
    if config.get("moe_layer_freq", [1] * shapes["layers"]) != [1] * shapes["layers"]:
        raise config.wrong("moe_layer_freq", "only a 1 for every layer is supported: each has experts")
    stops = stop_ids(config, ids, "<|endoftext|>", "<|role_end|>")
    return ModelSpec(
        family="llada_moe",
        **shapes,
        shift=0,
        block_causal=0,
        mask_id=mask_id(config, ids, "<|mask|>", 156895),
        stop_ids=stops,
        pad_id=pad_id(config, stops, 0),
        defaults={"cache": "dual", "schedule": "even"},
        experts=Experts(count, config.integer("num_experts_per_tok", 1, count), shapes["ffn"]),
    )


def names(spec: ModelSpec) -> dict[str, tuple[str, int]]:
    """Published tensor name -> (parameter of the network, first row)."""
    table = {name: place for name, place in qwen2.names(spec).items() if ".mlp." not in name}
    starts = spec.experts.starts() if spec.experts else {}
    for i in range(spec.layers):
        old, new = f"model.layers.{i}.mlp.", f"layers.{i}."
        table |= {old + "gate.weight": (new + "router", 0), **qwen2.ffn_names(old, new, starts, spec.inner(i))}
    return table


# The published network never normalises the weights of the chosen experts, whatever norm_topk_prob says; there are no layers
# of the dense size; the others are of training.
HARMLESS = frozenset(
    {"norm_topk_prob", "dense_intermediate_size", "output_router_logits", "router_aux_loss_coef", "router_z_loss_coef"}
)
FAMILY = Family(read, names, qwen2.optional, tied=qwen2.TIED, harmless=HARMLESS, experts=True)

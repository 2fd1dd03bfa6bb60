# SPDX-License-Identifier: Apache-2.0
"""LLaDA-8B Base and Instruct, LLaDA-1.5: config.json fields, special ids and tensor names as published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdllm.models.spec import Family, ModelSpec


def spec(config: Mapping[str, Any], ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids; `<|eot_id|>` is the Instruct models' second stop."""
    for name, needed in {
        "block_type": "llama",
        "block_group_size": 1,
        "alibi": False,
        "layer_norm_type": "rms",
    }.items():
        if config.get(name, needed) != needed:
            raise ValueError(f"llada: config.json has {name}={config[name]!r}; only {needed!r} is supported")
    eos = config.get("eos_token_id", 126081)
    return ModelSpec(
        family="llada",
        layers=config["n_layers"],
        width=config["d_model"],
        heads=config["n_heads"],
        kv_heads=config.get("n_kv_heads") or config["n_heads"],
        head_dim=config["d_model"] // config["n_heads"],
        ffn=config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        vocab=config.get("embedding_size") or config["vocab_size"],
        max_length=config["max_sequence_length"],
        rms_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=config.get("rope_theta", 10000.0),
        qkv_bias=bool(config.get("include_qkv_bias", False)),
        tied_head=bool(config.get("weight_tying", False)),
        shift=0,
        block_causal=0,
        mask_id=config.get("mask_token_id", 126336),
        stop_ids=tuple(dict.fromkeys([eos] + [ids[t] for t in ("<|eot_id|>",) if t in ids])),
        pad_id=config.get("pad_token_id", eos),
        defaults={"cache": "dual", "schedule": "even"},
    )


def names(spec: ModelSpec) -> dict[str, tuple[str, int]]:
    """Published tensor name -> (parameter of the network, first row)."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    table = {
        "model.transformer.wte.weight": ("embed.weight", 0),
        "model.transformer.ln_f.weight": ("norm", 0),
    }
    if not spec.tied_head:
        table["model.transformer.ff_out.weight"] = ("head.weight", 0)
    for i in range(spec.layers):
        old, new = f"model.transformer.blocks.{i}.", f"layers.{i}."
        table |= {
            old + "attn_norm.weight": (new + "attn_norm", 0),
            old + "ff_norm.weight": (new + "ffn_norm", 0),
            old + "q_proj.weight": (new + "qkv.weight", 0),
            old + "k_proj.weight": (new + "qkv.weight", q),
            old + "v_proj.weight": (new + "qkv.weight", q + kv),
            old + "attn_out.weight": (new + "out.weight", 0),
            old + "ff_proj.weight": (new + "gate_up.weight", 0),
            old + "up_proj.weight": (new + "gate_up.weight", spec.ffn),
            old + "ff_out.weight": (new + "down.weight", 0),
        }
        if spec.qkv_bias:
            table |= {
                old + "q_proj.bias": (new + "qkv.bias", 0),
                old + "k_proj.bias": (new + "qkv.bias", q),
                old + "v_proj.bias": (new + "qkv.bias", q + kv),
            }
    return table


def optional(spec: ModelSpec) -> set[str]:
    """A tied checkpoint may carry its head a second time."""
    return {"model.transformer.ff_out.weight"} if spec.tied_head else set()


FAMILY = Family(spec, names, optional)

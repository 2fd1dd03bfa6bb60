# SPDX-License-Identifier: Apache-2.0
"""What Dream and Fast-dLLM v2 share: Qwen2's config.json fields and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdllm.models.spec import ModelSpec


def shapes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelSpec` that every Qwen2-shaped config.json gives (transformers 4 and 5 style)."""
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"rope type {rope.get('rope_type', rope.get('type'))!r} is not supported, only 'default'")
    if config.get("use_sliding_window", False):
        raise ValueError("use_sliding_window=True is not supported")
    return {
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn": config["intermediate_size"],
        "vocab": config["vocab_size"],
        "max_length": config["max_position_embeddings"],
        "rms_eps": config["rms_norm_eps"],
        "rope_theta": rope.get("rope_theta") or config["rope_theta"],
        "qkv_bias": True,
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }


def stop_ids(config: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[int, ...]:
    """config.json's end of text (a number or a list) and the two tokens that end a turn in Qwen2's vocabulary."""
    eos = config.get("eos_token_id")
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(dict.fromkeys(listed + [ids[t] for t in ("<|im_end|>", "<|endoftext|>") if t in ids]))


def names(spec: ModelSpec) -> dict[str, tuple[str, int]]:
    """Published tensor name -> (parameter of the network, first row)."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    table = {"model.embed_tokens.weight": ("embed.weight", 0), "model.norm.weight": ("norm", 0)}
    if not spec.tied_head:
        table["lm_head.weight"] = ("head.weight", 0)
    for i in range(spec.layers):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        table |= {
            old + "input_layernorm.weight": (new + "attn_norm", 0),
            old + "post_attention_layernorm.weight": (new + "ffn_norm", 0),
            old + "self_attn.o_proj.weight": (new + "out.weight", 0),
            old + "mlp.gate_proj.weight": (new + "gate_up.weight", 0),
            old + "mlp.up_proj.weight": (new + "gate_up.weight", spec.ffn),
            old + "mlp.down_proj.weight": (new + "down.weight", 0),
        }
        for kind in ("weight", "bias"):
            for part, row in (("q", 0), ("k", q), ("v", q + kv)):
                table[f"{old}self_attn.{part}_proj.{kind}"] = (f"{new}qkv.{kind}", row)
    return table


def optional(spec: ModelSpec) -> set[str]:
    """RoPE tables of old checkpoints, and a tied head that was saved a second time."""
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(spec.layers)}
    return extra | ({"lm_head.weight"} if spec.tied_head else set())

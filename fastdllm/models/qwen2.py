# SPDX-License-Identifier: Apache-2.0
"""What the families in transformers' layout share: config.json fields and tensor names of Qwen2 and Llama."""

from __future__ import annotations

from typing import Any

from fastdllm.models.files import Fields
from fastdllm.models.spec import HEAD_DIM, HEADS, LAYERS, POSITIONS, VOCAB, WIDTH, ModelSpec

TIED = "lm_head.weight"


def shapes(config: Fields, qkv_bias: bool = True) -> dict[str, Any]:
    """The fields of `ModelSpec` that every Qwen2-shaped config.json gives (transformers 4 and 5 style).

    qkv_bias: what the architecture has where config.json says nothing (`attention_bias`).
    """
    heads, width = config.integer("num_attention_heads", 1, HEADS), config.integer("hidden_size", 1, WIDTH)
    if "head_dim" not in config and width % heads:
        raise config.wrong("num_attention_heads", f"hidden_size={width} is no multiple of it")
    check_layer_types(config)
    return {
        "layers": config.integer("num_hidden_layers", 1, LAYERS),
        "width": width,
        "heads": heads,
        "kv_heads": config.integer("num_key_value_heads", 1, HEADS, heads),
        "head_dim": config.integer("head_dim", 2, HEAD_DIM, width // heads),
        "ffn": config.integer("intermediate_size", 1, WIDTH * 8),
        "vocab": config.integer("vocab_size", 1, VOCAB),
        "max_length": config.integer("max_position_embeddings", 1, POSITIONS),
        "rms_eps": config.number("rms_norm_eps", 1e-12, 1e-1),
        "rope_theta": rope_theta(config),
        "qkv_bias": config.flag("attention_bias", qkv_bias),
        "tied_head": config.flag("tie_word_embeddings"),
    }


def check_layer_types(config: Fields) -> None:
    """Raises ValueError for a layer that does not attend to everything."""
    if set(config.names("layer_types")) - {"full_attention"}:
        raise config.wrong("layer_types", "only 'full_attention' is supported")
    if config.flag("use_sliding_window"):
        raise config.wrong("use_sliding_window", "only False is supported")


def rope_theta(config: Fields) -> float:
    """RoPE's base. Raises ValueError for any kind of rotation but the plain one."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.inner(name)
        kind = rope.text("rope_type", rope.text("type", "default"))
        if kind != "default":
            raise ValueError(f"{rope.where} has rope type {kind!r}; only 'default' is supported")
        if (share := rope.number("partial_rotary_factor", 0, 1, 1.0)) != 1:
            raise rope.wrong("partial_rotary_factor", f"only 1 is supported, not {share:g}")
        if rest := set(rope) - {"rope_type", "type", "partial_rotary_factor", "rope_theta", "factor"}:
            raise rope.wrong(min(rest), "it is not supported for rope type 'default'")
        if rope.number("factor", 0, 1e6, 1.0) != 1:
            raise rope.wrong("factor", "only 1 is supported for rope type 'default'")
        if "rope_theta" in rope:
            theta = rope.number("rope_theta", 2, 1e12)
            if config.number("rope_theta", 2, 1e12, theta) != theta:
                raise config.wrong("rope_theta", f"{name} says {theta:g}")
            return theta
    return config.number("rope_theta", 2, 1e12)


def names(spec: ModelSpec) -> dict[str, tuple[str, int]]:
    """Published tensor name -> (parameter of the network, first row)."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    table = {"model.embed_tokens.weight": ("embed.weight", 0), "model.norm.weight": ("norm", 0)}
    if not spec.tied_head:
        table[TIED] = ("head.weight", 0)
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
        for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
            for part, row in (("q", 0), ("k", q), ("v", q + kv)):
                table[f"{old}self_attn.{part}_proj.{kind}"] = (f"{new}qkv.{kind}", row)
    return table


def optional(spec: ModelSpec) -> set[str]:
    """RoPE tables of old checkpoints."""
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(spec.layers)}

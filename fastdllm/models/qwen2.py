# SPDX-License-Identifier: Apache-2.0
"""What the families in transformers' layout share: config.json fields and tensor names of Qwen2, Qwen3 and Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdllm.models.files import Fields
from fastdllm.models.rope import read_rope
from fastdllm.models.spec import HEAD_DIM, HEADS, LAYERS, VOCAB, WIDTH, ModelSpec

TIED = "lm_head.weight"


def shapes(
    config: Fields,
    qkv_bias: bool = True,
    qk_norm: bool = False,
    rope_kinds: tuple[str, ...] = ("default",),
    ffn: str = "intermediate_size",
    partial: bool = False,
) -> dict[str, Any]:
    """The fields of `ModelSpec` that every config.json in this layout gives (transformers 4 and 5 style).

    qkv_bias: whether the architecture (Qwen2) has biases on queries, keys and values where config.json does not say
    otherwise; in those that have none by default (Qwen3, Llama) `attention_bias` would add one to the output as well.
    qk_norm: whether it normalises query and key heads. rope_kinds: the rotations it may have.
    ffn: the field of the inner width. partial: whether `partial_rotary_factor` may leave channels of a head unrotated.
    """
    heads, width = config.integer("num_attention_heads", 1, HEADS), config.integer("hidden_size", 1, WIDTH)
    if "head_dim" not in config and width % heads:
        raise config.wrong("num_attention_heads", f"hidden_size={width} is no multiple of it")
    if not qkv_bias and config.flag("attention_bias"):
        raise config.wrong("attention_bias", "only False is supported for this architecture")
    rope = read_rope(config, rope_kinds, partial)
    head_dim = config.integer("head_dim", 2, HEAD_DIM, width // heads)
    kv_heads = config.integer("num_key_value_heads", 1, HEADS, heads)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"num_attention_heads={heads} is no multiple of it")
    return {
        "layers": config.integer("num_hidden_layers", 1, LAYERS),
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary": 0 if rope.share == 1 else int(head_dim * rope.share),
        "ffn": config.integer(ffn, 1, WIDTH * 8),
        "vocab": config.integer("vocab_size", 1, VOCAB),
        "max_length": rope.max_length,
        "rms_eps": config.number("rms_norm_eps", 1e-12, 1e-1),
        "rope_theta": rope.theta,
        "stretch": rope.stretch,
        "qkv_bias": config.flag("attention_bias", qkv_bias),
        "qk_norm": qk_norm,
        "tied_head": config.flag("tie_word_embeddings"),
    }


def names(spec: ModelSpec, body: str = "model.", head: str = TIED) -> dict[str, tuple[str, int]]:
    """Published tensor name -> (parameter of the network, first row). body: the prefix of all but the head."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    table = outer_names(spec, body, head)
    for i in range(spec.layers):
        old, new = f"{body}layers.{i}.", f"layers.{i}."
        table |= {
            old + "self_attn.o_proj.weight": (new + "out.weight", 0),
            old + "mlp.gate_proj.weight": (new + "gate_up.weight", 0),
            old + "mlp.up_proj.weight": (new + "gate_up.weight", spec.ffn),
            old + "mlp.down_proj.weight": (new + "down.weight", 0),
        }
        for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
            for part, row in (("q", 0), ("k", q), ("v", q + kv)):
                table[f"{old}self_attn.{part}_proj.{kind}"] = (f"{new}qkv.{kind}", row)
        if spec.qk_norm:
            table |= {f"{old}self_attn.{part}_norm.weight": (f"{new}{part}_norm", 0) for part in ("q", "k")}
    return table


def outer_names(
    spec: ModelSpec, body: str = "model.", head: str = TIED, embed: str = "embed_tokens"
) -> dict[str, tuple[str, int]]:
    """`names` of the embedding, the norms of all layers and the head."""
    table = {f"{body}{embed}.weight": ("embed.weight", 0), f"{body}norm.weight": ("norm", 0)}
    if not spec.tied_head:
        table[head] = ("head.weight", 0)
    for i in range(spec.layers):
        table[f"{body}layers.{i}.input_layernorm.weight"] = (f"layers.{i}.attn_norm", 0)
        table[f"{body}layers.{i}.post_attention_layernorm.weight"] = (f"layers.{i}.ffn_norm", 0)
    return table


def ffn_names(old: str, new: str, starts: Mapping[str, int], whole: int) -> dict[str, tuple[str, int]]:
    """`names` of a layer's feed-forward whose parts stand one after the other: by rows in the first matrix of our layer
    `new`, by columns in the second.

    old: how the published names begin. starts: how those of a part go on -> its first channel. whole: all inner channels.
    """
    table = {}
    for part, start in starts.items():
        table |= {
            f"{old}{part}gate_proj.weight": (new + "gate_up.weight", start),
            f"{old}{part}up_proj.weight": (new + "gate_up.weight", whole + start),
            f"{old}{part}down_proj.weight": (new + "down.weight.T", start),
        }
    return table


def optional(spec: ModelSpec) -> set[str]:
    """RoPE tables of old checkpoints."""
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(spec.layers)}

# SPDX-License-Identifier: Apache-2.0
"""LLaDA-8B Base and Instruct, LLaDA-1.5: config.json fields, special ids and tensor names as published."""

from __future__ import annotations

from collections.abc import Mapping

from fastdllm.models.files import Fields
from fastdllm.models.spec import HEADS, LAYERS, POSITIONS, VOCAB, WIDTH, Family, ModelSpec, mask_id, pad_id, stop_ids


def read(config: Fields, ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids; `<|eot_id|>` is the Instruct models' second stop."""
    width, heads = config.integer("d_model", 1, WIDTH), config.integer("n_heads", 1, HEADS)
    if width % heads:
        raise config.wrong("n_heads", f"d_model={width} is no multiple of it")
    kv_heads = config.integer("n_kv_heads", 1, HEADS, 1 if config.flag("multi_query_attention") else heads)
    ratio = config.number("mlp_ratio", 0, WIDTH, 4)
    vocab = config.integer("vocab_size", 1, VOCAB, None)
    stops = stop_ids(config, ids, *(() if "eos_token_id" in config else ("<|endoftext|>",)), "<|eot_id|>")
    stops = stops if stops or ids else (126081,)
    return ModelSpec(
        family="llada",
        layers=config.integer("n_layers", 1, LAYERS),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        ffn=config.integer("mlp_hidden_size", 1, WIDTH * 8, int(ratio * width)),
        vocab=config.integer("embedding_size", 1, VOCAB, vocab) or config.integer("vocab_size", 1, VOCAB),
        max_length=config.integer("max_sequence_length", 1, POSITIONS),
        rms_eps=config.number("rms_norm_eps", 1e-12, 1e-1, 1e-5),
        rope_theta=config.number("rope_theta", 2, 1e12, 10000.0),
        qkv_bias=config.flag("include_qkv_bias"),
        tied_head=config.flag("weight_tying"),
        shift=0,
        block_causal=0,
        mask_id=mask_id(config, ids, "<|mdm_mask|>", 126336),
        stop_ids=stops,
        pad_id=pad_id(config, stops, 0),
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


FAMILY = Family(read, names, lambda spec: set(), tied="model.transformer.ff_out.weight")

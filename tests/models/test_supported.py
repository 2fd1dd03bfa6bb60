# SPDX-License-Identifier: Apache-2.0
"""Each published model by a tiny checkpoint with the fields of its config.json, its token list, template and index layout.

Numbers of layers, widths and heads are small and token ids are those of the tiny vocabulary; all else is as published. Where
each comes from stands beside it; what could not be seen is marked "not seen" and follows the model it was made from.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import fastdllm
from fastdllm.models import FAMILIES
from fastdllm.models.supported import SUPPORTED
from fastdllm.prompts import encode
from tests.published_checkpoints import (
    ACTIVE,
    ADDED,
    EXPERTS,
    FFN,
    GROUPED,
    HEADS,
    INNER,
    KV_HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    mask_of,
    special_ids,
    write_checkpoint,
    write_json,
)

# github.com/yinj66/support_basis, LLaDA-8B-Instruct-B&S-light/config.json, a copy of GSAI-ML/LLaDA-8B-Instruct's. The Base's
# is the same file: public loaders check both by one sha256. LLaDA-1.5, d3LLM and dParallel: not seen, the same network.
LLADA = {
    **{"activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"]},
    **{"attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True},
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    **{"bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096},
    **{"embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False},
    **{"include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta"},
    **{"init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms"},
    **{"layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288},
    **{"mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32},
    **{"n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0},
    **{"rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False},
    **{"transformers_version": "4.46.3", "use_cache": False, "vocab_size": 126464, "weight_tying": False},
}
# https://huggingface.co/apple/DiffuCoder-7B-Instruct/blob/69c039ac2cee/config.json, with the ids of DREAM below.
# Of Dream and Dream-Coder: not seen; the shapes are Qwen/Qwen2.5-7B's, the ids those of tests in public engines.
QWEN2_5_7B = {
    **{"attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02},
    **{"intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28},
    **{"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06},
    **{"rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True, "use_mrope": False},
    **{"use_sliding_window": False, "vocab_size": 152064},
}
DREAM = {
    **QWEN2_5_7B,
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    **{"model_type": "Dream", "mask_token_id": 151666, "bos_token_id": 151643, "eos_token_id": 151643},
    "pad_token_id": 151643,
}
# Of the 1.5B: Qwen2.5-1.5B-Instruct's fields and bd_size, tied; eos 151645, the mask in the tokenizer only.
V2 = {
    **QWEN2_5_7B,
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
        "AutoModel": "modeling.Fast_dLLM_QwenModel",
        "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    },
    **{"model_type": "Fast_dLLM_Qwen", "bd_size": 32, "bos_token_id": 151643, "eos_token_id": 151645},
    **{"pad_token_id": 151645, "max_position_embeddings": 32768, "layer_types": ["full_attention"] * LAYERS},
}
# Qwen/Qwen3-8B's config.json with SDAR's names; block_size lacks in some, and the mask stands in the tokenizer.
QWEN3 = {
    **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643},
    **{"head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02},
    **{"intermediate_size": 12288, "max_position_embeddings": 32768, "max_window_layers": 36},
    **{"num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06},
    **{"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.52.3", "use_cache": True, "use_sliding_window": False},
    "vocab_size": 151936,
}
SDAR = {
    **QWEN3,
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    **{"model_type": "sdar", "pad_token_id": 151643, "fuse_cross_entropy": True},
}
# transformers' Qwen3Config of Qwen3-0.6B under A2D's name (github.com/ZHZisZZ/dllm, dllm/pipelines/a2d/convert.py).
A2D = {
    **{**QWEN3, "num_hidden_layers": LAYERS, "tie_word_embeddings": True, "layer_types": ["full_attention"] * LAYERS},
    **{"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3", "eos_token_id": 151645, "dtype": "bfloat16"},
}
A2D_QWEN2 = {
    **{**QWEN2_5_7B, "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645},
    **{"architectures": ["A2DQwen2LMHeadModel"], "model_type": "a2d-qwen2", "layer_types": ["full_attention"] * LAYERS},
}
# Llama with 155,136 rows, theta 5e5, context 8,192 (github.com/hunterbown's port); model_type llama (Diffulex's config).
STABLE_DIFFCODER = {
    **{"architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False},
    "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
    **{"attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "head_dim": 128},
    **{"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336},
    **{"max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8},
    **{"pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000.0},
    **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 155136},
}
# configuration_lladamoe.py has the fields; shapes, rotation and ids: the model card, dInfer and
# public ports. Switches that no source shows are null, as that class has them.
LLADA_MOE = {
    **{"architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None},
    "auto_map": {
        "AutoConfig": "configuration_lladamoe.LLaDAConfig",
        "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
        "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
    },
    **{"dense_intermediate_size": 8192, "eos_token_id": 156892, "expert_intermediate_size": 1024, "hidden_act": "silu"},
    **{"hidden_size": 2048, "initializer_range": 0.02, "max_position_embeddings": 8192, "model_type": "llada"},
    **{"moe_layer_freq": [1] * LAYERS, "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax"},
    **{"norm_topk_prob": None, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
    **{"num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 156892},
    **{"partial_rotary_factor": 1, "qk_layernorm": True, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000},
    **{"routed_scaling_factor": 1, "router_aux_loss_coef": 0.01, "router_num_group": None, "router_topk_group": None},
    **{"shared_expert_intermediate_size": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"transformers_version": "4.53.2", "use_cache": False, "vocab_size": 157184},
}
# https://huggingface.co/inclusionAI/LLaDA2.1-mini/blob/main/config.json up to transformers_version; the fields after it are
# those of github.com/inclusionAI/dFactory, configs/model_configs/llada2_mini/config.json, which has the same others.
# LLaDA2.0-mini: not seen; its configuration_llada2_moe.py has the same fields.
LLADA2 = {
    **{"architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0},
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    **{"dtype": "bfloat16", "embedding_dropout": 0.0, "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu"},
    **{"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120, "max_position_embeddings": 32768},
    **{"max_window_layers": 28, "model_type": "llada2_moe", "moe_intermediate_size": 512},
    **{"moe_router_enable_expert_bias": True, "n_group": 8, "norm_head": False, "norm_softmax": False},
    **{"norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8},
    **{"num_hidden_layers": 20, "num_key_value_heads": 4, "num_shared_experts": 1, "output_dropout": 0.0},
    **{"output_router_logits": False, "pad_token_id": 156892, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06},
    **{"rope_scaling": None, "rope_theta": 600000, "rotary_dim": 64, "routed_scaling_factor": 2.5},
    **{"router_dtype": "fp32", "score_function": "sigmoid", "sliding_window": 4096, "tie_word_embeddings": False},
    **{"topk_group": 4, "transformers_version": "4.57.1", "use_bias": False, "use_cache": False, "use_qkv_bias": False},
    **{"use_rmsnorm": True, "use_sliding_window": False, "using_split_qkv_in_self_attention": False, "vocab_size": 157184},
}
# A public copy of Nemotron-Labs-Diffusion-8B's config.json in full, and a part of the 3B's, which agrees; 14B: not seen.
NEMOTRON = {
    **{"ar_loss_weight": 1.0, "architectures": ["NemotronLabsDiffusionModel"], "attention_bias": False},
    **{"attention_dropout": 0.0, "attn_implementation": "sdpa"},
    "auto_map": {
        "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
        "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
    },
    **{"block_size": 32, "bos_token_id": 1, "dlm_loss_weight": None, "dlm_paradigm": "bidirectional"},
    **{"dp_varying_mask_ratio": False, "eos_token_id": 11, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096},
    **{"initializer_range": 0.02, "intermediate_size": 14336, "mask_token_id": 100, "max_position_embeddings": 262144},
    **{"mlp_bias": False, "model_type": "nemotron_labs_diffusion", "num_attention_heads": 32, "num_hidden_layers": 34},
    **{"num_key_value_heads": 8, "rms_norm_eps": 1e-05},
    "rope_parameters": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0},
        **{"mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0, "rope_type": "yarn"},
    },
    **{"sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "5.0.0"},
    **{"use_cache": False, "vocab_size": 131072},
}
CONFIGS = {"llada": LLADA, "dream": DREAM, "fast_dllm_v2": V2, "sdar": SDAR, "stable_diffcoder": STABLE_DIFFCODER}
CONFIGS["nemotron"] = NEMOTRON
CONFIGS["llada_moe"] = LLADA_MOE
CONFIGS["llada2_moe"] = LLADA2
KINDS = {"fast_dllm_v2": "v2"}
SMALL = {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "mlp_hidden_size": FFN}
SMALL |= {"embedding_size": VOCAB, "max_sequence_length": 256, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
SMALL |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": FFN, "vocab_size": VOCAB}
SMALL |= {"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE, "expert_intermediate_size": INNER}
SMALL |= {"max_position_embeddings": 256, "head_dim": WIDTH // HEADS, "max_window_layers": LAYERS}
FIRST_ID = {
    "llada": 126080,
    "stable_diffcoder": 0,
    "nemotron": 0,
    "llada_moe": 156891,
    "llada2_moe": 156891,
}  # of the added tokens as published; Qwen's begin at 151643


def kind_and_config(model: Any) -> tuple[str, dict[str, Any]]:
    if model.family == "a2d":
        return ("a2d-qwen3", A2D) if "Qwen3" in model.id else ("a2d-qwen2", A2D_QWEN2)
    config = dict(CONFIGS[model.family])
    if "Dream-Coder" in model.id:
        config["bos_token_id"] = 151665
    if "1.5B" in model.id and model.family == "fast_dllm_v2":
        config["tie_word_embeddings"] = True
    return KINDS.get(model.family, model.family), config


def tiny(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The published fields, with the shapes and token ids of the tiny checkpoint."""
    texts, first = list(ADDED[kind]), FIRST_ID.get(kind, 151643)
    out = {k: SMALL.get(k, v) for k, v in config.items()}
    for name in [n for n in out if n.endswith("_token_id") and out[n] is not None]:
        out[name] = special_ids(kind)[texts[out[name] - first]]
    if kind == "llada2_moe":  # 8 experts in groups of two, 3 of which work; half of each head turns
        out |= {"num_experts": GROUPED, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "rotary_dim": 4}
        out |= {"num_hidden_layers": LAYERS + 1, "moe_intermediate_size": INNER}
    if kind == "nemotron":  # the context before YaRN
        out["rope_parameters"] = {**config["rope_parameters"], "original_max_position_embeddings": 128}
    return out


@pytest.mark.parametrize("model", SUPPORTED, ids=lambda m: m.id)
def test_a_published_model_loads_and_answers(tmp_path: Path, model: Any) -> None:
    kind, published = kind_and_config(model)
    config = tiny(published, kind)
    # The index layout of 7B models: several shards named by model.safetensors.index.json.
    write_checkpoint(tmp_path, kind, shards=4, **{k: v for k, v in config.items() if k != "dtype"})
    write_json(tmp_path / "config.json", config)  # these fields and no others
    ids = special_ids(kind)
    write_json(tmp_path / "generation_config.json", {"_from_model_config": True, "eos_token_id": config.get("eos_token_id")})
    if "DiffuCoder" in model.id and "Base" not in model.id:  # a 25th added token, of 681 bytes in added_tokens.json
        new = max(ids.values()) + 1
        listed = json.loads((tmp_path / "added_tokens.json").read_text())
        write_json(tmp_path / "added_tokens.json", {"<|dlm_pad|>": new, **listed})
        named = json.loads((tmp_path / "tokenizer_config.json").read_text())
        named["added_tokens_decoder"][str(new)] = {"content": "<|dlm_pad|>", "special": True}
        write_json(tmp_path / "tokenizer_config.json", {**named, "pad_token": "<|dlm_pad|>"})
    options = {"block_size": 32} if "block_size" in model.options else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no published field is unknown
        loaded = fastdllm.load(str(tmp_path), device="cpu", **options)
    assert loaded.spec.family == model.family and loaded.tokenizer.decode([loaded.spec.mask_id]) == mask_of(kind)
    assert {"llada": 0, "dream": 1, "fast_dllm_v2": 1}.get(model.family, 0) == loaded.spec.shift
    assert loaded.spec.block_causal == {"fast_dllm_v2": 32, "sdar": 4, "stable_diffcoder": 4, "llada2_moe": 32}.get(
        model.family, options.get("block_size", 0)
    )
    if "DiffuCoder-7B-I" in model.id:
        assert loaded.tokenizer.convert_tokens_to_ids("<|dlm_pad|>") in loaded.spec.stop_ids
    (prompt,) = encode(loaded, [[{"role": "user", "content": "Tom has 12 apples"}]])
    assert "Tom has 12 apples" in loaded.tokenizer.decode(prompt)
    size = loaded.spec.block_causal or 8
    out = fastdllm.generate(loaded, [prompt], gen_length=8, block_length=size, small_block_size=min(8, size))
    assert not (out.sequences[0] == loaded.spec.mask_id).any()


def test_each_family_has_a_published_model() -> None:
    assert {m.family for m in SUPPORTED} == set(FAMILIES.values())
    assert len({m.id for m in SUPPORTED}) == len(SUPPORTED)

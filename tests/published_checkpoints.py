# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints in exactly the published formats: config.json, tensor names, tokenizer files, chat templates."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

LAYERS, WIDTH, HEADS, KV_HEADS, FFN = 2, 32, 4, 2, 48
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Tom has 12 apples and 345 pears; it's 7 more.",
    "naïve café\n\n  x = y\t+ 1",
]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLADA_TEMPLATE = (
    "{% for m in messages %}{{ '<|startoftext|>' if loop.first }}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# LLaDA-MoE and LLaDA2.x write roles in capitals; LLaDA2.x always begins with what the system says of thinking
# (https://huggingface.co/inclusionAI/LLaDA2.1-flash/blob/main/tokenizer_config.json, without its part about tools).
ROLES_TEMPLATE = (
    "{% for m in messages %}<role>{{ {'system': 'SYSTEM', 'user': 'HUMAN'}.get(m['role'], 'ASSISTANT') }}</role>"
    "{{ m['content'] }}<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
THINKING_TEMPLATE = (
    "<role>SYSTEM</role>{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n' }}{% endif %}"
    "detailed thinking off<|role_end|>"
    + ROLES_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
)
TEMPLATES = {"llada": LLADA_TEMPLATE, "llada_moe": ROLES_TEMPLATE, "llada2_moe": THINKING_TEMPLATE}
# Added tokens as published, in the order of their ids; True is "special" in tokenizer_config.json.
# Qwen2.5's 22, ids 151643 to 151664: https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/tokenizer_config.json
QWEN2_5 = {
    **dict.fromkeys(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"), True),
    **dict.fromkeys(("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"), True),
    **dict.fromkeys(("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"), True),
    **dict.fromkeys(("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), False),
    **dict.fromkeys(("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"), False),
}
# LLaDA's 269, ids 126080 to 126348: tokenizer_config.json of GSAI-ML/LLaDA-8B-Instruct, of which
# https://github.com/yinj66/support_basis (folder LLaDA-8B-Instruct-B&S-light) has a copy.
RESERVED = [f"<|reserved_token_{i}|>" if i != 252 else "<|mdm_mask|>" for i in range(256)]
LLADA = dict.fromkeys(
    [
        *("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", *RESERVED, "<role>", "</role>"),
        *("<|arithmetic_start|>", "<|arithmetic_end|>", "<|number_start|>", "<|number_end|>"),
        *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ],
    True,
)
ADDED: dict[str, dict[str, bool]] = {
    "llada": LLADA,
    # 151665 and 151666: added_tokens.json of Dream-org/Dream-v0-Base-7B (151666 is its config.json's mask_token_id).
    "dream": {**QWEN2_5, "<|beginoftext|>": True, "<|mask|>": True},
    # 151665: added_tokens.json of Efficient-Large-Model/Fast_dLLM_v2_1.5B.
    "v2": {**QWEN2_5, "|<MASK>|": True},
}
# Qwen3 adds four plain tokens, 151665 to 151668: https://huggingface.co/Qwen/Qwen3-8B/blob/main/tokenizer_config.json
QWEN3 = {**QWEN2_5, **dict.fromkeys(("<tool_response>", "</tool_response>", "<think>", "</think>"), False)}
# The 256 control tokens of Llama 3, from 128000 on, of which these have names (tokenizer_config.json of Llama-3.2-1B).
LLAMA3_NAMED = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id", 7: "end_header_id"}
LLAMA3_NAMED |= {8: "eom_id", 9: "eot_id", 10: "python_tag"}
LLAMA3 = dict.fromkeys((f"<|{LLAMA3_NAMED.get(i, f'reserved_special_token_{i}')}|>" for i in range(256)), True)
ADDED |= {
    "sdar": {**QWEN3, "<|MASK|>": True},  # 151669: SGLang's srt/dllm/config.py names it for SDARForCausalLM
    "a2d-qwen3": {**QWEN3, "<|mask|>": True},  # dllm adds its mask behind the base model's tokens
    "a2d-qwen2": {**QWEN2_5, "<|mask|>": True},
    "a2d-llama": {**LLAMA3, "<|mask|>": True},
    # The first six; of the mask, 5: github.com/hunterbown's and Diffulex's tests of Stable-DiffCoder-8B-Instruct.
    "stable_diffcoder": dict.fromkeys(
        ["<[begin]>", "<[pad]>", "<[end▁of▁sentence]>", "<[3]>", "<[4]>", "<[MASK_TOKEN]>"], True
    ),
    "nemotron": dict.fromkeys((f"<SPECIAL_{i}>" for i in range(128)), True),  # mask 100, end 11, in Mistral's tekken
}
# Ids 156891 to 156900 of inclusionAI/LLaDA-MoE-7B-A1B-Instruct: end of text 156892, mask 156895, end of a turn 156900 (its
# model card and dInfer); the others are not seen.
ADDED["llada_moe"] = dict.fromkeys(
    [
        *("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mask|>"),
        *("<|reserved_token_1|>", "<|reserved_token_2|>", "<role>", "</role>", "<|role_end|>"),
    ],
    True,
)
ADDED["llada2_moe"] = ADDED["llada_moe"]  # the mask and the ends have the same ids (SGLang's srt/dllm/config.py, model card)
EXPERTS, ACTIVE, INNER = 6, 2, 16  # of a layer, of a token, channels of one
GROUPED = 8  # experts of a layer of LLaDA2.x, in groups of two
FIRST = ("stable_diffcoder", "nemotron")  # their control tokens come before the words
VOCAB = 640  # embedding rows: the byte pairs, LLaDA's added tokens and some that no token uses


@cache
def byte_pairs() -> tuple[dict[str, int], list[str]]:
    """A byte-level vocabulary with a few merges: vocab.json and the lines of merges.txt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]


def special_ids(family: str) -> dict[str, int]:
    """Every added token of the family, special or not -> its id here, behind the byte pairs (in some before them)."""
    first = 0 if family in FIRST else len(byte_pairs()[0])
    return {t: first + i for i, t in enumerate(ADDED[family])}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_tokenizer(folder: Path, family: str) -> None:
    vocab, merges = byte_pairs()
    ids = special_ids(family)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    mask = mask_of(family)
    config = {
        "added_tokens_decoder": {str(i): {"content": t, **flags, "special": ADDED[family][t]} for t, i in ids.items()},
        "bos_token": "<|startoftext|>" if family == "llada" else None,
        "chat_template": TEMPLATES.get(family, CHATML),
        "eos_token": end_of(family),
        "pad_token": end_of(family),
    }
    write_json(folder / "tokenizer_config.json", config)
    if family != "llada":
        write_json(folder / "added_tokens.json", dict(sorted(ids.items())))  # by text, as transformers writes it
        write_json(folder / "special_tokens_map.json", {"mask_token": {"content": mask, **flags}})
    if family == "dream":
        write_json(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        return
    if family in FIRST:
        vocab = {**ids, **{t: i + len(ids) for t, i in vocab.items()}}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for text, special in ADDED[family].items():
        tokenizer.add_special_tokens([text]) if special else tokenizer.add_tokens([text])
    tokenizer.save(str(folder / "tokenizer.json"))


def end_of(family: str) -> str:
    """The text of the token that ends a text."""
    own = {"a2d-llama": "<|end_of_text|>", "stable_diffcoder": "<[end▁of▁sentence]>", "nemotron": "<SPECIAL_11>"}
    return own.get(family, "<|endoftext|>")


def mask_of(family: str) -> str:
    """The text of the family's mask."""
    return {
        "llada": "<|mdm_mask|>",
        "v2": "|<MASK>|",
        "sdar": "<|MASK|>",
        "stable_diffcoder": "<[MASK_TOKEN]>",
        "nemotron": "<SPECIAL_100>",
    }.get(family, "<|mask|>")


def llada_config(**changes: Any) -> dict[str, Any]:
    ids = special_ids("llada")
    return {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": WIDTH,
        "embedding_size": VOCAB,
        "eos_token_id": ids["<|endoftext|>"],
        "include_bias": False,
        "include_qkv_bias": False,
        "layer_norm_type": "rms",
        "mask_token_id": ids["<|mdm_mask|>"],
        "max_sequence_length": 256,
        "mlp_hidden_size": FFN,
        "mlp_ratio": 4,
        "model_type": "llada",
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "n_layers": LAYERS,
        "pad_token_id": ids["<|endoftext|>"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": VOCAB,
        "weight_tying": False,
        **changes,
    }


def own_fields(family: str, ids: dict[str, int]) -> dict[str, Any]:
    """What a family's config.json has beside the fields that all in transformers' layout share."""
    if family == "dream":
        return {"model_type": "Dream", "mask_token_id": ids["<|mask|>"], "architectures": ["DreamModel"]}
    if family == "v2":
        return {"model_type": "Fast_dLLM_Qwen", "bd_size": 8, "architectures": ["Fast_dLLM_QwenForCausalLM"]}
    plain = {"attention_bias": False, "head_dim": 16}  # not width / heads, as in Qwen3
    if family == "sdar":
        return {**plain, "model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 4}
    if family == "a2d-qwen2":
        return {"model_type": family, "architectures": ["A2DQwen2LMHeadModel"]}
    if family == "llada_moe":
        own = {"architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "moe_layer_freq": [1] * LAYERS}
        own |= {"attention_bias": False, "qk_layernorm": True, "norm_topk_prob": None, "moe_router_score_function": None}
        own |= {"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE, "expert_intermediate_size": INNER}
        own |= {
            "intermediate_size": None,
            "dense_intermediate_size": 96,
            "shared_expert_intermediate_size": None,
            "routed_scaling_factor": 1,
        }
        return own | {"partial_rotary_factor": 1.0, "router_aux_loss_coef": 0.01, "output_router_logits": False}
    if family == "llada2_moe":
        own = {"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "num_shared_experts": 1, "head_dim": 16}
        own |= {"num_experts": GROUPED, "num_experts_per_tok": 3, "moe_intermediate_size": INNER, "n_group": 4}
        own |= {"topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "partial_rotary_factor": 0.5}
        own |= {"moe_router_enable_expert_bias": True, "score_function": "sigmoid", "norm_topk_prob": True}
        return own | {"use_bias": False, "use_qkv_bias": False, "num_hidden_layers": LAYERS + 1, "eos_token_id": None}
    if family == "nemotron":  # the defaults of configuration_nemotron_labs_diffusion.py
        rope = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128, "beta_fast": 32.0}
        rope |= {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "rope_theta": 10000.0}
        fields = {"mlp_bias": False, "block_size": 32, "dlm_paradigm": "bidirectional", "ar_loss_weight": 1.0}
        own = {"model_type": "nemotron_labs_diffusion", "mask_token_id": ids["<SPECIAL_100>"], "rope_parameters": rope}
        return {**plain, **fields, **own, "architectures": ["NemotronLabsDiffusionModel"]}
    if family == "stable_diffcoder":
        return {
            "model_type": "llama",
            "architectures": ["StableDiffcoderForCausalLM"],
            "attention_bias": False,
            "mlp_bias": False,
        }
    kind = family.removeprefix("a2d-").capitalize()
    return {**plain, "model_type": family, "architectures": [f"A2D{kind}LMHeadModel"]}


def qwen2_config(family: str, style: int = 4, **changes: Any) -> dict[str, Any]:
    """style: the major version of transformers that wrote the file; 5 nests RoPE's base in rope_parameters."""
    ids = special_ids(family)
    rope = {"rope_theta": 10000.0, "rope_scaling": None}
    if style == 5:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    own = own_fields(family, ids)
    return {
        "attention_dropout": 0.0,
        "bos_token_id": ids[end_of(family)],
        "eos_token_id": ids["<|im_end|>" if family == "v2" else end_of(family)],
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "max_position_embeddings": 256,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "pad_token_id": ids[end_of(family)],
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
        **rope,
        **own,
        **changes,
    }


def qwen2_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors by published name; small, so that deep products stay tame."""
    c, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    d = config.get("head_dim") or c // config["num_attention_heads"]
    q, kv = d * config["num_attention_heads"], d * config["num_key_value_heads"]
    nemotron = config["model_type"] == "nemotron_labs_diffusion"
    body, head = ("encoder.", "diffusion_head.weight") if nemotron else ("model.", "lm_head.weight")
    shapes: dict[str, tuple[int, ...]] = {f"{body}embed_tokens.weight": (v, c), f"{body}norm.weight": (c,)}
    if not config["tie_word_embeddings"]:
        shapes[head] = (v, c)
    for i in range(config["num_hidden_layers"]):
        p = f"{body}layers.{i}."
        shapes |= {p + "input_layernorm.weight": (c,), p + "post_attention_layernorm.weight": (c,)}
        shapes |= {p + f"self_attn.{n}_proj.weight": (s, c) for n, s in (("q", q), ("k", kv), ("v", kv))}
        shapes[p + "self_attn.o_proj.weight"] = (c, q)
        if config.get("attention_bias", True):
            shapes |= {p + f"self_attn.{n}_proj.bias": (s,) for n, s in (("q", q), ("k", kv), ("v", kv))}
        if config["model_type"] in ("sdar", "a2d-qwen3") or config.get("qk_layernorm"):
            shapes |= {p + f"self_attn.{n}_norm.weight": (d,) for n in "qk"}
        inner, parts = f, ["mlp."]
        if experts := config.get("num_experts", 0):
            inner, parts = config["expert_intermediate_size"], [f"mlp.experts.{e}." for e in range(experts)]
            shapes[p + "mlp.gate.weight"] = (experts, c)
        for part in (p + part for part in parts):
            shapes |= {part + "gate_proj.weight": (inner, c), part + "up_proj.weight": (inner, c)}
            shapes[part + "down_proj.weight"] = (c, inner)
    return _random(shapes)


def llada2_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of modeling_llada2_moe.py; the biases that choose experts are of some size, so that they matter."""
    c, v, d = config["hidden_size"], config["vocab_size"], config["head_dim"]
    qkv, inner = d * (config["num_attention_heads"] + 2 * config["num_key_value_heads"]), config["moe_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (v, c), "model.norm.weight": (c,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, c)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (c,), p + "post_attention_layernorm.weight": (c,)}
        shapes |= {p + f"attention.{n}_layernorm.weight": (d,) for n in ("query", "key")}
        shapes[p + "attention.query_key_value.weight"] = (qkv, c)
        if config["use_qkv_bias"]:
            shapes[p + "attention.query_key_value.bias"] = (qkv,)
        shapes[p + "attention.dense.weight"] = (c, d * config["num_attention_heads"])
        parts = {"mlp.": config["intermediate_size"]}
        if i >= config["first_k_dense_replace"]:
            parts = {f"mlp.experts.{e}.": inner for e in range(config["num_experts"])}
            if shared := config["num_shared_experts"]:
                parts["mlp.shared_experts."] = inner * shared
            shapes |= {
                p + "mlp.gate.weight": (config["num_experts"], c),
                p + "mlp.gate.expert_bias": (config["num_experts"],),
            }
        for part, width in parts.items():
            shapes |= {p + part + f"{n}_proj.weight": (width, c) for n in ("gate", "up")}
            shapes[p + part + "down_proj.weight"] = (c, width)
    return _random(shapes)


def llada_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    c, f, v = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv = c // config["n_heads"] * config["n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.transformer.wte.weight": (v, c), "model.transformer.ln_f.weight": (c,)}
    if not config["weight_tying"]:
        shapes["model.transformer.ff_out.weight"] = (v, c)
    for i in range(config["n_layers"]):
        p = f"model.transformer.blocks.{i}."
        shapes |= {p + "attn_norm.weight": (c,), p + "ff_norm.weight": (c,)}
        projections = {"q": (c, c), "k": (kv, c), "v": (kv, c)}
        shapes |= {p + f"{n}_proj.weight": s for n, s in projections.items()}
        shapes |= {p + "attn_out.weight": (c, c), p + "ff_proj.weight": (f, c), p + "up_proj.weight": (f, c)}
        shapes |= {p + "ff_out.weight": (c, f)}
        if config["include_qkv_bias"]:
            shapes |= {p + f"{n}_proj.bias": s[:1] for n, s in projections.items()}
    return _random(shapes)


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        n: torch.randn(s) * 0.2 + (1.0 if n.endswith(("norm.weight", "ln_f.weight")) else 0.0) for n, s in shapes.items()
    }


def write_checkpoint(
    folder: Path,
    family: str,
    *,
    shards: int = 1,
    style: int = 4,
    tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> dict[str, Tensor]:
    """A checkpoint folder of one of `ADDED`; returns its tensors. `changes`: fields of config.json."""
    folder.mkdir(parents=True, exist_ok=True)

    def described(**fields: Any) -> dict[str, Any]:
        return llada_config(**fields) if family == "llada" else qwen2_config(family, style, **fields)

    write_json(folder / "config.json", described(**changes))
    if tokenizer:
        write_tokenizer(folder, family)
    # Whatever the changes call it, the tensors are those of the family: a new one may have the network of another.
    config = described(**{name: value for name, value in changes.items() if name not in ("model_type", "architectures")})
    tensors = {"llada": llada_tensors, "llada2_moe": llada2_tensors}.get(family, qwen2_tensors)(config)
    stored = {n: t.to(dtype) for n, t in tensors.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    where = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(stored.items())[i::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    size = sum(t.nbytes for t in stored.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    return tensors


def write_adapter(
    folder: Path, shapes: dict[str, tuple[int, ...]], modules: list[str], rank: int = 4, **changes: Any
) -> None:
    """A LoRA adapter as peft saves it, with random pairs. shapes: of the base model's tensors; modules: their names without
    "weight"; changes: to adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in modules:
        out, into = shapes[f"{name}.weight"]
        r = changes.get("rank_pattern", {}).get(name.rsplit(".", 1)[-1], rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, into)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, r) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "x/y"}
    config |= {
        "target_modules": sorted({m.rsplit(".", 1)[-1] for m in modules}),
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.1,
    }
    write_json(folder / "adapter_config.json", {**config, **changes})

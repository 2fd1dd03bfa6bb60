# SPDX-License-Identifier: Apache-2.0
"""The published file formats that the tiny checkpoints are written in: config.json, tokenizer files, templates, tensors.

All families share the byte-pair merges of tiny-llada's tokenizer; each puts them into the files, the split of words
and the special tokens that its published checkpoints have.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from fastdllm import whole
from fastdllm.models import dream, fast_dllm_v2, llada, qwen2
from fastdllm.models.spec import Family, ModelSpec
from fastdllm.models.tokenizer import load_tokenizer, special_ids

SYSTEM = "You are a helpful assistant."
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLADA_SPECIAL = 5  # tiny-llada's special tokens come first, the other families' last
QWEN2_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS = {
    "dream": [*QWEN2_TOKENS, "<|beginoftext|>", "<|mask|>"],
    "qwen": [*QWEN2_TOKENS, "|<MASK>|"],
    "v2": [*QWEN2_TOKENS, "|<MASK>|"],
}
# What a tokenizer does to the tokens of a text, or of two, after it has found them: nothing.
AS_THEY_ARE: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
END_OF_TURN = {"llada": "<|eos|>", "dream": "<|im_end|>", "qwen": "<|im_end|>\n", "v2": "<|im_end|>\n"}
END_OF_TEXT = {"llada": "<|eos|>", "dream": "<|endoftext|>", "qwen": "<|im_end|>", "v2": "<|im_end|>"}
# What a warm start from another family takes a special token's embedding from: the first that it has.
SAME_ROLE = {
    "<|endoftext|>": ("<|eos|>",),
    "<|im_end|>": ("<|eos|>",),
    "<|im_start|>": ("<|user|>",),
    "<|beginoftext|>": ("<|pad|>", "<|endoftext|>"),
    "<|mask|>": ("|<MASK>|",),
    "<|eos|>": ("<|im_end|>",),
    "<|pad|>": ("<|endoftext|>",),
    "<|user|>": ("<|im_start|>",),
    "<|assistant|>": ("<|im_start|>",),
}


def qwen2_config(special: list[str], first: int, **changes: Any) -> dict[str, Any]:
    ids = {token: first + i for i, token in enumerate(special)}
    return {
        "hidden_size": 256,
        "intermediate_size": 576,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "vocab_size": 2048,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 8,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        **changes,
    }


def config_for(family: str, vocab: int) -> dict[str, Any]:
    """config.json of a new checkpoint; `vocab` counts the byte-pair tokens, special tokens follow them."""
    special = SPECIAL_TOKENS[family]
    if family == "dream":
        classes = {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        }
        return qwen2_config(
            special,
            vocab,
            architectures=["DreamModel"],
            auto_map=classes,
            model_type="Dream",
            mask_token_id=vocab + 4,
            eos_token_id=vocab,
        )
    if family == "qwen":
        return qwen2_config(special, vocab, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    classes = {
        "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
        "AutoModel": "modeling.Fast_dLLM_QwenForCausalLM",
        "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    }
    return qwen2_config(
        special,
        vocab,
        architectures=["Fast_dLLM_QwenForCausalLM"],
        auto_map=classes,
        model_type="Fast_dLLM_Qwen",
        bd_size=32,
        pad_token_id=vocab + 2,
    )


def write_json(path: Path, value: Any) -> None:
    whole.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tokenizer(family: str, folder: Path, tiny_llada: Path) -> int:
    """Tokenizer files of a Qwen2-like family, from tiny-llada's merges. Returns the number of byte-pair tokens."""
    model = json.loads((tiny_llada / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab = {t: i - LLADA_SPECIAL for t, i in model["vocab"].items() if i >= LLADA_SPECIAL}
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    whole.write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    whole.write_text(folder / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    ids = {token: len(vocab) + i for i, token in enumerate(SPECIAL_TOKENS[family])}
    write_json(folder / "added_tokens.json", ids)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if family == "dream":
        named = {"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}
        named["pad_token"] = "<|endoftext|>"
    elif family == "v2":
        named["mask_token"] = "|<MASK>|"
    config: dict[str, Any] = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": t, **flags} for t, i in ids.items()},
        "additional_special_tokens": [t for t in ids if t not in named.values()],
        "bos_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 512,
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer" if family == "dream" else "Qwen2Tokenizer",
        "unk_token": None,
        **named,
    }
    if family == "dream":
        config["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", named)
    if family != "dream":
        written = json.loads(backend(folder).to_str())
        for token in written["added_tokens"]:  # the loader keeps their ids there; the published file lists them once
            written["model"]["vocab"].pop(token["content"], None)
        written["post_processor"] = AS_THEY_ARE  # transformers before 5 has none there, which means the same
        whole.write_text(folder / "tokenizer.json", json.dumps(written, indent=2, ensure_ascii=False))
    return len(vocab)


def create(family: str, folder: Path, tiny_llada: Path) -> None:
    """A new checkpoint folder without weights; tiny-llada's files are only ever copied, byte for byte."""
    folder.mkdir(parents=True, exist_ok=True)
    if family == "llada":
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(tiny_llada / name, folder / name)
        return
    write_json(folder / "config.json", config_for(family, write_tokenizer(family, folder, tiny_llada)))


def qwen2_spec(config: Mapping[str, Any], ids: Mapping[str, int]) -> ModelSpec:
    """Qwen2 read as a member of the core's families: causal attention is the trainer's business."""
    return replace(fast_dllm_v2.FAMILY.spec(config, ids), family="qwen2", block_causal=0)


FAMILIES = {
    "llada": llada.FAMILY,
    "dream": dream.FAMILY,
    "qwen": Family(qwen2_spec, qwen2.names, qwen2.optional),
    "v2": fast_dllm_v2.FAMILY,
}


def backend(folder: Path) -> Tokenizer:
    """The folder's tokenizer as the library that trains and saves it has it."""
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None, folder
    return tokenizer.backend_tokenizer


def read(family: str, folder: Path) -> tuple[ModelSpec, Tokenizer]:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None, folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return FAMILIES[family].spec(config, special_ids(tokenizer)), tokenizer.backend_tokenizer


def family_of(folder: Path) -> str:
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    return {"llada": "llada", "Dream": "dream", "qwen2": "qwen", "Fast_dLLM_Qwen": "v2"}[kind]


def expected_shapes(family: str, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every published tensor."""
    q, kv, c, f = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.width, spec.ffn
    rows = {("qkv", 0): q, ("qkv", q): kv, ("qkv", q + kv): kv, ("out", 0): c, ("gate_up", 0): f}
    rows |= {("gate_up", f): f, ("down", 0): c, ("embed", 0): spec.vocab}
    columns = {"qkv": c, "out": q, "gate_up": c, "down": f, "embed": c}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (target, row) in FAMILIES[family].names(spec).items():
        part = target.split(".")[-2] if target.endswith((".weight", ".bias")) else ""
        if not part:
            shapes[name] = (c,)
        else:
            shapes[name] = (rows[part, row],) if target.endswith(".bias") else (rows[part, row], columns[part])
    return shapes


def load_published(family: str, folder: Path, spec: ModelSpec, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """fp32 tensors under `family`'s published names, from a checkpoint of the same or of another family.

    From another family: tensors are matched by what they fill in the core's network, embedding rows by token text, biases
    that the source lacks are zero, and keys and values that it has for a group of heads are repeated for each of them.
    """
    source = family_of(folder)
    tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    source_spec, source_tokenizer = read(source, folder)
    if source == family:
        return tensors
    if (source, family) == ("qwen", "v2"):
        embed = tensors["model.embed_tokens.weight"]  # the parent never saw the mask: start it in the middle
        embed[spec.mask_id] = embed[: spec.mask_id].mean(0)
        return tensors
    parts = parts_of(source, source_spec)
    filled = {parts[name]: tensor for name, tensor in tensors.items()}
    vocab = source_tokenizer.get_vocab()
    embed = filled["embed.weight", 0].clone()
    for text, row in tokenizer.get_vocab().items():
        known = [vocab[name] for name in (text, *SAME_ROLE.get(text, ())) if name in vocab]
        embed[row] = filled["embed.weight", 0][known[0] if known else 0]
    filled["embed.weight", 0] = embed
    shapes, start = expected_shapes(family, spec), {}
    for name, part in parts_of(family, spec).items():
        tensor = filled.get(part, torch.zeros(shapes[name]))
        if len(tensor) != shapes[name][0]:
            heads = tensor.view(source_spec.kv_heads, spec.head_dim, -1)
            tensor = heads.repeat_interleave(spec.kv_heads // source_spec.kv_heads, 0).reshape(shapes[name])
        start[name] = tensor
    return start


def parts_of(family: str, spec: ModelSpec) -> dict[str, tuple[str, int]]:
    """Published tensor name -> (parameter of the core's network, which of the tensors that fill it, from the top)."""
    places: dict[str, list[tuple[int, str]]] = {}
    for name, (target, row) in FAMILIES[family].names(spec).items():
        places.setdefault(target, []).append((row, name))
    return {name: (target, i) for target, rows in places.items() for i, (_, name) in enumerate(sorted(rows))}


def save(folder: Path, files: Path, tensors: dict[str, Tensor]) -> None:
    """Write a whole checkpoint, or nothing: the folder appears (or is replaced) when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(files, partial)
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in tensors.items()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)

# SPDX-License-Identifier: Apache-2.0
"""Where training starts and what it leaves: Qwen2 or Fast-dLLM v2 folders in, Fast-dLLM v2 folders out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from fastdllm.models import find_folder
from fastdllm.models.tokenizer import load_tokenizer
from fastdllm.training.model import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM

MASK_TOKEN = "|<MASK>|"
MODEL_TYPES = ("qwen2", Fast_dLLM_QwenConfig.model_type)
# Rewritten on saving; what an older library or another class wrote there must not be carried along.
OWN_FIELDS = {"model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype"}


def read_config(folder: Path, block: int | None) -> Fast_dLLM_QwenConfig:
    """The folder's configuration with `block` tokens a block; None keeps the checkpoint's, 32 for plain Qwen2."""
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = fields.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{folder}: model_type={kind!r} cannot be trained; allowed are {', '.join(MODEL_TYPES)}")
    if fields.get("use_sliding_window"):
        raise ValueError(f"{folder}: use_sliding_window=true is not supported; block diffusion attends to all")
    if block is not None and block < 1:
        raise ValueError(f"bd_size={block} must be at least 1")
    size = block or fields.get("bd_size", 32)
    kept = {name: value for name, value in fields.items() if name not in OWN_FIELDS}
    if kept.get("rope_scaling") is None:
        kept.pop("rope_scaling", None)  # published as null; transformers 5 warns at the mere name
    return Fast_dLLM_QwenConfig(**{**kept, "bd_size": size})


def load_for_training(
    name: str,
    block: int | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> tuple[Fast_dLLM_QwenForCausalLM, PreTrainedTokenizerFast]:
    """Load a Qwen2 or Fast-dLLM v2 checkpoint: a shipped name, a folder or a hub id.

    `|<MASK>|` takes the tokenizer's first free id unless it has one; the embedding grows only when no row is left
    for it, as Qwen2.5's does not. attention: "sdpa" or "flex_attention", which has no backward on a CPU.
    """
    folder = find_folder(name)
    config = read_config(folder, block)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise FileNotFoundError(f"{folder}: no tokenizer.json, nor vocab.json with merges.txt")
    if MASK_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(MASK_TOKEN, special=True, normalized=False)], special_tokens=True)
    config.mask_token_id = tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    model = Fast_dLLM_QwenForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
    )
    if config.mask_token_id >= config.vocab_size:
        model.resize_token_embeddings(config.mask_token_id + 1)
    return model, tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer files that transformers 4 and 5 both read.

    Version 5 names a class and a list of special tokens that version 4 does not know.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields.pop("backend", None)
    if isinstance(extra := fields.pop("extra_special_tokens", None), list):
        fields["additional_special_tokens"] = extra
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")

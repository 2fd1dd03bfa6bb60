# SPDX-License-Identifier: Apache-2.0
"""Dream-v0 Base and Instruct 7B, Dream-Coder, DiffuCoder: Qwen2's network, read both ways, with a right shift of one."""

from __future__ import annotations

from collections.abc import Mapping

from fastdllm.models import qwen2
from fastdllm.models.files import Fields
from fastdllm.models.spec import Family, ModelSpec, mask_id, pad_id, stop_ids


def read(config: Fields, ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids."""
    # Dream-reasoner has Dream's model_type, another class, no shift, and norms on queries and keys.
    if "block_size" in config or "DreamForCausalLM" in config.names("architectures"):
        name = "block_size" if "block_size" in config else "architectures"
        raise config.wrong(name, "this is Dream-reasoner (blocks, no token shift), which is not supported")
    # DiffuCoder pads what follows an answer with a token of its own.
    stops = stop_ids(config, ids, "<|im_end|>", "<|endoftext|>", "<|dlm_pad|>")
    return ModelSpec(
        family="dream",
        **qwen2.shapes(config),
        shift=1,
        block_causal=0,
        mask_id=mask_id(config, ids, "<|mask|>", 151666),
        stop_ids=stops,
        pad_id=pad_id(config, stops, 0),
        defaults={"cache": "dual", "schedule": "timesteps"},
    )


FAMILY = Family(read, qwen2.names, qwen2.optional, tied=qwen2.TIED)

# SPDX-License-Identifier: Apache-2.0
"""A2D of dllm-hub: Qwen3, Qwen2 or Llama read in both directions (mdlm) or in blocks (bd3lm), without a token shift.

The config.json of both kinds is the same; `block_size`, in it or as an option of `load`, makes it bd3lm. Its published
sampler pads prompts on the left up to whole blocks, and hides the padding: blocks are counted from the prompt's end.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastdllm.models import qwen2
from fastdllm.models.files import Fields
from fastdllm.models.spec import Family, ModelSpec, mask_id, pad_id, stop_ids


def read(config: Fields, ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids; the mask is published in the tokenizer only."""
    base = config.text("model_type").removeprefix("a2d-")
    kinds = ("default", "linear", "llama3", "yarn")
    shapes = qwen2.shapes(config, qkv_bias=base == "qwen2", qk_norm=base == "qwen3", rope_kinds=kinds)
    size = config.integer("block_size", 0, shapes["max_length"], 0)
    stops = stop_ids(config, ids, "<|im_end|>", "<|endoftext|>", "<|eot_id|>")
    defaults = {"cache": "block", "block_length": size, "small_block_size": size} if size else {"cache": "dual"}
    return ModelSpec(
        family="a2d",
        **shapes,
        shift=0,
        block_causal=size,
        grid_at_prompt=bool(size),
        mask_id=mask_id(config, ids, "<|mask|>", 151669),
        stop_ids=stops,
        pad_id=pad_id(config, stops, 0),
        defaults={**defaults, "schedule": "even"},
    )


FAMILY = Family(read, qwen2.names, qwen2.optional, tied=qwen2.TIED, block_field="block_size")

# SPDX-License-Identifier: Apache-2.0
"""SDAR 1.7B, 4B, 8B and TraDo 4B, 8B: Qwen3's network, block-causal from position 0, no token shift (arXiv 2510.06303)."""

from __future__ import annotations

from collections.abc import Mapping

from fastdllm.models import qwen2
from fastdllm.models.files import Fields
from fastdllm.models.spec import Family, ModelSpec, mask_id, pad_id, stop_ids


def read(config: Fields, ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids; the mask is often published in the tokenizer only."""
    shapes = qwen2.shapes(config, qkv_bias=False, qk_norm=True)
    size = config.integer("block_size", 1, shapes["max_length"], 4)
    stops = stop_ids(config, ids, "<|im_end|>", "<|endoftext|>")
    return ModelSpec(
        family="sdar",
        **shapes,
        shift=0,
        block_causal=size,
        mask_id=mask_id(config, ids, "<|MASK|>", 151669),
        stop_ids=stops,
        pad_id=pad_id(config, stops, 0),
        defaults={"cache": "block", "block_length": size, "strict": True, "schedule": "even", "small_block_size": size},
    )


HARMLESS = frozenset(
    {"debug", "ep_size", "micro_forward", "skip_checkpoint", "use_deepep", "use_regular_causal", "fuse_linear"}
)
FAMILY = Family(read, qwen2.names, qwen2.optional, tied=qwen2.TIED, harmless=HARMLESS, block_field="block_size")

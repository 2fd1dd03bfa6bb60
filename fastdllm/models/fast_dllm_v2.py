# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2 1.5B and 7B: Qwen2's network under a block-causal mask, with a right shift of one (arXiv 2509.26328)."""

from __future__ import annotations

from collections.abc import Mapping

from fastdllm.models import qwen2
from fastdllm.models.files import Fields
from fastdllm.models.spec import Family, ModelSpec, mask_id, pad_id, stop_ids


def read(config: Fields, ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids; the mask is published in the tokenizer only."""
    shapes = qwen2.shapes(config)
    size = config.integer("bd_size", 1, shapes["max_length"], 32)
    stops = stop_ids(config, ids, "<|im_end|>", "<|endoftext|>")
    return ModelSpec(
        family="fast_dllm_v2",
        **shapes,
        shift=1,
        block_causal=size,
        mask_id=mask_id(config, ids, "|<MASK>|", 151665),
        stop_ids=stops,
        pad_id=ids.get("<|endoftext|>", pad_id(config, stops, 0)),
        defaults={
            "cache": "block",
            "block_length": size,
            "strict": True,
            "schedule": "even",
        },
    )


# The training code's own switches; the first is published with this spelling.
HARMLESS = frozenset({"conplemenrary_mask", "complementary_mask", "mask_token", "flexible_mask"})
FAMILY = Family(read, qwen2.names, qwen2.optional, tied=qwen2.TIED, harmless=HARMLESS, block_field="bd_size")

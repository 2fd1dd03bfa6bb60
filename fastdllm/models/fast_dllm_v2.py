# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2 1.5B and 7B: Qwen2's network under a block-causal mask, with a right shift of one (arXiv 2509.26328)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdllm.models import qwen2
from fastdllm.models.spec import Family, ModelSpec


def spec(config: Mapping[str, Any], ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids; the mask is published in the tokenizer only."""
    size = config.get("bd_size", 32)
    stops = qwen2.stop_ids(config, ids)
    return ModelSpec(
        family="fast_dllm_v2",
        **qwen2.shapes(config),
        shift=1,
        block_causal=size,
        mask_id=config.get("mask_token_id", ids.get("|<MASK>|", 151665)),
        stop_ids=stops,
        pad_id=ids.get("<|endoftext|>", config.get("pad_token_id") or stops[0]),
        defaults={
            "cache": "block",
            "block_length": size,
            "strict": True,
            "schedule": "even",
        },
    )


FAMILY = Family(spec, qwen2.names, qwen2.optional)

# SPDX-License-Identifier: Apache-2.0
"""Stable-DiffCoder-8B Base and Instruct (ByteDance Seed): Llama's network, block-causal in blocks of 4, no token shift."""

from __future__ import annotations

from collections.abc import Mapping

from fastdllm.models import qwen2
from fastdllm.models.files import Fields
from fastdllm.models.spec import Family, ModelSpec, mask_id, pad_id, stop_ids


def read(config: Fields, ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids."""
    shapes = qwen2.shapes(config, qkv_bias=False)
    size = config.integer("block_size", 1, shapes["max_length"], 4)
    stops = stop_ids(config, ids, "<[end▁of▁sentence]>")
    return ModelSpec(
        family="stable_diffcoder",
        **shapes,
        shift=0,
        block_causal=size,
        mask_id=mask_id(config, ids, "<[MASK_TOKEN]>", 5),
        stop_ids=stops,
        pad_id=pad_id(config, stops, 0),
        defaults={"cache": "block", "block_length": size, "schedule": "even", "small_block_size": size},
    )


FAMILY = Family(read, qwen2.names, qwen2.optional, tied=qwen2.TIED, block_field="block_size")

# SPDX-License-Identifier: Apache-2.0
"""Dream-v0 Base and Instruct 7B, Dream-Coder: Qwen2's network, read bidirectionally, with a right shift of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdllm.models import qwen2
from fastdllm.models.spec import Family, ModelSpec


def spec(config: Mapping[str, Any], ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids."""
    return ModelSpec(
        family="dream",
        **qwen2.shapes(config),
        shift=1,
        block_causal=0,
        mask_id=config.get("mask_token_id", ids.get("<|mask|>", 151666)),
        stop_ids=qwen2.stop_ids(config, ids),
        pad_id=config.get("pad_token_id", 151643),
        defaults={"cache": "dual", "schedule": "timesteps"},
    )


FAMILY = Family(spec, qwen2.names, qwen2.optional)

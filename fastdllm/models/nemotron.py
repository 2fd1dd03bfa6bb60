# SPDX-License-Identifier: Apache-2.0
"""Nemotron-Labs-Diffusion 3B, 8B, 14B (arXiv 2607.05722): Ministral's network with YaRN, no token shift inside a block.

The prompt and finished blocks are read causally, only the open block in both directions (`causal_context`); the causal
forward over a finished block also gives the first token of the next. The same weights are an autoregressive model, whose
tokens the decoder self_speculate gives in fewer forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from fastdllm.models import qwen2
from fastdllm.models.files import Fields
from fastdllm.models.spec import Family, ModelSpec, mask_id, pad_id, stop_ids


def read(config: Fields, ids: Mapping[str, int]) -> ModelSpec:
    """`ids` maps the tokenizer's added tokens to ids."""
    shapes = qwen2.shapes(config, qkv_bias=False, rope_kinds=("default", "yarn"))
    size = config.integer("block_size", 1, shapes["max_length"], 32)
    stops = stop_ids(config, ids)
    if "sliding_window" in config:  # which Ministral heeds whatever Qwen's switch says
        raise config.wrong("sliding_window", "only null is supported")
    if config.text("dlm_type", "llada") != "llada":  # the other one, "dream", shifts what a block's positions predict
        raise config.wrong("dlm_type", "only 'llada' is supported")
    return ModelSpec(
        family="nemotron",
        **shapes,
        shift=0,
        block_causal=0,
        mask_id=mask_id(config, ids, "<SPECIAL_100>", 100),
        stop_ids=stops,
        pad_id=pad_id(config, stops, 0),
        defaults={"cache": "causal", "block_length": size, "schedule": "even"},
        causal_context=True,
    )


HARMLESS = frozenset({"ar_loss_weight", "dlm_loss_weight", "dlm_paradigm", "dp_varying_mask_ratio"})
FAMILY = Family(
    read,
    partial(qwen2.names, body="encoder.", head="diffusion_head.weight"),
    lambda spec: set(),
    tied="diffusion_head.weight",
    harmless=HARMLESS,
    block_field="block_size",
)

# SPDX-License-Identifier: Apache-2.0
"""The generation functions of Fast-dLLM v2, over the core.

Greedy tokens equal the published functions' for equal arguments up to the stop token, with the same forwards or fewer. What
differs: `max_new_tokens` is exact, rows stop at every source of a stop token and cost nothing afterwards, prompts of every
length and batches of them work, and sampling is per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastdllm
from fastdllm.fields import coerce
from fastdllm.prompts import encode, padded


def _generate(cache: str, model: fastdllm.Model, input_ids: Tensor, options: dict[str, Any]) -> tuple[Tensor, int]:
    rows = encode(model, input_ids)
    mask_id = coerce("mask_id", options["mask_id"], int | None)
    if mask_id not in (None, model.spec.mask_id):
        raise ValueError(f"mask_id={mask_id} is not the model's, {model.spec.mask_id}")
    stop, length = options["stop_token"], coerce("max_new_tokens", options["max_new_tokens"], int)
    same = ("block_size", "small_block_size", "threshold", "temperature", "top_p", "reuse_k", "layer_subset", "trim_ratio")
    given = {"block_length" if k == "block_size" else k: options[k] for k in same}
    out = fastdllm.generate(
        model,
        rows,
        cache=cache,
        gen_length=length,
        decoder="threshold",
        strict=True,
        stop_ids=None if stop is None else (stop,),
        **given,
    )
    prompts = padded(model, rows, input_ids)
    x = torch.nn.functional.pad(prompts, (0, length), value=model.spec.pad_id)
    for row, prompt, sequence in zip(x, rows, out.sequences, strict=True):
        start = prompts.shape[1] - len(prompt)
        row[start : start + len(sequence)] = sequence
    return x.to(input_ids.device if isinstance(input_ids, Tensor) else model.device), max(out.stats.row_forwards)


def generate(
    model: fastdllm.Model,
    input_ids: Tensor,
    max_new_tokens: int,
    block_size: int = 32,
    small_block_size: int = 8,
    threshold: float = 0.9,
    temperature: float = 0.0,
    top_p: float = 0.95,
    stop_token: int | None = None,
    mask_id: int | None = None,
    reuse_k: int = 1,
    layer_subset: str | None = None,
    trim_ratio: float | None = None,
) -> tuple[Tensor, int]:
    """Recompute everything. input_ids [B, P] -> (x [B, P + max_new_tokens], forwards of the longest row).

    A row ends after `stop_token` (None: the model's) and is filled with the pad id. Tokens above `threshold` are committed,
    and always the best; 1 is one token a forward. `reuse_k`, `layer_subset`, `trim_ratio`: layer reuse and TRIM (with a
    cache only, see fastdllm/reuse). Raises ValueError for bad arguments.
    """
    return _generate("none", model, input_ids, {**locals()})


def generate_with_prefix_cache(
    model: fastdllm.Model,
    input_ids: Tensor,
    max_new_tokens: int,
    block_size: int = 32,
    small_block_size: int = 8,
    threshold: float = 0.9,
    temperature: float = 0.0,
    top_p: float = 0.95,
    stop_token: int | None = None,
    mask_id: int | None = None,
    reuse_k: int = 1,
    layer_subset: str | None = None,
    trim_ratio: float | None = None,
) -> tuple[Tensor, int]:
    """`generate` that never recomputes a finished block: the same tokens."""
    return _generate("block", model, input_ids, {**locals()})


def generate_with_dual_cache(
    model: fastdllm.Model,
    input_ids: Tensor,
    max_new_tokens: int,
    block_size: int = 32,
    small_block_size: int = 8,
    threshold: float = 0.9,
    temperature: float = 0.0,
    top_p: float = 0.95,
    stop_token: int | None = None,
    mask_id: int | None = None,
    reuse_k: int = 1,
    layer_subset: str | None = None,
    trim_ratio: float | None = None,
) -> tuple[Tensor, int]:
    """`generate_with_prefix_cache` that recomputes only the sub-block once its first token is known (an approximation)."""
    return _generate("sub_block", model, input_ids, {**locals()})

# SPDX-License-Identifier: Apache-2.0
"""Dream's `diffusion_generate`, with and without Fast-dLLM's caches, over the core.

Greedy tokens equal the published functions' for equal arguments, with the same forwards or fewer. What differs: `alg` counts
with a cache too, prompts may be padded on the left and come in batches, confidences are of the untempered distribution, and
no mask is left however few the steps. With `alg="confidence_threshold"` the number of steps has no effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastdllm
from fastdllm.fields import coerce, shown
from fastdllm.prompts import encode, padded

# What each `alg` ranks positions by.
ALGS = {
    "origin": "random",
    "maskgit_plus": "probability",
    "topk_margin": "margin",
    "entropy": "entropy",
    "confidence_threshold": "probability",
}


def diffusion_generate(
    model: fastdllm.Model,
    input_ids: Tensor,
    attention_mask: Any = None,
    max_new_tokens: int = 128,
    steps: int = 128,
    alg: str = "entropy",
    alg_temp: float = 0.0,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    threshold: float = 0.9,
    block_length: int | None = None,
    cache: str = "none",
) -> tuple[Tensor, int]:
    """input_ids [B, P], attention_mask [B, P] (0 on padding) -> (x [B, P + max_new_tokens], forwards of the longest row).

    Padding moves to the left, so that the answer follows the prompt, and is the pad id in x. `block_length` None is the
    whole answer without a cache, 32 with "prefix" or "dual". Raises ValueError for bad arguments.
    """
    alg = coerce("alg", alg, str)
    if alg not in ALGS:
        raise ValueError(f"alg={shown(alg)} is unknown; allowed are {', '.join(ALGS)}")
    if alg == "confidence_threshold":
        decoder = {"decoder": "threshold", "threshold": threshold}
    else:
        decoder = {"decoder": "quota", "schedule": "timesteps", "steps": steps, "alg_temp": alg_temp}
    rows = encode(model, input_ids, attention_mask)
    length = coerce("max_new_tokens", max_new_tokens, int)
    out = fastdllm.generate(
        model,
        rows,
        cache=cache,
        gen_length=length,
        block_length=(length if cache == "none" else 32) if block_length is None else block_length,
        confidence=ALGS[alg],
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop_ids=(),
        **decoder,
    )
    answers = torch.stack([s[-length:] for s in out.sequences])
    device = input_ids.device if isinstance(input_ids, Tensor) else model.device
    return torch.cat([padded(model, rows, input_ids), answers], 1).to(device), max(out.stats.row_forwards)

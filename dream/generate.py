# SPDX-License-Identifier: Apache-2.0
"""Dream's `diffusion_generate`, with and without Fast-dLLM's caches, over the core.

Greedy tokens equal the published functions' for equal arguments, with the same forwards or fewer. What differs: `alg` counts
with a cache too, prompts may be padded on the left and come in batches, confidences are of the untempered distribution, and
no mask is left however few the steps. With `alg="confidence_threshold"` the number of steps has no effect.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastdllm
from fastdllm.prompts import check_model, encode, padded

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
    attention_mask: Tensor | None = None,
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

    `block_length` None is the whole answer without a cache, 32 with "prefix" or "dual". Raises ValueError for bad arguments.
    """
    check_model(model)
    if alg not in ALGS:
        raise ValueError(f"alg={alg!r} is unknown; allowed are {', '.join(ALGS)}")
    if alg == "confidence_threshold":
        decoder = {"decoder": "threshold", "threshold": threshold}
    else:
        decoder = {"decoder": "quota", "schedule": "timesteps", "steps": steps, "alg_temp": alg_temp}
    if not isinstance(input_ids, Tensor):
        rows = encode(model, input_ids, attention_mask)
        input_ids, lengths = padded(model, rows, input_ids), torch.tensor([[len(row)] for row in rows])
        attention_mask = torch.arange(input_ids.shape[1]) >= input_ids.shape[1] - lengths
    keep = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    if keep.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {list(keep.shape)}, input_ids {list(input_ids.shape)}")
    if (keep[:, :-1] & ~keep[:, 1:]).any():
        raise ValueError("attention_mask must be 0 on the left of a prompt only: the answer follows on its right")
    out = fastdllm.generate(
        model,
        [ids[k] for ids, k in zip(input_ids, keep, strict=True)],
        cache=cache,
        gen_length=max_new_tokens,
        block_length=block_length or (max_new_tokens if cache == "none" else 32),
        confidence=ALGS[alg],
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop_ids=(),
        **decoder,
    )
    answers = torch.stack([s[-max_new_tokens:] for s in out.sequences])
    return torch.cat([input_ids, answers.to(input_ids.device)], 1), max(out.stats.row_forwards)

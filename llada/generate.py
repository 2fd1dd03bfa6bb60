# SPDX-License-Identifier: Apache-2.0
"""The three functions of Fast-dLLM's `llada/generate.py`, over the core.

Greedy tokens equal the published functions' for equal arguments, with the same forwards or fewer. What differs: prompts may
come in batches and hold the mask id, lengths and steps need not divide, the mask is never predicted, and every cache takes
every number of steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import fastdllm
from fastdllm.config import nearest
from fastdllm.fields import coerce, shown
from fastdllm.prompts import encode, padded

# Switches of LLaDA's own `generate`. False is what happens here; True is another rule.
SWITCHES = ("logits_eos_inf", "confidence_eos_eot_inf")
REMASKING = {"low_confidence": "probability", "random": "random"}
PUBLISHED_MASK = 126336  # the default below: "the model's own", also for a checkpoint that numbers it otherwise


def _generate(cache: str, model: fastdllm.Model, prompt: Tensor, options: dict[str, Any]) -> tuple[Tensor, int]:
    _check_others(options["others"])
    rows = encode(model, prompt, options["attention_mask"])
    # By position an attention mask, which other codes' functions take there, would be the number of steps.
    steps, gen_length = (coerce(name, options[name], int) for name in ("steps", "gen_length"))
    threshold, factor = options["threshold"], options["factor"]
    remasking, mask_id = coerce("remasking", options["remasking"], str), coerce("mask_id", options["mask_id"], int)
    if remasking not in REMASKING:
        raise ValueError(f"remasking={shown(remasking)} is unknown; allowed are {', '.join(REMASKING)}")
    if mask_id not in (PUBLISHED_MASK, model.spec.mask_id):
        raise ValueError(f"mask_id={mask_id} is not the model's, {model.spec.mask_id}")
    if factor is not None:
        decoder = {"decoder": "factor", "factor": factor, "factor_rule": "published"}
    elif threshold is not None:
        decoder = {"decoder": "threshold", "threshold": threshold}
    else:
        decoder = {"decoder": "quota", "schedule": "even", "steps": min(steps, gen_length)}
    out = fastdllm.generate(
        model,
        rows,
        cache=cache,
        gen_length=gen_length,
        block_length=options["block_length"],
        temperature=options["temperature"],
        confidence=REMASKING[remasking],
        cfg_scale=options["cfg_scale"],
        stop_ids=(),
        **decoder,
    )
    answers = torch.stack([s[len(row) :] for s, row in zip(out.sequences, rows, strict=True)])
    return torch.cat([padded(model, rows, prompt), answers], 1).to(model.device), max(out.stats.row_forwards)


def _check_others(others: Mapping[str, Any]) -> None:
    """ValueError for an argument that these functions do not have, and for a switch of LLaDA's that is not False."""
    for name, value in others.items():
        if name not in SWITCHES:
            near = nearest(name, inspect.signature(generate).parameters)
            more = "fastdllm.generate has more options"
            raise ValueError(f"unknown argument {name}={shown(value)} of LLaDA's published functions; {near}{more}")
        if coerce(name, value, bool):
            raise ValueError(
                f"{name}={shown(value)} is not supported: an end token is chosen like any other; allowed is False"
            )


def generate(
    model: fastdllm.Model,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = PUBLISHED_MASK,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    attention_mask: Any = None,
    cfg_scale: float = 0.0,
    **others: Any,
) -> tuple[Tensor, int]:
    """Recompute everything at every step. prompt [B, P] -> (x [B, P + gen_length], forwards of the longest row).

    prompt may be whatever `fastdllm.generate` takes, also a tokenizer's padded batch: x then begins with the pad id.

    `steps` splits evenly over the blocks and counts only without `threshold` and `factor`; `factor` overrides `threshold`.
    `remasking`: "low_confidence" or "random" (without threshold and factor).

    By name only, from LLaDA's own function: `attention_mask` [B, P], 0 on padding, which moves to the left; `cfg_scale`, of
    classifier-free guidance; and its switches `logits_eos_inf` and `confidence_eos_eot_inf`, which must be False.

    Raises ValueError for bad arguments, and for others than these.
    """
    return _generate("none", model, prompt, {**locals()})


def generate_with_prefix_cache(
    model: fastdllm.Model,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = PUBLISHED_MASK,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    attention_mask: Any = None,
    cfg_scale: float = 0.0,
    **others: Any,
) -> tuple[Tensor, int]:
    """`generate` that recomputes from the block on and refreshes the rest when a block opens. Guidance has no cache."""
    return _generate("prefix", model, prompt, {**locals()})


def generate_with_dual_cache(
    model: fastdllm.Model,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = PUBLISHED_MASK,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    attention_mask: Any = None,
    cfg_scale: float = 0.0,
    **others: Any,
) -> tuple[Tensor, int]:
    """`generate` that recomputes only the block and refreshes the rest when a block opens. Guidance has no cache."""
    return _generate("dual", model, prompt, {**locals()})

# SPDX-License-Identifier: Apache-2.0
"""Dream's loop and Fast-dLLM's cached ones for it, one prompt at a time, greedy.

Logits are shifted right by one, row 0 standing for itself. The published cached loops treat every `alg` as entropy; here
each does what its name says. Without a cache, `confidence_threshold` runs as with `steps=1`: the published loop also caps
the commits of a step at masks / steps, which makes the number of steps matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.network import PlainNetwork, append_to, keep, replace_in


def shifted(logits: Tensor) -> Tensor:
    return torch.cat([logits[:1], logits[:-1]])


def confidence(logits: Tensor, alg: str) -> tuple[Tensor, Tensor]:
    """Confidence and token of each row of logits [Q, V]."""
    prob = logits.softmax(-1)
    best, token = prob.max(-1)
    if alg == "topk_margin":
        two = prob.topk(2, -1).values
        best = two[:, 0] - two[:, 1]
    elif alg == "entropy":
        best = (prob * (prob + 1e-10).log()).sum(-1)
    return best, token


def timestep_quota(masks: int, step: int, steps: int, eps: float = 1e-3) -> int:
    """Tokens that step `step` of `steps` commits of `masks`, in fp32 as published."""
    times = torch.linspace(1, eps, steps + 1)
    return int(torch.tensor(float(masks)) * (1 - times[step + 1] / times[step])) if step < steps - 1 else masks


def commit(
    x: Tensor, start: int, end: int, logits: Tensor, mask: int, alg: str, threshold: float, quota: int | None
) -> None:
    """Write into the canvas what one step commits; logits [end - start, V]. quota None: by the threshold."""
    conf, token = confidence(logits, alg)
    order = sorted((x[start:end] == mask).nonzero()[:, 0].tolist(), key=lambda i: -float(conf[i]))
    chosen = [i for n, i in enumerate(order) if n == 0 or conf[i] >= threshold] if quota is None else order[:quota]
    for i in chosen:
        x[start + i] = token[i]


def generate(
    net: PlainNetwork,
    prompt: Tensor,
    *,
    cache: str = "none",
    max_new_tokens: int = 128,
    steps: int = 128,
    alg: str = "entropy",
    threshold: float = 0.9,
    block_length: int | None = None,
) -> tuple[list[int], int]:
    """cache: "none" (the whole answer at once), "prefix" or "dual". Returns the whole sequence and the forwards."""
    mask, before = net.spec.mask_id, net.forwards
    by_threshold = alg == "confidence_threshold"
    x = torch.cat([prompt, torch.full((max_new_tokens,), mask)])
    size = block_length or (max_new_tokens if cache == "none" else 32)
    per_block = steps // (max_new_tokens // size)
    for start in range(len(prompt), len(x), size):
        end, past = start + size, {}
        step = 0
        if cache != "none":
            x[start] = shifted(net(x, 0, keep(past)))[start].argmax()
            step = 1
            if cache == "prefix":
                past = {i: (k[:start], v[:start]) for i, (k, v) in past.items()}
        while (x[start:end] == mask).any():
            if not by_threshold and step == per_block:
                break  # a published defect at one step a block: the rest stays masked
            if cache == "none":
                logits = shifted(net(x))[start:end]
            elif cache == "prefix":
                logits = shifted(net(x[start:], start, append_to(past)))[:size]
            else:
                logits = shifted(net(x[start:end], start, replace_in(past, start)))
            masks = int((x[start:end] == mask).sum())
            quota = None if by_threshold else timestep_quota(masks, step, per_block)
            commit(x, start, end, logits, mask, alg, threshold, quota)
            step += 1
    return x.tolist(), net.forwards - before

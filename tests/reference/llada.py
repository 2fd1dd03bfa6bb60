# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM's loops for LLaDA (arXiv 2505.22618), one prompt at a time, greedy.

Two published defects are left out, because no result depends on them: the mask can be predicted, and the cached loops run
one more forward over a block that is already full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.network import PlainNetwork, append_to, keep, replace_in


def even_split(masks: int, steps: int) -> list[int]:
    """How many tokens each step commits: an equal share, the remainder on the first steps."""
    share, rest = divmod(masks, steps)
    return [share + (1 if i < rest else 0) for i in range(steps)]


def count_by_factor(conf: list[float], factor: float) -> int:
    """How many of the positions, most confident first, the published factor loop commits."""
    bounds = [1 - factor / (n + 1) for n in range(1, len(conf) + 1)]
    bounds[0] = -1.0
    stop = len(conf) - 1
    for i, bound in enumerate(bounds):
        if conf[i] < bound:
            stop = i
            break
    if stop == 0 or stop == len(conf) - 1:
        stop += 1
    return stop


def choose(logits: Tensor, open_slots: Tensor, quota: int, threshold: float | None, factor: float | None) -> dict[int, int]:
    """Positions of this step and their tokens. logits [Q, V], open_slots [Q] bool."""
    prob, token = logits.double().softmax(-1).max(-1)
    order = sorted(open_slots.nonzero()[:, 0].tolist(), key=lambda i: -float(prob[i]))
    if factor is not None:
        order = order[: count_by_factor([float(prob[i]) for i in order], factor)]
    elif threshold is not None:
        order = [i for n, i in enumerate(order) if n == 0 or prob[i] >= threshold]
    else:
        order = order[:quota]
    return {i: int(token[i]) for i in order}


def generate(
    net: PlainNetwork,
    prompt: Tensor,
    *,
    mode: str = "none",
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    threshold: float | None = None,
    factor: float | None = None,
) -> tuple[list[int], int]:
    """mode: "none", "prefix" or "dual". Returns the whole sequence and the forwards."""
    mask = net.spec.mask_id
    x = torch.cat([prompt, torch.full((gen_length,), mask)])
    blocks, before = gen_length // block_length, net.forwards
    for b in range(blocks):
        start = len(prompt) + b * block_length
        end = start + block_length
        quotas, step, past = even_split(block_length, steps // blocks), 0, {}
        while (x[start:end] == mask).any():
            if mode == "none":
                logits = net(x)[start:end]
            elif step == 0:
                logits = net(x, 0, keep(past))[start:end]
                if mode == "prefix":
                    past = {i: (k[:start], v[:start]) for i, (k, v) in past.items()}
            elif mode == "prefix":
                logits = net(x[start:], start, append_to(past))[:block_length]
            else:
                logits = net(x[start:end], start, replace_in(past, start))
            quota = quotas[step] if step < len(quotas) else 0
            for i, token in choose(logits, x[start:end] == mask, quota, threshold, factor).items():
                x[start + i] = token
            step += 1
    return x.tolist(), net.forwards - before

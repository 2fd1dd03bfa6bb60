# SPDX-License-Identifier: Apache-2.0
"""The samplers of LLaDA2.0 and LLaDA2.1 (arXiv 2512.15745, 2602.08676), one prompt at a time, greedy.

Blocks lie on the grid from position 0, and every forward reads all positions up to the end of the open block anew. LLaDA2.0
spreads a whole block over its steps, and a step takes all that is above the threshold, or its share where that is less.
LLaDA2.1 takes the best mask where none is above the threshold. It also replaces tokens that it has written, and goes on
with a full block until nothing changes. Source: `generate` of modeling_llada2_moe.py (inclusionAI/LLaDA2.0-mini and
LLaDA2.1-mini), as a description of what it computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.network import PlainNetwork


def predictions(net: PlainNetwork, x: Tensor, start: int, end: int) -> tuple[list[float], list[int]]:
    """Of each position of the block: the probability of its likeliest token, and that token."""
    prob, token = net(x[:end])[start:end].softmax(-1).max(-1)
    return prob.tolist(), token.tolist()


def ranked(prob: list[float], masks: list[int]) -> list[int]:
    return sorted(masks, key=lambda i: -prob[i])


def by_steps(
    net: PlainNetwork, prompt: Tensor, *, length: int, block_size: int, steps: int, threshold: float
) -> tuple[list[int], int]:
    """LLaDA2.0: the sequence, and the forwards. `prompt` and `length` together end on the grid."""
    x = torch.cat([prompt, torch.full((length,), net.spec.mask_id)])
    masked = [i >= len(prompt) for i in range(len(x))]
    before = net.forwards
    for start in range(len(prompt) // block_size * block_size, len(x), block_size):
        for step in range(steps):
            masks = [i for i in range(block_size) if masked[start + i]]
            if not masks:
                break
            prob, token = predictions(net, x, start, start + block_size)
            share = block_size // steps + (step < block_size % steps)
            sure = [i for i in masks if prob[i] > threshold]
            for i in sure if len(sure) >= share else ranked(prob, masks)[:share]:
                x[start + i], masked[start + i] = token[i], False
    return x.tolist(), net.forwards - before


def editing(
    net: PlainNetwork,
    prompt: Tensor,
    *,
    length: int,
    block_size: int,
    threshold: float,
    editing_threshold: float,
    max_post_steps: int,
) -> tuple[list[int], list[int], int, int]:
    """LLaDA2.1: the sequence, which forward, from 1, wrote each token of the answer last, the forwards, and how many tokens
    were edited."""
    x = torch.cat([prompt, torch.full((length,), net.spec.mask_id)])
    masked = [i >= len(prompt) for i in range(len(x))]
    written = [0] * len(x)
    before, edits = net.forwards, 0
    for start in range(len(prompt) // block_size * block_size, len(x), block_size):
        post = 0
        while True:
            masks = [i for i in range(block_size) if masked[start + i]]
            post += not masks
            if post > max_post_steps:
                break
            prob, token = predictions(net, x, start, start + block_size)
            chosen = [i for i in masks if prob[i] > threshold] or ranked(prob, masks)[:1]
            edited = [
                i
                for i in range(block_size)
                if start + i >= len(prompt) and not masked[start + i] and prob[i] > editing_threshold
                if token[i] != x[start + i]
            ]
            for i in chosen + edited:
                x[start + i], masked[start + i], written[start + i] = token[i], False, net.forwards - before
            edits += len(edited)
            if not masks and not edited:
                break
    return x.tolist(), written[len(prompt) :], net.forwards - before, edits

# SPDX-License-Identifier: Apache-2.0
"""The block-diffusion objective of Fast-dLLM v2 (arXiv 2509.26328, section 3 and A.3), a function a step.

    noise  = draw_noise(rows, length, generator)
    masked = choose_masked(labels, positions, block, noise)         # [B, T]
    noisy  = complementary_views(ids, labels, masked, mask_id)      # [2B, T]
    states = backbone(noisy_and_clean(noisy, ids), ...)[:, :length] # [2B, T, C]; masks.py says who sees whom
    loss   = shifted_cross_entropy(head(target_states(states, masked)), labels)

Every tensor has a shape known beforehand and nothing is read back to the host. Labels are token ids at
response positions and `IGNORE` elsewhere; positions count from 0 within each document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # the label of everything that is not to be predicted: prompts and padding
EPS = 1e-3  # the least mask ratio of a block, as published


class Noise(NamedTuple):
    """Two independent uniforms in [0, 1) for every token, [B, T] each."""

    ratio: Tensor
    coin: Tensor


def draw_noise(rows: int, length: int, generator: torch.Generator) -> Noise:
    """Noise on the generator's device. On a CPU a single row's noise is the same at every width."""
    return Noise(*torch.rand(rows, length, 2, generator=generator, device=generator.device).unbind(-1))


def drop_first_targets(labels: Tensor, positions: Tensor) -> Tensor:
    """Labels without each document's first token: no token of the same document could predict it."""
    return labels.masked_fill(positions == 0, IGNORE)


def choose_masked(labels: Tensor, positions: Tensor, block: int, noise: Noise, eps: float = EPS) -> Tensor:
    """[B, T] bool: the response tokens that the first view masks; the second view masks the others.

    Each block draws one ratio t ~ U(0, 1), that of its first token, and masks each of its response tokens
    with probability (1 - eps) t + eps.
    """
    index = torch.arange(labels.shape[1], device=labels.device)
    # A row that starts in the middle of a block, because a caller cut its document, takes its first draw.
    block_start = (index - positions % block).clamp_min(0)
    probability = (1 - eps) * noise.ratio.gather(1, block_start) + eps
    return (noise.coin < probability) & (labels != IGNORE)


def complementary_views(ids: Tensor, labels: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """[2B, T] corrupted ids, every row's first view, then every row's second.

    Each response token is masked in exactly one of its two views; nothing else is ever masked.
    """
    first = ids.masked_fill(masked, mask_id)
    second = ids.masked_fill(~masked & (labels != IGNORE), mask_id)
    return torch.cat([first, second])


def noisy_and_clean(noisy: Tensor, ids: Tensor) -> Tensor:
    """[2B, 2T] model input: each view [2B, T] followed by its clean row [B, T]."""
    return torch.cat([noisy, ids.repeat(2, 1)], dim=1)


def target_states(states: Tensor, masked: Tensor) -> Tensor:
    """[B, T - 1, C]: the states that predict tokens 1 ... T - 1, out of both views' noisy halves [2B, T, C].

    Token i is predicted at position i - 1 of the one view that masks it. As only one does, the head runs on
    B T rows instead of 2 B T, at the same loss and gradients.
    """
    first, second = states[:, :-1].chunk(2)
    return torch.where(masked[:, 1:, None], first, second)


def shifted_cross_entropy(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in fp32 of logits [B, T - 1, V] against tokens 1 ... T - 1 of labels [B, T].

    The sum over targets is divided by `count`, by default their number here. There is no 1/t weight: in a
    pair of complementary views every response token is a target once, whatever the ratios (paper, A.3).
    """
    targets = labels[:, 1:]
    flat = logits.float().flatten(0, 1)
    total = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / ((targets != IGNORE).sum().clamp_min(1) if count is None else count)

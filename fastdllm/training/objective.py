# SPDX-License-Identifier: Apache-2.0
"""The block-diffusion objective of Fast-dLLM v2 (arXiv 2509.26328, section 3 and appendix A.3), a function a step.

    noise  = draw_noise(rows, length, generator)
    masked = choose_masked(labels, positions, block, noise)         # [B, T]
    noisy  = complementary_views(ids, labels, masked, mask_id)      # [2B, T]
    states = backbone(noisy_and_clean(noisy, ids), ...)[:, :length] # [2B, T, C], masks.py says who sees whom
    loss   = shifted_cross_entropy(head(target_states(states, masked)), labels)

Everything is a tensor of a shape known beforehand and nothing is read back to the host.
Labels are token ids at response positions and `IGNORE` elsewhere; `positions` count from 0 within each document.
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
    """Noise on the generator's device."""
    ratio, coin = torch.rand(2, rows, length, generator=generator, device=generator.device)
    return Noise(ratio, coin)


def choose_masked(labels: Tensor, positions: Tensor, block: int, noise: Noise, eps: float = EPS) -> Tensor:
    """[B, T] bool: the response tokens that the first view masks; the second view masks the others.

    Each block draws one ratio t ~ U(0, 1), that of its first token, and masks each of its response tokens with
    probability (1 - eps) t + eps.
    """
    index = torch.arange(labels.shape[1], device=labels.device)
    # A row may start in the middle of a block only if a caller cut its document; it then counts from the row's start.
    first = (index - positions % block).clamp_min(0)
    probability = (1 - eps) * noise.ratio.gather(1, first) + eps
    return (noise.coin < probability) & (labels != IGNORE)


def complementary_views(ids: Tensor, labels: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """[2B, T] corrupted ids: view 1 of every row, then view 2. Each response token is masked in exactly one of the two."""
    first = ids.masked_fill(masked, mask_id)
    second = ids.masked_fill(~masked & (labels != IGNORE), mask_id)
    return torch.cat([first, second])


def noisy_and_clean(noisy: Tensor, ids: Tensor) -> Tensor:
    """[2B, 2T] model input: both views, each followed by the clean row. Positions, [B, T], repeat in the same way."""
    return torch.cat([noisy, ids.repeat(2, 1)], dim=1)


def target_states(states: Tensor, masked: Tensor) -> Tensor:
    """[B, T - 1, C] state that predicts token 1, 2, ..., T - 1, out of [2B, T, C] states of the two noisy halves.

    Token i is predicted at position i - 1 of the one view that masks it. Since exactly one does, the head runs on B T rows
    instead of 2 B T, with the loss and gradients unchanged.
    """
    first, second = states[:, :-1].chunk(2)
    return torch.where(masked[:, 1:, None], first, second)


def shifted_labels(labels: Tensor, positions: Tensor) -> Tensor:
    """Labels without those of each document's first token, which has no token before it to be predicted from."""
    return labels.masked_fill(positions == 0, IGNORE)


def shifted_cross_entropy(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in fp32 of logits [B, T - 1, V] against tokens 1 ... T - 1 of labels [B, T]: logits[i - 1] predict i.

    The sum over targets is divided by `count`, by default their number here. There is no 1/t weight: a pair of
    complementary views has every response token as a target once, whatever its ratios (paper, A.3).
    """
    targets = labels[:, 1:]
    total = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (torch.clamp((targets != IGNORE).sum(), min=1) if count is None else count)

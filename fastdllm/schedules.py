# SPDX-License-Identifier: Apache-2.0
"""Masking schedules: how many tokens each step of a block commits when the number of steps is fixed.

A schedule maps (masks, steps, begin) to the list of commits of the steps begin, begin + 1, ..., steps - 1. Steps that would
commit nothing are dropped: the forward of such a step is repeated unchanged by the next one, so dropping it saves a forward
and changes no token. The last step commits what is left, so that a block always ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int, int, int], list[int]]


def even(masks: int, steps: int, begin: int = 0) -> list[int]:
    """As even as possible, the remainder first (LLaDA's `get_num_transfer_tokens`)."""
    steps = max(1, steps - begin)
    return [n for n in (masks // steps + (i < masks % steps) for i in range(steps)) if n]


def _by_fraction(masks: int, steps: int, begin: int, kept: Callable[[int], float]) -> list[int]:
    """Commits that follow `kept(i)`, the share of masks of step i that step i leaves masked."""
    out, left = [], masks
    for i in range(min(begin, steps - 1), steps):
        n = left if i == steps - 1 else int(left * (1.0 - kept(i)))
        if n:
            out.append(n)
        left -= n
    return out


def timesteps(masks: int, steps: int, begin: int = 0, eps: float = 1e-3) -> list[int]:
    """Dream's: times t_i fall linearly from 1 to `eps`; step i unmasks floor(n (1 - t_{i+1} / t_i)) of n masks."""
    step = (1.0 - eps) / steps
    return _by_fraction(masks, steps, begin, lambda i: (1.0 - (i + 1) * step) / (1.0 - i * step))


def cosine(masks: int, steps: int, begin: int = 0) -> list[int]:
    """MaskGIT's cosine schedule (arXiv 2202.04200): cos(pi/2 * i/steps) of the masks are left before step i."""
    angle = math.pi / 2 / steps
    return _by_fraction(masks, steps, begin, lambda i: math.cos((i + 1) * angle) / math.cos(i * angle))


SCHEDULES: dict[str, Schedule] = {"even": even, "timesteps": timesteps, "cosine": cosine}

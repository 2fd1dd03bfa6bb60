# SPDX-License-Identifier: Apache-2.0
"""Masking schedules: how many tokens each step of a block commits when the number of steps is fixed.

A schedule maps (masks, steps, begin) to the list of commits of the steps begin, begin + 1, ..., steps - 1. Steps that would
commit nothing are dropped: the forward of such a step is repeated unchanged by the next one, so dropping it saves a forward
and changes no token. The last step commits what is left, so that a block always ends.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache

import torch

Schedule = Callable[[int, int, int], list[int]]


def even(masks: int, steps: int, begin: int = 0) -> list[int]:
    """As even as possible, the remainder first (LLaDA's `get_num_transfer_tokens`)."""
    steps = max(1, steps - begin)
    return [n for n in (masks // steps + (i < masks % steps) for i in range(steps)) if n]


def _single(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def _by_share(masks: int, steps: int, begin: int, share: Callable[[int], float]) -> list[int]:
    """Commits that follow `share(i)`, what step i commits of its masks; the product is rounded to fp32, as published."""
    out, left = [], masks
    for i in range(min(begin, steps - 1), steps):
        n = left if i == steps - 1 else int(_single(left * share(i)))
        if n:
            out.append(n)
        left -= n
    return out


def timesteps(masks: int, steps: int, begin: int = 0, eps: float = 1e-3) -> list[int]:
    """Dream's: times t_i fall linearly from 1 to `eps`; step i unmasks floor(n (1 - t_{i+1} / t_i)) of n masks."""
    return _by_share(masks, steps, begin, _timestep_shares(steps, eps).__getitem__)


@cache
def _timestep_shares(steps: int, eps: float) -> list[float]:
    """1 - t_{i+1} / t_i in fp32: many products lie so close to an integer that the width of the arithmetic decides."""
    times = torch.linspace(1.0, eps, steps + 1)
    return (1 - times[1:] / times[:-1]).tolist()


def cosine(masks: int, steps: int, begin: int = 0) -> list[int]:
    """MaskGIT's cosine schedule (arXiv 2202.04200): cos(pi/2 * i/steps) of the masks are left before step i."""
    angle = math.pi / 2 / steps
    return _by_share(masks, steps, begin, lambda i: 1 - math.cos((i + 1) * angle) / math.cos(i * angle))


SCHEDULES: dict[str, Schedule] = {"even": even, "timesteps": timesteps, "cosine": cosine}

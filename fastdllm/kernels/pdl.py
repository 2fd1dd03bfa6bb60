# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch (CUDA, Hopper and later): a kernel starts while the one before it drains.

Every kernel of this package calls `wait()` before it reads what an earlier kernel wrote. There it lets the next kernel be
scheduled and waits until the one before has finished; since all of them wait, so has everything before that. Elsewhere
(older cards, the interpreter, FASTDLLM_PDL=0) both are nothing, and kernels follow each other as usual.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

_ENABLED = (
    os.environ.get("FASTDLLM_PDL", "1") == "1"
    and os.environ.get("TRITON_INTERPRET") != "1"
    and torch.cuda.is_available()
    and torch.version.hip is None
    and torch.cuda.get_device_capability() >= (9, 0)
)
PDL = tl.constexpr(_ENABLED)
LAUNCH = {"launch_pdl": True} if _ENABLED else {}


@triton.jit
def wait():
    """Let the next kernel be scheduled; wait for the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

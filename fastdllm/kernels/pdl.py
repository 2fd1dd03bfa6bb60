# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch (CUDA, Hopper and later): a kernel starts while the one before it drains.

Every kernel of this package calls `wait()` before it reads what an earlier kernel wrote. There it lets the next kernel be
scheduled and waits until the one before has finished; since all of them wait, so has everything before that. Before it a
kernel reads only what none writes: norms, and weights with their scales and biases. Elsewhere (older cards, a Triton that
lacks it, the interpreter, FASTDLLM_PDL=0) both are nothing, and kernels run one after another.
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
    and hasattr(tl.extra.cuda, "gdc_wait")
)
LAUNCH = {"launch_pdl": True} if _ENABLED else {}

# Two functions, not a branch in one: Triton looks up every name of a function that it compiles, of a dead branch as well.
if _ENABLED:

    @triton.jit
    def wait():
        """Let the next kernel be scheduled; wait for the one before."""
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

else:

    @triton.jit
    def wait():
        """Nothing: the one before has finished."""
        pass

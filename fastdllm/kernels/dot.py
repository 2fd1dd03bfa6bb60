# SPDX-License-Identifier: Apache-2.0
"""The matrix product of the kernels. It is the one place that knows whether Triton's interpreter runs them."""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with `a` cast to b's dtype, accumulated in fp32; fp32 operands are not rounded to tf32."""
    if _INTERPRETED:
        # The interpreter keeps bf16 as integers and cannot multiply it; widening a product's operands is exact.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")

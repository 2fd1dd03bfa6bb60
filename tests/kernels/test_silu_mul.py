# SPDX-License-Identifier: Apache-2.0
"""SwiGLU's activation: the reference against float64, the kernel against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastdllm.kernels.silu_mul import reference


def test_reference_against_float64() -> None:
    x = torch.randn(3, 14)
    out = reference.silu_mul(x)
    for i in range(3):
        for f in range(7):
            gate, up = x[i, f].item(), x[i, 7 + f].item()
            assert math.isclose(out[i, f].item(), gate / (1 + math.exp(-gate)) * up, rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2), (5, 126), (2, 3, 2048), (33, 2 * 1100)], ids=str)
def test_kernel(device: torch.device, assert_close, shape: tuple[int, ...], dtype: torch.dtype, ratio: float) -> None:
    from fastdllm.kernels.silu_mul import triton

    x = (torch.randn(shape, device=device) * 4).to(dtype)
    want = reference.silu_mul(x)
    out = triton.silu_mul(x)
    assert out.dtype == dtype
    assert_close(out, want, ratio)


def test_large_gates_do_not_overflow(device: torch.device) -> None:
    from fastdllm.kernels.silu_mul import triton

    x = torch.tensor([[-200.0, 200.0, 1.0, 1.0]], device=device)
    assert triton.silu_mul(x).tolist() == [[0.0, 200.0]]

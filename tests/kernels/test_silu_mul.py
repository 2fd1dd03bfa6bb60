# SPDX-License-Identifier: Apache-2.0
"""SwiGLU's activation: the reference against float64, the kernel against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastdllm.kernels.linear.reference import quantize_weight
from fastdllm.kernels.silu_mul import reference

pytestmark = pytest.mark.each_choice


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


@pytest.mark.parametrize("kind", ["plain", "fp8", "int8", "int4"])
@pytest.mark.parametrize(("M", "C", "F"), [(1, 16, 1), (5, 60, 33), (33, 272, 64), (3, 64, 130), (70, 64, 32)])
def test_after_a_product(
    device: torch.device, assert_close, M: int, C: int, F: int, kind: str, dtype: torch.dtype, ratio: float
) -> None:
    """Few rows in one kernel; shapes that the bulk copy engine cannot read, and many rows, in two."""
    from fastdllm.kernels.silu_mul import triton

    wq, scale = torch.randn(2 * F, C, device=device).to(dtype) * C**-0.5, None
    if kind != "plain":
        wq, scale = quantize_weight(wq, kind)
    x = torch.randn(1, M, C, device=device).to(dtype)
    out = triton.linear_silu_mul(x, wq, scale)
    assert out.shape == (1, M, F) and out.dtype == dtype
    # The interpreter truncates tokens to fp8 where the hardware rounds.
    ratio = 0.3 if kind == "fp8" and device.type == "cpu" else 2 * max(ratio, 2e-3 if kind == "fp8" else 0)
    assert_close(out, reference.linear_silu_mul(x, wq, scale), ratio)


@pytest.mark.parametrize("longest", [32768, 50])
@pytest.mark.parametrize(("M", "C", "F"), [(1, 16, 1), (5, 64, 33), (66, 16, 1), (70, 64, 32), (66, 32, 60)])
def test_in_fp8_it_is_what_quantising_its_result_gives(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, M: int, C: int, F: int, longest: int, dtype: torch.dtype
) -> None:
    """Value by value; few rows after the joint kernel, many in one with the activation unless a row is too long."""
    from fastdllm.kernels.linear import triton as linear
    from fastdllm.kernels.silu_mul import triton

    monkeypatch.setattr(triton, "LONGEST", longest)
    weight, scale = quantize_weight(torch.randn(2 * F, C, device=device) * C**-0.5, "fp8")
    x = torch.randn(1, M, C, device=device).to(dtype)
    x[:, 0] = 0
    got = triton.linear_silu_mul_fp8(x, weight, scale)
    want = linear.as_fp8(triton.linear_silu_mul(x, weight, scale)[0])
    assert got.dtype == dtype and got.shape == (1, M, F)
    assert torch.equal(got.values[0].float(), want.values.float()) and torch.equal(got.scale[0], want.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("F", [12288, 16384, 18944])
def test_long_rows_in_fp8(F: int) -> None:
    from fastdllm.kernels.linear import triton as linear
    from fastdllm.kernels.silu_mul import triton

    gate_up = torch.randn(300, 2 * F, device="cuda").bfloat16()
    got, want = triton.silu_mul_fp8(gate_up), linear.quantize_rows(triton.silu_mul(gate_up))
    assert torch.equal(got.values.float(), want.values.float()) and torch.equal(got.scale, want.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "fp8", "int8", "int4"])
@pytest.mark.parametrize("M", [8, 32, 64])
def test_every_tiling(assert_close, M: int, kind: str) -> None:
    """The launch configurations of real widths: they must fit the device's shared memory."""
    from fastdllm.kernels.silu_mul import triton

    device = torch.device("cuda")
    for F in (12288, 18944):
        wq, scale = torch.randn(2 * F, 1024, device=device).bfloat16() / 32, None
        if kind != "plain":
            wq, scale = quantize_weight(wq, kind)
        x = torch.randn(M, 1024, device=device).bfloat16()
        assert_close(triton.linear_silu_mul(x, wq, scale), reference.linear_silu_mul(x, wq, scale), 1e-2)

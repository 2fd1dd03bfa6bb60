# SPDX-License-Identifier: Apache-2.0
"""RMS norm: the reference against float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from fastdllm.kernels.linear.reference import quantize_weight
from fastdllm.kernels.rmsnorm import reference

pytestmark = pytest.mark.each_choice


@pytest.mark.parametrize("residual", [False, True])
def test_reference_against_float64(residual: bool) -> None:
    x, r, weight = torch.randn(3, 5, 60), torch.randn(3, 5, 60), torch.randn(60)
    y, h = reference.rmsnorm(x, weight, 1e-5, r if residual else None)
    want = (x + r if residual else x).double()
    for i in range(3):
        for j in range(5):
            mean = sum(v * v for v in want[i, j].tolist()) / 60
            torch.testing.assert_close(
                y[i, j].double(), want[i, j] / (mean + 1e-5) ** 0.5 * weight.double(), rtol=1e-5, atol=1e-6
            )
    torch.testing.assert_close(h.double(), want, rtol=1e-6, atol=1e-6)


def test_rounds_before_the_weight() -> None:
    """As transformers does: the normalised value is cast down first, then multiplied."""
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    y, _ = reference.rmsnorm(x, weight, 1e-6)
    plain, _ = reference.rmsnorm(x, torch.ones_like(weight), 1e-6)
    assert torch.equal(y, plain * weight)


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 63), (2, 5, 64), (33, 111), (2, 4096)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_kernel(
    device: torch.device, assert_close, shape: tuple[int, ...], residual: bool, dtype: torch.dtype, ratio: float
) -> None:
    from fastdllm.kernels.rmsnorm import triton

    x, r = torch.randn(2, *shape, device=device).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    r = r if residual else None
    want_y, want_h = reference.rmsnorm(x, weight, 1e-5, r)
    y, h = triton.rmsnorm(x, weight, 1e-5, r)
    assert y.dtype == want_y.dtype
    assert_close(h, want_h, ratio)
    assert_close(y, want_y, ratio)


@pytest.mark.parametrize("kind", ["plain", "fp8", "int8", "int4"])
@pytest.mark.parametrize(("M", "C", "N"), [(1, 16, 1), (5, 60, 33), (33, 512, 64), (3, 544, 100), (70, 64, 32)])
def test_after_a_product(
    device: torch.device, assert_close, M: int, C: int, N: int, kind: str, dtype: torch.dtype, ratio: float
) -> None:
    """Narrow products come as partial sums; shapes that the bulk copy engine cannot read, and many rows, come whole."""
    from fastdllm.kernels.rmsnorm import triton

    wq, scale = torch.randn(N, C, device=device).to(dtype) * C**-0.5, None
    if kind != "plain":
        wq, scale = quantize_weight(wq, kind)
    x, r = torch.randn(1, M, C, device=device).to(dtype), torch.randn(1, M, N, device=device).to(dtype)
    weight = torch.randn(N, device=device).to(dtype)
    want_y, want_h = reference.linear_rmsnorm(x, wq, weight, 1e-5, r, scale)
    y, h = triton.linear_rmsnorm(x, wq, weight, 1e-5, r, scale)
    assert y.dtype == h.dtype == dtype
    # The interpreter truncates tokens to fp8 where the hardware rounds. 4-bit weights are rounded to the dtype when widened.
    ratio *= 2 if kind == "int4" else 1
    ratio = 0.15 if kind == "fp8" and device.type == "cpu" else 2 * max(ratio, 2e-3 if kind == "fp8" else 0)
    assert_close(h, want_h, ratio)
    assert_close(y, want_y, ratio)


@pytest.mark.parametrize("kind", ["plain", "fp8"])
@pytest.mark.parametrize(("M", "C", "N"), [(1, 16, 1), (5, 60, 33), (33, 512, 64), (3, 544, 100), (70, 64, 32)])
def test_in_fp8_it_is_what_quantising_its_result_gives(
    device: torch.device, M: int, C: int, N: int, kind: str, dtype: torch.dtype
) -> None:
    """Value by value, of rows of zeros too."""
    from fastdllm.kernels.linear import triton as linear
    from fastdllm.kernels.rmsnorm import triton

    wq, scale = torch.randn(N, C, device=device).to(dtype) * C**-0.5, None
    if kind == "fp8":
        wq, scale = quantize_weight(wq, kind)
    x, r = torch.randn(1, M, C, device=device).to(dtype), torch.randn(1, M, N, device=device).to(dtype)
    x[:, 0], r[:, 0] = 0, 0
    weight = torch.randn(N, device=device).to(dtype)
    y, h = triton.linear_rmsnorm(x, wq, weight, 1e-5, r, scale)
    got, got_h = triton.linear_rmsnorm_fp8(x, wq, weight, 1e-5, r, scale)
    want = linear.as_fp8(linear.flat(y))
    assert got.dtype == dtype and got.shape == y.shape and torch.equal(got_h, h)
    assert torch.equal(got.values[0].float(), want.values.float()) and torch.equal(got.scale[0], want.scale)


@pytest.mark.parametrize(("M", "C", "N"), [(5, 60, 33), (33, 512, 64), (70, 64, 32)])
def test_a_product_takes_tokens_in_fp8_as_it_quantises_them(
    device: torch.device, assert_close, M: int, C: int, N: int, dtype: torch.dtype
) -> None:
    from fastdllm.kernels.linear import triton as linear

    weight, scale = quantize_weight(torch.randn(N, C, device=device), "fp8")
    x = torch.randn(2, M, C, device=device).to(dtype)
    tokens = reference.quantize_tokens(x)
    want = reference.linear(x, weight, scale)
    assert torch.equal(reference.linear(tokens, weight, scale), want)
    out = linear.linear(tokens, weight, scale)
    assert out.shape == want.shape and out.dtype == dtype
    assert_close(out, want, 1e-2)
    with pytest.raises(TypeError, match="need weights in fp8"):
        linear.linear(tokens, torch.randn(N, C, device=device))

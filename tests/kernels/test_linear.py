# SPDX-License-Identifier: Apache-2.0
"""Quantised linears: the weight's error bound, the reference against float64, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.linear import reference
from fastdllm.kernels.linear.reference import FP8, WIDE_ROWS


def weight(N: int, C: int, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Channels of very different sizes, one of them zero."""
    w = torch.randn(N, C, device=device) * torch.logspace(-3, 2, N, device=device)[:, None]
    w[N // 2] = 0
    return reference.quantize_weight(w, kind)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.5), ("fp8", 16.0)])
def test_quantised_weights_are_near(kind: str, bound: float) -> None:
    """int8 is half a step off at most; e4m3 keeps 3 bits, so half a step at its largest, 448, is 16."""
    w = torch.randn(33, 60) * torch.logspace(-3, 2, 33)[:, None]
    w[4] = 0
    wq, scale = reference.quantize_weight(w, kind)
    assert wq.shape == w.shape and wq.element_size() == 1 and scale.shape == (33,) and scale.dtype == torch.float32
    assert ((wq.float() * scale[:, None] - w).abs() <= bound * 1.001 * scale[:, None]).all()
    assert (wq[4].float() == 0).all()


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="quantize='int4' is not one of fp8, int8"):
        reference.quantize_weight(torch.zeros(1, 1), "int4")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_reference_against_float64(assert_close, kind: str) -> None:
    wq, scale = weight(17, 60, kind, torch.device("cpu"))
    x, bias = torch.randn(2, 5, 60), torch.randn(17)
    want = x.double() @ (wq.double() * scale.double()[:, None]).T + bias.double()
    assert_close(reference.linear(x, wq, scale, bias), want, 1e-6)


def test_wide_fp8_quantises_tokens_alone(assert_close) -> None:
    """Each token has its own scale: one that is a million times larger does not flush the others to zero."""
    wq, scale = weight(16, 64, "fp8", torch.device("cpu"))
    x = torch.randn(WIDE_ROWS, 64)
    x[3] *= 1e6
    y = reference.linear(x, wq, scale)
    want = x @ (wq.float() * scale[:, None]).T
    others = torch.arange(WIDE_ROWS) != 3
    assert_close(y[others], want[others], 0.04)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(("M", "C", "N"), [(1, 16, 1), (5, 60, 33), (33, 128, 64), (32, 272, 100)])
def test_stream(
    device: torch.device, assert_close, M: int, C: int, N: int, kind: str, dtype: torch.dtype, ratio: float
) -> None:
    from fastdllm.kernels.linear import triton

    wq, scale = weight(N, C, kind, device)
    x, bias = torch.randn(M, C, device=device).to(dtype), torch.randn(N, device=device).to(dtype)
    for b in (None, bias):
        out = triton.linear(x, wq, scale, b)
        assert out.dtype == dtype
        assert_close(out, reference.linear(x, wq, scale, b), ratio)


def test_leading_dimensions(device: torch.device, assert_close) -> None:
    from fastdllm.kernels.linear import triton

    wq, scale = weight(48, 64, "int8", device)
    x = torch.randn(2, 3, 64, device=device)
    assert_close(triton.linear(x, wq, scale), reference.linear(x, wq, scale), 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("M", [WIDE_ROWS, 1256])
def test_wide(assert_close, M: int, kind: str) -> None:
    """fp8 passes the tokens through cuBLAS's scaled product; a rounding that falls the other way is an fp8 step."""
    from fastdllm.kernels.linear import triton

    device = torch.device("cuda")
    wq, scale = weight(512, 1024, kind, device)
    x, bias = torch.randn(M, 1024, device=device).bfloat16(), torch.randn(512, device=device).bfloat16()
    assert_close(triton.linear(x, wq, scale, bias), reference.linear(x, wq, scale, bias), 6e-3)


@pytest.mark.parametrize("C", [16, 1000])
def test_token_quantisation(device: torch.device, assert_close, C: int) -> None:
    from fastdllm.kernels.linear import triton

    x = (torch.randn(5, C, device=device) * torch.logspace(-4, 4, 5, device=device)[:, None]).bfloat16()
    x[2] = 0
    xq, scale = triton.quantize_rows(x)
    want, want_scale = reference._scaled(x, reference.FP8_MAX)
    assert_close(scale, want_scale, 1e-6)
    # The interpreter truncates to fp8, an error of a quarter of a step on average; compiled, only ties may differ.
    assert_close(xq.float(), want.to(FP8).float(), 1e-3 if device.type == "cuda" else 0.08)

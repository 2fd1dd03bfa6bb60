# SPDX-License-Identifier: Apache-2.0
"""Quantised linears: the weight's error bound, the reference against float64, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.linear import reference
from fastdllm.kernels.linear.reference import FP8, FP8_MAX

pytestmark = pytest.mark.pairwise


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


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_of_any_magnitude_are_quantised_alike(kind: str) -> None:
    """Scaled by a power of two, a row has the same numbers and another scale."""
    w = torch.randn(1, 64)
    want, scale = reference.quantize_weight(w, kind)
    for power in (-100, -60, -40, 60, 100):
        got, other = reference.quantize_weight(w * 2.0**power, kind)
        assert torch.equal(got.float(), want.float()) and torch.equal(other, scale * 2.0**power)
    nothing, scale = reference.quantize_weight(torch.tensor([[0.0, 0.0], [1e-45, 0.0]]), kind)
    assert (nothing[0].float() == 0).all() and scale.isfinite().all() and (scale > 0).all()


def test_small_tokens_are_quantised_as_by_the_reference(device: torch.device) -> None:
    from fastdllm.kernels.linear import triton

    x = torch.randn(5, 64, device=device).bfloat16() * torch.logspace(-30, 0, 5, device=device)[:, None].bfloat16()
    x[2] = 0
    got, want = triton.quantize_rows(x), reference.quantize_tokens(x)
    assert torch.equal(got.scale, want.scale) and (got.values[2].float() == 0).all()
    assert (got.values.float().abs().amax(1)[[0, 1, 3, 4]] == FP8_MAX).all()


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="quantize='int3' is not one of fp8, int8, int4"):
        reference.quantize_weight(torch.zeros(1, 1), "int3")


def test_reference_against_float64(assert_close) -> None:
    x, bias = torch.randn(2, 5, 60), torch.randn(17)
    plain = torch.randn(17, 60)
    assert_close(reference.linear(x, plain, None, bias), x.double() @ plain.double().T + bias.double(), 1e-6)
    wq, scale = weight(17, 60, "int8", x.device)
    want = x.double() @ (wq.double() * scale.double()[:, None]).T + bias.double()
    assert_close(reference.linear(x, wq, scale, bias), want, 1e-6)
    wq, scale = weight(17, 60, "fp8", x.device)
    token = x.double().abs().amax(-1, keepdim=True) / FP8_MAX
    xq = (x.double() / token).float().to(FP8).double() * token
    want = xq @ (wq.double() * scale.double()[:, None]).T + bias.double()
    assert_close(reference.linear(x, wq, scale, bias), want, 1e-3)


def test_fp8_quantises_each_token_alone(assert_close) -> None:
    """One token that is a million times larger does not flush the others to zero."""
    wq, scale = weight(16, 64, "fp8", torch.device("cpu"))
    x = torch.randn(9, 64)
    x[3] *= 1e6
    y = reference.linear(x, wq, scale)
    want = x @ (wq.float() * scale[:, None]).T
    others = torch.arange(9) != 3
    assert_close(y[others], want[others], 0.04)


SHAPES = [(1, 16, 1), (5, 60, 33), (33, 128, 64), (32, 272, 100)]


@pytest.mark.parametrize("kind", ["plain", "fp8", "int8", "int4"])
@pytest.mark.parametrize(("M", "C", "N"), SHAPES)
def test_linear(
    device: torch.device, assert_close, M: int, C: int, N: int, kind: str, dtype: torch.dtype, ratio: float
) -> None:
    from fastdllm.kernels.linear import triton

    wq, scale = (torch.randn(N, C, device=device).to(dtype), None) if kind == "plain" else weight(N, C, kind, device)
    x, bias = torch.randn(M, C, device=device).to(dtype), torch.randn(N, device=device).to(dtype)
    if kind == "fp8":
        # The interpreter truncates tokens to fp8; the hardware's fp8 product adds in fewer bits than fp32.
        ratio = 0.15 if device.type == "cpu" else max(ratio, 2e-3)
    for b in (None, bias):
        out = triton.linear(x, wq, scale, b)
        assert out.dtype == dtype
        assert_close(out, reference.linear(x, wq, scale, b), ratio)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("M", "C", "N"), [(1, 16, 1), (33, 128, 64), (32, 272, 100)])
@pytest.mark.usefixtures("descriptors")
def test_partial_sums_add_up(device: torch.device, assert_close, M: int, C: int, N: int, splits: int) -> None:
    """fp8 by fp8, on tokens quantised beforehand; more splits than tiles of channels leave some sums empty."""
    from fastdllm.kernels.linear import triton

    (wq, scale), (xq, token_scale) = weight(N, C, "fp8", device), weight(M, C, "fp8", device)
    tile = triton.tiling(M, N, wq.dtype) | {"splits": splits, "block_c": 64}
    out = triton.skinny(xq, wq, scale, None, token_scale, torch.float32, **tile)
    assert out.shape == (splits, M, N) and out.dtype == torch.float32
    want = (xq.double() * token_scale[:, None]) @ (wq.double() * scale[:, None]).T
    assert_close(out.sum(0), want, 1e-6 if device.type == "cpu" else 2e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("M", "C", "N"), [(65, 16, 16), (130, 272, 144), (256, 1040, 48), (100, 9216, 16), (300, 2064, 304)]
)
@pytest.mark.usefixtures("descriptors")
def test_fp8_products_of_some_hundred_rows(device: torch.device, assert_close, M: int, C: int, N: int, bias: bool) -> None:
    """Tiles of all widths, with and without a part of the channels each; the library's product is their equal."""
    from fastdllm.kernels.linear import fp8

    (wq, scale), (xq, token_scale) = weight(N, C, "fp8", device), weight(M, C, "fp8", device)
    added = torch.randn(N, device=device).bfloat16() if bias else None
    want = (xq.double() * token_scale[:, None]) @ (wq.double() * scale[:, None]).T + (added.double() if bias else 0)
    tile = fp8.tiling(M, N, C, device)
    assert tile is not None
    wide = fp8.tiling(640, 3584, 18944, device)
    assert wide is not None and wide["block_n"] == 2 * fp8.TILE
    for chosen in (tile, tile | {"splits": 1}, tile | {"splits": 3}, wide, wide | {"splits": 1}):
        out = fp8.fp8_product(xq, wq, scale, added, token_scale, torch.float32, **chosen)
        assert out.shape == (chosen["splits"], M, N)
        # Hopper adds fp8 products up in some 14 bits (DeepSeek-V3, arXiv 2412.19437), so that long sums err more.
        assert_close(out.sum(0), want, 1e-6 if device.type == "cpu" else 4e-3 if C > 4096 else 2e-3)


def test_fp8_products_of_many_tiles_belong_to_the_library(device: torch.device) -> None:
    from fastdllm.kernels.linear import fp8

    assert fp8.tiling(256, 37888, 3584, device) is None and fp8.tiling(4096, 3584, 18944, device) is None
    assert fp8.tiling(256, 3584, 18944, device) is not None


def test_channels_are_shared_where_that_needs_no_third_round_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdllm.kernels.linear import fp8

    monkeypatch.setattr(fp8, "multiprocessors", lambda device: 132)
    splits = {M: fp8.tiling(M, 3584, 18944, torch.device("cpu"))["splits"] for M in (640, 768, 769, 1152)}
    assert splits == {640: 3, 768: 3, 769: 1, 1152: 1}


@pytest.mark.usefixtures("descriptors")
def test_bias_is_added_once(device: torch.device, assert_close) -> None:
    from fastdllm.kernels.linear import triton

    x, w = torch.randn(3, 512, device=device).bfloat16(), torch.randn(48, 512, device=device).bfloat16()
    bias = torch.full((48,), 1000.0, device=device).bfloat16()
    parts = triton.skinny(x, w, None, bias, **triton.tiling(3, 48, w.dtype) | {"splits": 4, "block_c": 64})
    assert_close(parts.sum(0).bfloat16(), reference.linear(x, w, None, bias), 1e-2)


def test_leading_dimensions(device: torch.device, assert_close) -> None:
    from fastdllm.kernels.linear import triton

    wq, scale = weight(48, 64, "int8", device)
    x = torch.randn(2, 3, 64, device=device).half()
    assert_close(triton.linear(x, wq, scale), reference.linear(x, wq, scale), 1e-3)


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_many_rows(device: torch.device, assert_close, kind: str) -> None:
    """Past the skinny kernel's rows the library multiplies."""
    from fastdllm.kernels.linear import triton

    wq, scale = (torch.randn(32, 64, device=device).half(), None) if kind == "plain" else weight(32, 64, kind, device)
    x, bias = torch.randn(300, 64, device=device).half(), torch.randn(32, device=device).half()
    assert_close(triton.linear(x, wq, scale, bias), reference.linear(x, wq, scale, bias), 2e-3)


@pytest.mark.parametrize("C", [1, 60, 5000])
def test_widened_weights(device: torch.device, assert_close, C: int, dtype: torch.dtype, ratio: float) -> None:
    """More channels than a program takes, too; the scale is applied before rounding."""
    from fastdllm.kernels.linear import triton

    wq, scale = weight(7, C, "int8", device)
    want = (wq.float() * scale[:, None]).to(dtype)
    assert_close(triton.widen(wq, scale, C, dtype), want, 0.0 if device.type == "cuda" else ratio)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "fp8", "int8", "int4"])
@pytest.mark.parametrize("M", [1, 64, 65, 200, 1256])
def test_every_tiling(assert_close, M: int, kind: str) -> None:
    """The launch configurations of real widths: they must fit the device's shared memory."""
    from fastdllm.kernels.linear import triton

    device = torch.device("cuda")
    for N in (4096, 4608, 12288, 18432):
        wq, scale = (
            (torch.randn(N, 1024, device=device).bfloat16(), None) if kind == "plain" else weight(N, 1024, kind, device)
        )
        x, bias = torch.randn(M, 1024, device=device).bfloat16(), torch.randn(N, device=device).bfloat16()
        assert_close(triton.linear(x, wq, scale, bias), reference.linear(x, wq, scale, bias), 8e-3)


@pytest.mark.parametrize(("M", "C"), [(5, 16), (5, 1000), (5, 5000), (65, 5000), (65, 8192)])
def test_token_quantisation(device: torch.device, assert_close, M: int, C: int) -> None:
    """Rows whole and in pieces."""
    from fastdllm.kernels.linear import triton

    x = (torch.randn(M, C, device=device) * torch.logspace(-4, 4, M, device=device)[:, None]).bfloat16()
    x[2] = 0
    tokens, want = triton.quantize_rows(x), reference.quantize_tokens(x)
    assert_close(tokens.scale, want.scale, 1e-6)
    # The interpreter truncates to fp8, an error of a quarter of a step on average; compiled, only ties may differ.
    assert_close(tokens.values.float(), want.values.float(), 1e-3 if device.type == "cuda" else 0.08)

# SPDX-License-Identifier: Apache-2.0
"""4-bit weights: the error of quantising, the layout, and the product in every shape of group and split."""

from __future__ import annotations

import pytest
import torch

from fastdllm.kernels.linear import int4, reference

pytestmark = pytest.mark.each_choice


@pytest.mark.parametrize("C", [1, 60, 128, 130, 256, 700])
def test_levels_survive_packing(C: int) -> None:
    q = torch.randint(0, 16, (5, C))
    packed = int4.pack(q)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-C // 256) * 128)
    assert torch.equal(int4.unpack(packed, C).long(), q)


def test_layout() -> None:
    """Word j of the second unit holds channels 256 + j, 320 + j, 384 + j and 448 + j, from its low bits on."""
    q = torch.zeros(1, 512)
    q[0, [256 + 5, 320 + 5, 384 + 5, 448 + 5]] = torch.tensor([3.0, 9.0, 5.0, 1.0])
    words = int4.pack(q).view(torch.int16)
    assert words[0, 64 + 5] == 3 + 16 * 9 + 256 * 5 + 4096 * 1 and (words != 0).sum() == 1


@pytest.mark.parametrize(("C", "group"), [(4096, 128), (60, 128), (130, 128), (96, 32), (700, 64), (257, 256)])
def test_group_size_follows_from_shapes(C: int, group: int) -> None:
    """Where one group holds all channels, any size that holds them will do."""
    scale = torch.zeros(3, -(-C // group), 2)
    size = int4.group_size(scale, C)
    assert size == group or (scale.shape[1] == 1 and size >= C)


@pytest.mark.parametrize(("C", "group"), [(60, 128), (384, 128), (200, 64)])
def test_quantised_weights_are_near(C: int, group: int) -> None:
    """No group is further off than rounding to 16 even levels between its ends, and what is zero stays zero."""
    w = torch.randn(17, C) * torch.logspace(-9, 4, 17)[:, None]
    w[:, ::5], w[3], w[5] = 0, 0, w[5].abs() + 1
    weight, scale = int4.quantize(w, group)
    assert scale.shape == (17, -(-C // group), 2) and scale.dtype == torch.bfloat16
    got = int4.widen(weight, scale, C)
    assert got.isfinite().all() and (got[w == 0] == 0).all()
    for part, back in zip(w.split(group, 1), got.split(group, 1), strict=True):
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        # A zero between two levels shifts all by up to half a step; the step is stored in bf16.
        half = (high - low) / 15 * 1.01
        assert ((back - part).abs().amax(1) <= 3 * half[:, 0]).all()
        assert ((back - part).square().mean(1).sqrt() <= half[:, 0]).all()


def test_what_is_no_number_stays_seen_and_the_smallest_weights_vanish() -> None:
    w = torch.randn(3, 300)
    w[1, 7], w[2] = torch.nan, 1e-45
    back = int4.widen(*int4.quantize(w), 300)
    assert back[0].isfinite().all() and back[1, :128].isnan().any() and (back[2] == 0).all()


def test_weights_whose_squares_are_beyond_fp32_are_kept(assert_close) -> None:
    w = torch.randn(4, 256).bfloat16() * torch.tensor([1.0, 1e18, 1e30, 1e37])[:, None].bfloat16()
    weight, scale = int4.quantize(w)
    for got, want in zip(int4.widen(weight, scale, 256), w.double(), strict=True):
        assert_close(got, want, 0.15)


def test_clipping_lowers_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(64, 512)
    found = [(int4.widen(*int4.quantize(w), 512) - w).norm()]
    monkeypatch.setattr(int4, "SHRINK", (1.0,))
    found.append((int4.widen(*int4.quantize(w), 512) - w).norm())
    assert found[0] < found[1]


def test_rows_are_quantised_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, too."""
    w = torch.randn(9, 300)
    whole = int4.quantize(w)
    monkeypatch.setattr(int4, "CHUNK", 600)
    for a, b in zip(whole, int4.quantize(w), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(int4.quantize(w[4:6])[0], whole[0][4:6])


def test_reference_against_float64(assert_close) -> None:
    x, bias = torch.randn(2, 5, 300), torch.randn(17)
    weight, scale = int4.quantize(torch.randn(17, 300))
    levels, steps = int4.unpack(weight, 300).double(), scale.double()
    want = torch.zeros(2, 5, 17, dtype=torch.float64)
    for c in range(300):
        want += x[..., c, None].double() * (levels[:, c] - steps[:, c // 128, 1]) * steps[:, c // 128, 0]
    assert_close(reference.linear(x, weight, scale, bias), want + bias, 1e-6)


@pytest.mark.parametrize("group", [32, 128, 256, 1024])
@pytest.mark.parametrize(("M", "C", "N"), [(3, 600, 33), (130, 256, 70)])
def test_groups(
    device: torch.device, assert_close, M: int, C: int, N: int, group: int, dtype: torch.dtype, ratio: float
) -> None:
    """Groups below half a unit are widened; one may hold all channels. Steps in fp16, as checkpoints have them."""
    from fastdllm.kernels.linear import triton

    weight, scale = int4.quantize(torch.randn(N, C) * torch.logspace(-2, 2, N)[:, None], group)
    weight, scale = weight.to(device), scale.to(device, torch.float16)
    x = torch.randn(M, C).to(device, dtype)
    out = triton.linear(x, weight, scale)
    assert out.dtype == dtype
    assert_close(out, reference.linear(x, weight, scale), ratio)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("M", "C", "N"), [(1, 16, 1), (33, 768, 64), (20, 1100, 130)])
@pytest.mark.usefixtures("descriptors")
def test_partial_sums_add_up(
    device: torch.device, monkeypatch, assert_close, M: int, C: int, N: int, splits: int, ahead: bool
) -> None:
    """Whether steps are loaded a unit ahead, as on Hopper, or where they are used."""
    from fastdllm.kernels.linear import triton

    monkeypatch.setattr(triton, "reads_shared", lambda device: ahead)
    weight, scale = (t.to(device) for t in int4.quantize(torch.randn(N, C)))
    x = torch.randn(M, C, device=device).half()
    out = triton.skinny(x, weight, scale, None, **triton.tiling(M, N, weight.dtype) | {"splits": splits})
    assert out.shape == (splits, M, N)
    assert_close(out.sum(0, dtype=torch.float32), x.double() @ int4.widen(weight, scale, C).double().T, 2e-3)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("C", [1, 60, 700, 5000])
def test_widened_weights(device: torch.device, assert_close, C: int, group: int, dtype: torch.dtype, ratio: float) -> None:
    from fastdllm.kernels.linear import triton

    weight, scale = (t.to(device) for t in int4.quantize(torch.randn(7, C), group))
    want = int4.widen(weight, scale, C).to(dtype)
    assert_close(triton.widen(weight, scale, C, dtype), want, 0.0 if device.type == "cuda" else ratio)

# SPDX-License-Identifier: Apache-2.0
"""Products of 4-bit weights on Hopper agree with the reference and with Triton's."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.linear import int4, reference

# M, N, C, channels that share a step.
SHAPES = [(1, 96, 256, 128), (5, 1000, 4112, 128), (33, 642, 272, 128), (64, 640, 4096, 4096), (130, 136, 1024, 256)]


def both(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What it gives through these kernels, and through Triton's."""
    from fastdllm.kernels.linear import hopper_int4

    found = run()
    with mock.patch.object(hopper_int4, "applies", return_value=False):
        return found, run()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(64, 1, 4, 2), (64, 4, 4, 3), (128, 2, 8, 4)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("M", "N", "C", "group"), SHAPES)
def test_products(
    hopper_card: torch.device, assert_close, M: int, N: int, C: int, group: int, bias: bool, tile: tuple[int, ...]
) -> None:
    """Few channels leave stages, and whole programs, without a unit."""
    from fastdllm.kernels.linear import hopper_int4, triton

    w, scale = int4.quantize(torch.randn(N, C, device=hopper_card).bfloat16() * C**-0.5, group)
    x = torch.randn(M, C, device=hopper_card).bfloat16()
    added = torch.randn(N, device=hopper_card).bfloat16() if bias else None
    chosen = dict(zip(("block_n", "splits", "num_warps", "num_stages"), tile, strict=True))
    chosen |= {"block_m": hopper_int4.rows_of_tile(M), "block_c": 256}
    assert hopper_int4.applies(x, w, scale)
    got = triton.skinny(x, w, scale, added, **chosen)
    assert got.shape == (tile[1], M, N)
    exact = x.double() @ int4.widen(w, scale, C).double().T + (0 if added is None else added.double())
    assert_close(got.sum(0, dtype=torch.float32), exact, 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 5, 16, 33, 64, 130])
def test_the_operations_of_real_widths(hopper_card: torch.device, assert_close, M: int) -> None:
    """With the tiles that they choose, which must fit the device's shared memory, and x that is a view."""
    from fastdllm.kernels.linear import triton
    from fastdllm.kernels.silu_mul import triton as silu_mul_triton

    for N, C in ((3584, 18944), (4096, 4096), (4608, 3584), (12288, 1024), (2 * 18944, 512), (1024, 8192), (1024, 8448)):
        w, scale = int4.quantize(torch.randn(N, C, device=hopper_card).bfloat16() * C**-0.5)
        x = torch.randn(M, C + 8, device=hopper_card).bfloat16()[:, :C]
        assert_close(triton.linear(x, w, scale), reference.linear(x, w, scale), 8e-3)
        got, want = both(lambda w=w, scale=scale, x=x: silu_mul_triton.linear_silu_mul(x, w, scale))
        assert_close(got, want, 1e-2)


@pytest.mark.gpu
def test_steps_of_a_checkpoint_may_be_fp16(hopper_card: torch.device, assert_close) -> None:
    from fastdllm.kernels.linear import hopper_int4, triton
    from fastdllm.kernels.silu_mul import triton as silu_mul_triton

    w, scale = int4.quantize(torch.randn(2 * 640, 1024, device=hopper_card).bfloat16())
    x, halves = torch.randn(21, 1024, device=hopper_card).bfloat16(), scale.half()
    assert hopper_int4.applies(x, w, halves)
    assert_close(triton.linear(x, w, halves), reference.linear(x, w, halves), 8e-3)
    got, want = both(lambda: silu_mul_triton.linear_silu_mul(x, w, halves))
    assert_close(got, want, 1e-2)


@pytest.mark.gpu
def test_what_they_cannot_read_is_left_to_triton(hopper_card: torch.device) -> None:
    from fastdllm.kernels.linear import hopper_int4

    w, scale = int4.quantize(torch.randn(64, 9216, device=hopper_card).bfloat16())
    x = torch.randn(9, 9216, device=hopper_card).bfloat16()
    assert hopper_int4.applies(x, w, scale) and not hopper_int4.gated_applies(x, w, scale)
    assert not hopper_int4.applies(x.half(), w, scale) and not hopper_int4.applies(x[:, 1:], w, scale)
    assert not hopper_int4.applies(x, w, scale.contiguous()) and not hopper_int4.applies(x, w.view(torch.int8), scale)


def test_on_a_cpu_they_do_not_apply() -> None:
    from fastdllm.kernels.linear import hopper_int4

    w, scale = int4.quantize(torch.randn(48, 256))
    assert not hopper_int4.applies(torch.randn(3, 256).bfloat16(), w, scale)


def test_a_program_holds_the_steps_of_its_channels() -> None:
    """Of any width: more splits take what one program cannot. Beside them it holds as many tiles as it wants."""
    from fastdllm.kernels.device import shared_memory
    from fastdllm.kernels.linear import hopper_int4
    from fastdllm.kernels.linear.int4 import UNIT

    cpu = torch.device("cpu")  # taken for an H100
    shapes = (4096, 4096), (4608, 3584), (12288, 4096), (126464, 4096), (8192, 28672), (152064, 16384), (3584, 18944)
    for M in (1, 16, 33, 64, 200):
        for N, C in shapes:
            tile = hopper_int4.tiling(M, N, C)
            halves = 1 << (2 * math.ceil(math.ceil(C / UNIT) / tile["splits"]) - 1).bit_length()
            assert halves <= hopper_int4.MOST_HALVES and tile["block_m"] <= 64
            stages = hopper_int4.stages_of(tile["num_stages"], halves, tile["block_n"], tile["block_m"], cpu)
            held = halves * tile["block_n"] * 4 + stages * (tile["block_n"] * UNIT // 2 + tile["block_m"] * UNIT * 2)
            assert stages == tile["num_stages"] and held + 1024 <= shared_memory(cpu)

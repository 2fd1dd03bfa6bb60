# SPDX-License-Identifier: Apache-2.0
"""Products of few rows on Hopper: they equal Triton's bit by bit (in int8 closely), and fetch weights before their turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.linear import reference
from fastdllm.kernels.linear.reference import FP8
from fastdllm.kernels.silu_mul import reference as silu_mul_reference
from tests.kernels.hopper_ptx import ATTENTION, CASES, WIDE
from tests.processes import python

KINDS = ["bf16", "fp16", "fp8", "int8"]
SHAPES = [(1, 16, 16), (5, 1000, 4112), (16, 136, 272), (33, 40, 528), (64, 4608, 1040)]  # M, N, C


def operands(M: int, N: int, C: int, kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x [M, C], w [N, C] and their scales."""
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    x, w = torch.randn(M, C, device=device).to(dtype), (torch.randn(N, C, device=device) * C**-0.5).to(dtype)
    if kind == "int8":
        return x, *reference.quantize_weight(w, kind), None
    if kind != "fp8":
        return x, w, None, None
    tokens, (wq, scale) = reference.quantize_tokens(x), reference.quantize_weight(w, "fp8")
    return tokens.values, wq, scale, tokens.scale


def both(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What it gives through these kernels, and through Triton's."""
    from fastdllm.kernels.linear import hopper

    found = run()
    with mock.patch.object(hopper, "applies", return_value=False):
        return found, run()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tile", "bias"), [((64, 128, 3, 1), True), ((64, 64, 5, 4), True), ((128, 256, 2, 3), False)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "N", "C"), SHAPES)
def test_products(
    hopper_card: torch.device, assert_close, M: int, N: int, C: int, kind: str, bias: bool, tile: tuple[int, ...]
) -> None:
    """Few channels leave stages, and whole programs, without a tile."""
    from fastdllm.kernels.linear import triton

    x, w, scale, token_scale = operands(M, N, C, kind, hopper_card)
    added = torch.randn(N, device=hopper_card).bfloat16() if bias else None
    chosen = dict(zip(("block_n", "block_c", "num_stages", "splits"), tile, strict=True))
    chosen |= {"block_m": triton.tiling(M, N, w.dtype)["block_m"], "num_warps": 4}
    if kind == "int8":  # in whole units, and in another order
        chosen["block_c"] = 256
    got, want = both(lambda: triton.skinny(x, w, scale, added, token_scale, torch.bfloat16, **chosen))
    assert got.shape == (tile[-1], M, N) and (kind == "int8" or torch.equal(got, want))
    exact = (x.double() * (1 if token_scale is None else token_scale[:, None])) @ w.double().T
    exact = exact * (1 if scale is None else scale) + (0 if added is None else added.double())
    assert_close(got.sum(0, dtype=torch.float32), exact, 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(32, 128, 3), (64, 64, 4), (32, 256, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "F", "C"), SHAPES)
def test_gate_and_up(
    hopper_card: torch.device, assert_close, M: int, F: int, C: int, kind: str, tile: tuple[int, ...]
) -> None:
    from fastdllm.kernels.silu_mul import triton

    x, w, scale, token_scale = operands(M, 2 * F, C, kind, hopper_card)
    chosen = dict(zip(("block_n", "block_c", "num_stages"), tile, strict=True))
    chosen |= {"block_m": triton.tiling(M, F, w.dtype)["block_m"], "num_warps": 4}
    if kind == "int8":
        chosen["block_c"] = 256
    got, want = both(lambda: triton.launch(x, w, scale, token_scale, torch.bfloat16, **chosen))
    assert_close(got, want, 1e-2 if kind == "int8" else 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 5, 16, 33, 64])
def test_the_operations_of_real_widths(hopper_card: torch.device, assert_close, M: int, kind: str) -> None:
    """With the tiles that they choose, which must fit the device's shared memory, and x that is a view."""
    from fastdllm.kernels.linear import triton
    from fastdllm.kernels.silu_mul import triton as silu_mul_triton

    for N, C in ((3584, 3584), (3584, 8192), (4096, 4096), (4608, 3584), (12288, 1024), (2 * 18944, 1024)):
        _, w, scale, _ = operands(1, N, C, kind, hopper_card)
        x = torch.randn(M, C + 8, device=hopper_card).to(torch.float16 if kind == "fp16" else torch.bfloat16)[:, :C]
        bias = torch.randn(N, device=hopper_card).to(x.dtype)
        assert_close(triton.linear(x, w, scale, bias), reference.linear(x, w, scale, bias), 8e-3)
        want = silu_mul_reference.linear_silu_mul(x, w, scale)
        assert_close(silu_mul_triton.linear_silu_mul(x, w, scale), want, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [65, 130, 256])
def test_int8_of_more_rows(hopper_card: torch.device, assert_close, M: int) -> None:
    from fastdllm.kernels.linear import hopper, triton

    for N, C in ((4096, 4096), (3584, 18944), (12288, 1040)):
        _, w, scale, _ = operands(1, N, C, "int8", hopper_card)
        x = torch.randn(M, C, device=hopper_card).bfloat16()
        assert hopper.applies(x, w)
        assert_close(triton.linear(x, w, scale), reference.linear(x, w, scale), 8e-3)


@pytest.mark.parametrize("C", [16, 240, 256, 272, 1040, 4112])
@pytest.mark.parametrize("M", [1, 7])
def test_the_channels_of_a_unit_are_paired(device: torch.device, M: int, C: int) -> None:
    from fastdllm.kernels.linear import hopper

    x = torch.randn(M, C + 8, device=device).bfloat16()[:, :C]
    want = torch.nn.functional.pad(x, (0, -C % 256)).view(M, -1, 64, 2, 2).transpose(2, 3).reshape(M, -1)
    assert torch.equal(hopper.paired(x), want)


@pytest.mark.gpu
def test_each_byte_is_widened_to_its_value(hopper_card: torch.device) -> None:
    """Exactly, wherever in a row of weights it lies."""
    from fastdllm.kernels.linear import hopper, triton

    C = 512
    w = torch.arange(-128, 128, device=hopper_card).to(torch.int8).repeat(2)[None, :].repeat(64, 1)
    w = torch.stack([row.roll(i) for i, row in enumerate(w)])
    x = torch.eye(C, device=hopper_card).bfloat16()
    scale = torch.ones(64, device=hopper_card)
    assert hopper.applies(x, w)
    for rows in x.split(64):
        got = triton.skinny(rows, w, scale, None, **triton.tile_of(rows, w))
        assert torch.equal(got.float().sum(0), rows.float() @ w.float().T)


@pytest.mark.gpu
def test_without_dependent_launches(hopper_card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with FASTDLLM_PDL=0."""
    from fastdllm.kernels.linear import hopper, triton
    from fastdllm.kernels.silu_mul import triton as silu_mul_triton

    x, w, scale, token_scale = operands(8, 4608, 3584, "fp8", hopper_card)
    given, gated = (x, w, scale, None, token_scale, torch.bfloat16), (x, w, scale, token_scale, torch.bfloat16)
    want = triton.skinny(*given, **triton.tile_of(x, w)), silu_mul_triton.launch(*gated, **silu_mul_triton.tile_of(x, w))
    monkeypatch.setattr(hopper, "LAUNCH", {})
    assert torch.equal(triton.skinny(*given, **triton.tile_of(x, w)), want[0])
    assert torch.equal(silu_mul_triton.launch(*gated, **silu_mul_triton.tile_of(x, w)), want[1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8"])
def test_a_chain_of_products_waits_for_what_it_reads(hopper_card: torch.device, assert_close, kind: str) -> None:
    """Each product reads what the kernel just before it wrote."""
    from fastdllm.kernels.linear import hopper, triton

    layers = [torch.randn(4096, 4096, device=hopper_card).bfloat16() / 64 for _ in range(24)]
    weights = [(w, None) if kind == "bf16" else reference.quantize_weight(w, kind) for w in layers]
    start = torch.randn(32, 4096, device=hopper_card).bfloat16()

    def run() -> Tensor:
        x = start
        for w, scale in weights:  # one part, so that the next product, or its quantisation, comes right behind
            rows = triton.quantize_rows(x) if kind == "fp8" else None
            given = (x, w, scale, None) if rows is None else (rows.values, w, scale, None, rows.scale, x.dtype)
            x = triton.skinny(*given, **triton.tiling(32, 4096, w.dtype) | {"splits": 1})[0]
        return x

    assert hopper.applies(start, layers[0])
    got, want = both(run)
    assert_close(got, want, 5e-2 if kind == "int8" else 0.0)
    for _ in range(20):
        assert torch.equal(run(), got)


@pytest.mark.gpu
def test_what_the_copy_engine_cannot_read_is_left_to_triton(hopper_card: torch.device, assert_close) -> None:
    from fastdllm.kernels.linear import hopper, triton

    w, x = torch.randn(64, 256, device=hopper_card).bfloat16(), torch.randn(9 * 256 + 1, device=hopper_card).bfloat16()
    shifted, row = x[1:].view(9, 256), x[: 256 * 9 : 9].view(1, 256)
    assert not hopper.applies(shifted, w) and not hopper.applies(x[:0].view(0, 256), w)
    assert not hopper.applies(x[:2304].view(9, 256), w.t().contiguous().t())
    assert not hopper.applies(x[:2304].view(9, 256).half(), w.to(torch.int8)) and hopper.applies(x[:2304].view(9, 256), w)
    for rows in (shifted, row, torch.randn(256, 1, device=hopper_card).bfloat16().t()):
        assert_close(triton.linear(rows, w), reference.linear(rows, w), 8e-3)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8"])
@pytest.mark.usefixtures("descriptors")
def test_where_they_apply_products_are_theirs(device: torch.device, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With every argument: here they hand the product back to Triton."""
    from fastdllm.kernels.linear import hopper, triton
    from fastdllm.kernels.silu_mul import triton as silu_mul_triton

    x, bias = torch.randn(3, 64, device=device).bfloat16(), torch.randn(48, device=device).bfloat16()
    w, scale = torch.randn(48, 64, device=device).bfloat16(), None
    if kind != "bf16":
        w, scale = reference.quantize_weight(w, kind)
    want = triton.linear(x, w, scale, bias), silu_mul_triton.linear_silu_mul(x, w, scale)
    seen: list[str] = []

    def back(name: str, launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Tensor, **tile: int) -> Tensor:
            seen.append(name)
            with mock.patch.object(hopper, "applies", return_value=False):
                return launch(*args, **tile)

        return run

    monkeypatch.setattr(hopper, "applies", lambda x, w: True)
    monkeypatch.setattr(hopper, "product", back("product", triton.skinny))
    monkeypatch.setattr(hopper, "gated_product", back("gated_product", silu_mul_triton.launch))
    assert torch.equal(triton.linear(x, w, scale, bias), want[0]) and seen == ["product"]
    assert torch.equal(silu_mul_triton.linear_silu_mul(x, w, scale), want[1]) and seen == ["product", "gated_product"]


def test_their_tiles_differ_where_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile of theirs has the same arguments as Triton's, and fits a Hopper's shared memory."""
    from fastdllm.kernels.device import SCRATCH, shared_memory
    from fastdllm.kernels.linear import hopper, triton
    from fastdllm.kernels.silu_mul import triton as silu_mul_triton

    room = shared_memory(torch.device("cpu")) - SCRATCH  # taken for an H100

    def tiles(M: int, N: int, C: int, dtype: torch.dtype) -> list[dict[str, int]]:
        x = torch.empty(M, C, dtype=torch.bfloat16 if dtype == torch.int8 else dtype, device="meta")
        w = torch.empty(N, C, dtype=dtype, device="meta")
        return [module.tile_of(x, w) for module in (triton, silu_mul_triton)]

    shapes = [(M, N, C, dtype) for M in (1, 8, 32, 64, 200)
              for N, C in ((3584, 3584), (3584, 18944), (4608, 3584), (37888, 3584), (4096, 12288), (24576, 4096))
              for dtype in (torch.bfloat16, FP8, torch.int8)]  # fmt: skip
    as_they_are = [tiles(*shape) for shape in shapes]
    monkeypatch.setattr(hopper, "applies", lambda x, w: True)
    changed = 0
    for (M, *_, dtype), usual, found in zip(shapes, as_they_are, (tiles(*shape) for shape in shapes), strict=True):
        for before, tile, halves in zip(usual, found, (1, 2), strict=True):
            assert tile.keys() == before.keys()
            assert dtype != torch.int8 or tile["block_c"] % hopper.PAIRED == 0
            if tile != before and (halves == 1 or M <= triton.SKINNY_ROWS):
                changed += 1
                of_x = 2 if dtype == torch.int8 else dtype.itemsize
                size = (halves * tile["block_n"] * dtype.itemsize + tile["block_m"] * of_x) * tile["block_c"]
                assert tile["num_stages"] * size <= room
    assert changed


def test_on_a_cpu_they_do_not_apply() -> None:
    from fastdllm.kernels.linear import hopper

    for dtype in (torch.bfloat16, FP8, torch.int8):
        x = torch.zeros(16, 16).to(torch.bfloat16 if dtype == torch.int8 else dtype)
        assert not hopper.applies(x, torch.zeros(16, 16).to(dtype))


def test_without_gluon_products_are_tritons() -> None:
    """An older Triton has none, or another."""
    code = (
        "import os, sys; os.environ['TRITON_INTERPRET'] = '1'; sys.modules['triton.experimental.gluon'] = None\n"
        "import torch\n"
        "from fastdllm.kernels.linear import hopper, triton\n"
        "x = torch.ones(2, 16)\n"
        "print(hopper.GLUON, hopper.applies(x, x), triton.linear(x, x).tolist() == [[16.0, 16.0]] * 2)"
    )
    done = python(code)
    assert done.stdout == "False False True\n", done.stderr


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    from fastdllm.kernels.linear import hopper

    if not hopper.GLUON:
        pytest.skip("this Triton lacks what the kernels need of Gluon")
    done = python("from tests.kernels import hopper_ptx; hopper_ptx.main()")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if "w" in case[2]])
def test_weights_are_fetched_before_the_wait_and_x_after_it(compiled: dict[str, Any], case: str) -> None:
    """That is what the kernels are for: a ring full of weights before, and not one tile of x."""
    stages, found = CASES[case][-1]["STAGES"], compiled["events"][case]
    assert found[: stages + 1] == ["w"] * stages + ["wait"]
    assert found[stages + 1 :][:stages] == ["x"] * stages and found.count("wait") == 1
    assert set(found[2 * stages + 1 :]) == {"w", "x"}, "the loop fills the ring again"


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[0] == WIDE])
def test_a_warp_of_its_own_fetches_for_many_queries(compiled: dict[str, Any], case: str) -> None:
    """Nothing before the wait: the kernel before has just written some of it."""
    found = compiled["events"][case]
    assert found[0] == "wait" and set(found[1:]) == {"q", "k", "v"} and found.count("k") == found.count("v")


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[0] == ATTENTION])
def test_keys_and_values_are_fetched_after_the_wait(compiled: dict[str, Any], case: str) -> None:
    """The kernel before has just written some of them."""
    assert compiled["events"][case] == ["wait"] + ["k", "v"] * (CASES[case][-1]["STAGES"] + 1)


def test_programs_fit_the_shared_memory(compiled: dict[str, Any]) -> None:
    """Those that join attention's splits need next to none, and so keep no other kernel waiting for it."""
    from fastdllm.kernels.device import shared_memory

    room = shared_memory(torch.device("cpu"))  # taken for an H100
    for name, size in compiled["shared"].items():
        assert size <= (room // 64 if name.startswith("join") else room), name


def test_launches_give_each_kernel_its_arguments(compiled: dict[str, Any]) -> None:
    """Of a device that takes them; no interpreter runs these kernels."""
    done = python("from tests.kernels import hopper_launches; hopper_launches.main()")
    assert done.returncode == 0, done.stderr
    kernels = {
        "attention.hopper._attend_kernel", "attention.hopper._join_kernel", "attention.hopper_wide._attend_kernel",
        "linear.hopper._product_kernel", "linear.hopper._gated_kernel", "linear.hopper._pair_kernel",
        "linear.hopper_int4._product_kernel", "linear.hopper_int4._gated_kernel",
    }  # fmt: skip
    assert kernels <= json.loads(done.stdout).keys()

# SPDX-License-Identifier: Apache-2.0
"""Attention on Hopper against the reference: split over keys, with the kernel that joins the splits, and of many queries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.attention import reference

pytestmark = pytest.mark.pairwise

TILES = [(16, 1, 1), (16, 8, 2), (32, 4, 2), (32, 2, 3), (64, 2, 1)]  # queries of a tile, splits, stages


def parts(M: int, H: int, S: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Results of S splits and the logarithms of their weights. Of some heads a split saw nothing, of one all did."""
    part, lse = torch.randn(M, H, S, D), torch.randn(M, H, S) * 8
    lse[torch.rand(M, H, S) < 0.3] = -math.inf
    lse[0, 0] = -math.inf
    return part.masked_fill(lse[..., None] == -math.inf, 0).to(device), lse.to(device)


@pytest.mark.parametrize(
    "M, H, S, D", [(1, 1, 1, 64), (5, 7, 2, 64), (3, 28, 8, 128), (32, 32, 4, 128), (2, 40, 4, 64), (2, 64, 8, 128)]
)
def test_splits_weigh_what_they_saw(
    device: torch.device, assert_close, dtype: torch.dtype, ratio: float, M: int, H: int, S: int, D: int
) -> None:
    from fastdllm.kernels.attention import hopper
    from fastdllm.kernels.linear import triton as linear

    part, lse = parts(M, H, S, D, device)
    weight = torch.where(lse == -math.inf, 0, 2.0 ** (lse.double() - lse.double().amax(-1, True).clamp(min=-1e9)))
    want = (weight / weight.sum(-1, True).clamp(min=1e-9)).unsqueeze(-1).mul(part.double()).sum(2)
    out = hopper.join(part, lse, torch.empty(M, H, D, dtype=dtype, device=device))
    assert_close(out, want, ratio)
    assert (out[0, 0] == 0).all()
    if dtype == torch.float32:
        return
    tokens = hopper.join_fp8(part, lse, dtype)
    same = linear.quantize_rows(out.flatten(1))
    assert tokens.dtype == dtype and tokens.values.shape == (M, H * D) and tokens.scale.shape == (M,)
    assert_close(tokens.values.double() * tokens.scale[:, None], same.values.double() * same.scale[:, None], 2e-3)
    assert_close(tokens.scale, same.scale, 1e-5)


@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
@pytest.mark.parametrize("W, H, K, D, keys", [(5, 4, 1, 64, 63), (32, 2, 2, 128, 111), (8, 7, 1, 64, 130)])
def test_attention_in_fp8_is_attention_quantised(
    device: torch.device, assert_close, hidden: bool, W: int, H: int, K: int, D: int, keys: int
) -> None:
    from fastdllm.kernels.attention import triton

    q, k, v, row, limit, hide = given(W, H, K, D, keys, torch.bfloat16, device, hidden)
    want = reference.attention_fp8(q, k.nan_to_num(0), v.nan_to_num(0), row, limit, keys, hide)
    out = triton.attention_fp8(q, k, v, row, limit, keys, hide)
    assert out.dtype == torch.bfloat16 and out.shape == (2, W, H * D) and out.scale.shape == (2, W)
    # The interpreter truncates tokens to fp8 where the hardware rounds.
    ratio = 0.15 if device.type == "cpu" else 3e-2
    assert_close(out.values.double() * out.scale[..., None], want.values.double() * want.scale[..., None], ratio)


def given(
    W: int, H: int, K: int, D: int, keys: int, dtype: torch.dtype, device: torch.device, hidden: bool
) -> tuple[Tensor, ...]:
    """Two rows of queries whose rows of the store overlap, as those of a batch do; NaN where nobody looks."""
    apart, length = 96, keys + 40
    slots = 2 * apart + length
    shape, strides = (3, K, length, D), (apart * D, slots * D, D, 1)
    row, limit = torch.tensor([2, 0]), torch.randint(1, keys + 1, (2, W))
    limit[0] = limit[0].clamp(max=apart + 5)
    hide = torch.tensor([[3, 40], [keys // 2, keys // 2]]) if hidden else None
    stores = []
    for _ in range(2):
        store = torch.randn(K, slots, D).to(dtype)
        seen = torch.zeros(slots, dtype=torch.bool)
        for r in range(2):
            sees = torch.arange(slots) - row[r] * apart
            here = (sees >= 0) & (sees < limit[r].max())
            if hide is not None:
                here &= (sees < hide[r, 0]) | (sees >= hide[r, 1])
            seen |= here
        stores.append(store.masked_fill(~seen[None, :, None], math.nan).to(device).as_strided(shape, strides))
    q = torch.randn(2, W, H, D).to(dtype)
    return (q.to(device), *stores, row.to(device), limit.to(device), None if hide is None else hide.to(device))


@pytest.mark.gpu
@pytest.mark.parametrize("block_m, splits, stages", TILES)
@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
@pytest.mark.parametrize(
    "W, H, K, D, keys",
    [
        (1, 1, 1, 64, 1),
        (5, 4, 1, 128, 63),
        (33, 2, 1, 64, 111),
        (32, 2, 2, 128, 700),
        (8, 28, 4, 128, 160),
        (32, 28, 4, 128, 1256),
    ],
)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_kernel(
    hopper_card: torch.device, assert_close, block_m: int, splits: int, stages: int, hidden: bool, W: int, H: int, K: int,
    D: int, keys: int, half: torch.dtype,
) -> None:  # fmt: skip
    from fastdllm.kernels.attention import hopper as kernels

    q, k, v, row, limit, hide = given(W, H, K, D, keys, half, hopper_card, hidden)
    want = reference.attention(q, k.nan_to_num(0), v.nan_to_num(0), row, limit, keys, hide)
    tile = {"block_m": block_m, "splits": splits, "num_stages": stages}
    out = kernels.join(*kernels.attention(q, k, v, row, limit, keys, hide, None, **tile), torch.empty_like(q))
    assert_close(out, want, 1e-3 if half == torch.float16 else 6e-3)


@pytest.mark.gpu
def test_a_query_that_sees_nothing_gives_zeros(hopper_card: torch.device) -> None:
    from fastdllm.kernels.attention import hopper as kernels

    q, k, v, row, limit, _ = given(8, 4, 1, 64, 100, torch.bfloat16, hopper_card, False)
    limit[0, 3], limit[1] = 0, 0
    tile = {"block_m": 16, "splits": 4, "num_stages": 2}
    out = kernels.join(*kernels.attention(q, k, v, row, limit, 100, None, 0.3, **tile), torch.empty_like(q))
    assert (out[0, 3] == 0).all() and (out[1] == 0).all() and (out[0, :3] != 0).any(-1).all()


@pytest.mark.gpu
def test_what_takes_it(hopper_card: torch.device) -> None:
    """A block of one answer does; a batch that fills the device, a pass over all positions, fp32 and odd heads do not."""
    from fastdllm.kernels.attention import hopper as kernels

    def tile(rows: int, width: int, heads: int, kv_heads: int, channels: int, dtype: torch.dtype = torch.bfloat16):
        store = torch.zeros(rows, kv_heads, 1256, channels, dtype=dtype, device=hopper_card)
        return kernels.tile_for(store.new_zeros(rows, width, heads, channels), store, store, 1256)

    assert tile(1, 32, 32, 32, 128) and tile(1, 8, 28, 4, 128) and tile(2, 16, 16, 8, 64)
    assert tile(32, 32, 32, 32, 128) is None and tile(1, 1256, 32, 32, 128) is None
    assert tile(1, 32, 32, 32, 128, torch.float32) is None and tile(1, 32, 8, 8, 96) is None


@pytest.mark.gpu
def test_a_captured_launch_reads_lengths_on_the_device(hopper_card: torch.device, assert_close) -> None:
    from fastdllm.kernels.attention import triton

    q, k, v, row, limit, _ = given(32, 8, 8, 128, 600, torch.bfloat16, hopper_card, False)
    triton.attention(q, k, v, row, limit, 600)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton.attention(q, k, v, row, limit, 600)
    for most in (600, 17):
        limit.copy_(limit.clamp(max=most))
        graph.replay()
        assert_close(out, reference.attention(q, k.nan_to_num(0), v.nan_to_num(0), row, limit, 600), 6e-3)


WIDE = [  # queries, heads, heads of keys, keys: less than a tile, just one, one more, several a program
    (65, 1, 1, 1),
    (96, 4, 1, 63),
    (128, 2, 2, 128),
    (129, 6, 2, 129),
    (200, 28, 4, 300),
    (640, 32, 32, 700),
]


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [132, 3])
@pytest.mark.parametrize("first", [False, True], ids=["by head", "longest first"])
@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
@pytest.mark.parametrize("W, H, K, keys", WIDE)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_many_queries(
    hopper_card: torch.device, assert_close, monkeypatch: pytest.MonkeyPatch, programs: int, first: bool, hidden: bool,
    W: int, H: int, K: int, keys: int, half: torch.dtype,
) -> None:  # fmt: skip
    """Few programs have many tiles each, whose rings go round."""
    from fastdllm.kernels.attention import hopper_wide as kernels

    monkeypatch.setattr(kernels, "multiprocessors", lambda device: programs)
    monkeypatch.setattr(kernels, "longest_first", lambda *given: first)
    q, k, v, row, limit, hide = given(W, H, K, 128, keys, half, hopper_card, hidden)
    want = reference.attention(q, k.nan_to_num(0), v.nan_to_num(0), row, limit, keys, hide)
    assert_close(kernels.attention(q, k, v, row, limit, keys, hide, None), want, 1e-3 if half == torch.float16 else 6e-3)


SEEN = {  # kv_len of every query and the slots that are hidden: of a middle tile, of several, of all, of none
    "whole tiles": (384, (0, 0)),
    "one tile": (128, (0, 0)),
    "part of a tile": (300, (0, 0)),
    "some hidden": (384, (100, 250)),
    "a whole tile hidden": (384, (128, 256)),
    "all hidden": (300, (0, 384)),
    "hidden beyond what is seen": (200, (250, 300)),
    "turned round": (384, (250, 100)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("seen, hidden", SEEN.values(), ids=list(SEEN))
def test_many_queries_that_see_alike(hopper_card: torch.device, assert_close, seen: int, hidden: tuple[int, int]) -> None:
    """Most tiles of keys are then seen whole, and need no mask. What nobody sees is NaN."""
    from fastdllm.kernels.attention import hopper_wide as kernels

    R, W, H, K, T = 2, 150, 4, 2, 400
    q, k, v = (torch.randn(shape).bfloat16() for shape in ((R, W, H, 128), (R, K, T, 128), (R, K, T, 128)))
    slot = torch.arange(T)
    unseen = (slot >= seen) | ((slot >= hidden[0]) & (slot < hidden[1]))
    poisoned = [x.masked_fill(unseen[None, None, :, None], math.nan).to(hopper_card) for x in (k, v)]
    row, limit = torch.arange(R).to(hopper_card), torch.tensor([[seen]], device=hopper_card).expand(R, W)
    hide = torch.tensor([hidden] * R, device=hopper_card)
    want = reference.attention(q, k, v, row.cpu(), limit.cpu(), 384, hide.cpu()).to(hopper_card)
    assert_close(kernels.attention(q.to(hopper_card), *poisoned, row, limit, 384, hide, None), want, 6e-3)
    turned = q.transpose(1, 2).contiguous().to(hopper_card).transpose(1, 2)  # lies in memory in another order
    assert_close(kernels.attention(turned, *poisoned, row, limit, 384, hide, None), want, 6e-3)
    if hidden == (0, 0):
        assert_close(kernels.attention(turned, *poisoned, row, limit + 50, seen, None, None), want, 6e-3)


@pytest.mark.gpu
def test_of_many_queries_too_one_that_sees_nothing_gives_zeros(hopper_card: torch.device) -> None:
    from fastdllm.kernels.attention import hopper_wide as kernels

    q, k, v, row, limit, _ = given(300, 4, 1, 128, 200, torch.bfloat16, hopper_card, False)
    limit[0, 3], limit[0, 128:256], limit[1] = 0, 0, 0
    out = kernels.attention(q, k, v, row, limit, 200, None, 0.3)
    assert (out[0, 3] == 0).all() and (out[0, 128:256] == 0).all() and (out[1] == 0).all()
    assert (out[0, :3] != 0).any(-1).all() and not out.isnan().any()


@pytest.mark.gpu
def test_a_captured_launch_of_many_queries_reads_lengths_on_the_device(hopper_card: torch.device, assert_close) -> None:
    from fastdllm.kernels.attention import triton

    q, k, v, row, limit, _ = given(300, 8, 8, 128, 600, torch.bfloat16, hopper_card, False)
    k, v = k.nan_to_num(0), v.nan_to_num(0)
    triton.attention(q, k, v, row, limit, 600)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton.attention(q, k, v, row, limit, 600)
    for most in (600, 17, 300):
        limit.copy_(torch.randint(1, most + 1, limit.shape))
        graph.replay()
        assert_close(out, reference.attention(q, k, v, row, limit, 600), 6e-3)


@pytest.mark.gpu
def test_what_takes_many_queries(hopper_card: torch.device) -> None:
    """Not tiles that are half empty, few tiles over many keys, other heads, fp32, a store that no copy engine reads, or a
    negative scale."""
    from fastdllm.kernels.attention import hopper_wide as kernels

    def takes(
        W: int, channels: int = 128, dtype: torch.dtype = torch.bfloat16, scale: float | None = None, keys: int = 300
    ) -> bool:
        store = torch.zeros(2, 4, 300, channels, dtype=dtype, device=hopper_card)
        return kernels.applies(store.new_zeros(2, W, 8, channels), store, store, keys, scale)

    assert takes(100) and takes(1000, dtype=torch.float16, scale=0.1) and takes(1000, keys=9000)
    assert not (takes(64) or takes(130) or takes(100, keys=9000))
    assert not (takes(300, 64) or takes(300, 96) or takes(300, dtype=torch.float32) or takes(300, scale=-1.0))
    store = torch.zeros(2, 4, 300, 132, dtype=torch.bfloat16, device=hopper_card)[..., :128]
    assert not kernels.applies(store.new_zeros(2, 300, 8, 128), store, store, 300, None)
    store = store.contiguous()
    askew = store.new_zeros(1 + 2 * 300 * 8 * 128)[1:].view(2, 300, 8, 128)
    assert not kernels.applies(askew, store, store, 300, None)
    assert kernels.applies(askew[:, :, :4], store, store, 300, None), "a copy of it is aligned"

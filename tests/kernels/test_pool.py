# SPDX-License-Identifier: Apache-2.0
"""Stores whose rows overlap: row r begins at slot r * UNIT of one pool of slots, and requests own disjoint runs of slots.

On such a view every op gives what it gives on a store of a request's own, and touches no slot of another request.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.each_choice

UNIT, ROWS, LENGTH = 16, 6, 56
SLOTS = (ROWS - 1) * UNIT + LENGTH
OWNED = ((4, 56), (0, 31), (2, 32))  # first row of each request and the slots it owns: out of order, of unequal lengths
SHAPES = [(1, 1, 1, 64), (9, 4, 2, 60), (31, 2, 2, 16)]  # W, H, K, D


def implementations(op: str) -> list[ModuleType]:
    if op == "attention":
        from fastdllm.kernels.attention import reference, triton
    else:
        from fastdllm.kernels.rope_store import reference, triton
    return [reference, triton]


def pooled(heads: int, dim: int, fill: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A pool [heads, SLOTS, dim] and its view [ROWS, heads, LENGTH, dim]."""
    pool = torch.full((heads, SLOTS, dim), fill, dtype=dtype, device=device)
    return pool, pool.as_strided((ROWS, heads, LENGTH, dim), (UNIT * dim, SLOTS * dim, dim, 1))


@pytest.mark.parametrize(("W", "H", "K", "D"), SHAPES, ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
def test_attention(
    device: torch.device, assert_close, W: int, H: int, K: int, D: int, hidden: bool, dtype: torch.dtype, ratio: float
) -> None:
    """Slots that nobody owns hold NaN for the kernel, which may not read them, and a large number for the reference."""
    reference, triton = implementations("attention")
    q = torch.randn(3, W, H, D).to(device, dtype)
    row = torch.tensor([r for r, _ in OWNED], device=device)
    kv_len = torch.stack([torch.randint(1, n + 1, (W,)) for _, n in OWNED]).to(device)
    hide = torch.tensor([[40, 50], [0, 0], [3, 4]], device=device) if hidden else None
    own = [torch.randn(2, 1, K, n, D).to(device, dtype) for _, n in OWNED]
    want = [
        reference.attention(q[i : i + 1], *kv, row[:1] * 0, kv_len[i : i + 1], n, None if hide is None else hide[i : i + 1])
        for i, (kv, (_, n)) in enumerate(zip(own, OWNED, strict=True))
    ]
    for impl, fill in ((reference, 1e4), (triton, float("nan"))):
        _, k_store = pooled(K, D, fill, dtype, device)
        _, v_store = pooled(K, D, fill, dtype, device)
        for (r, n), (k, v) in zip(OWNED, own, strict=True):
            k_store[r, :, :n], v_store[r, :, :n] = k[0], v[0]
        assert_close(impl.attention(q, k_store, v_store, row, kv_len, LENGTH, hide), torch.cat(want), ratio)


@pytest.mark.parametrize("fewest", [False, True], ids=["several", "one"])
def test_dense_attention(device: torch.device, assert_close, fewest: bool) -> None:
    """Without a mask the slots from max_kv_len on are not read; one row of many rows, too."""
    reference, triton = implementations("attention")
    row = torch.tensor([3] if fewest else [3, 0], device=device)
    q, kv_len = torch.randn(len(row), 5, 4, 64, device=device), torch.full((len(row), 5), 24, device=device)
    _, store = pooled(2, 64, float("nan"), torch.float32, device)
    own = torch.randn(len(row), 2, 24, 64, device=device)
    store[row, :, :24] = own
    want = reference.attention(q, own, own, torch.arange(len(row), device=device), kv_len, 24)
    for impl in (reference, triton):
        assert_close(impl.attention(q, store, store, row, kv_len, 24, dense=True), want, 2e-6)


@pytest.mark.parametrize(("W", "H", "K", "D"), SHAPES, ids=str)
@pytest.mark.parametrize("slots", [False, True], ids=["positions", "slots"])
def test_rope_store(
    device: torch.device, assert_close, W: int, H: int, K: int, D: int, slots: bool, dtype: torch.dtype, ratio: float
) -> None:
    """No slot of the pool but the given ones changes, and the last that a request owns is one like any other."""
    reference, triton = implementations("rope_store")
    qkv = torch.randn(3, W, (H + 2 * K) * D).to(device, dtype)
    angle = torch.arange(LENGTH)[:, None] * 100 ** -(torch.arange(D // 2) / (D // 2))
    angle = torch.cat([angle, angle], -1).to(device)
    row = torch.tensor([r for r, _ in OWNED], device=device)
    at = torch.stack([torch.randperm(n)[:W] for _, n in OWNED]).to(device)
    found = []
    for impl in (reference, triton):
        k_pool, k_store = pooled(K, D, float("nan"), dtype, device)
        v_pool, v_store = pooled(K, D, float("nan"), dtype, device)
        pos = at.flip(1) if slots else at
        q = impl.rope_store(qkv, H, K, angle.cos(), angle.sin(), pos, row, k_store, v_store, at if slots else None)
        found.append((q, k_pool, v_pool))
    written = torch.zeros(SLOTS, dtype=torch.bool, device=device)
    written[(row * UNIT)[:, None] + at] = True
    for got, want in zip(found[1], found[0], strict=True):
        assert_close(got.nan_to_num(), want.nan_to_num(), ratio)
    for _, *pools in found:
        for pool in pools:
            assert torch.equal(pool.isfinite().all(-1).all(0), written) and torch.equal(
                pool.isfinite().any(-1).any(0), written
            )


def test_padding_may_write_one_slot_many_times(device: torch.device) -> None:
    """All padding of a row goes to its scratch slot; what lands there is one of the padding's values."""
    reference, triton = implementations("rope_store")
    qkv, angle = torch.randn(2, 6, 3 * 16, device=device), torch.zeros(LENGTH, 16, device=device)
    row, scratch = torch.tensor([1, 4], device=device), torch.tensor([17, 40], device=device)
    pos = torch.cat([torch.arange(2, device=device).expand(2, 2), scratch[:, None].expand(2, 4)], 1)
    for impl in (reference, triton):
        (k_pool, k_store), (v_pool, v_store) = (pooled(1, 16, float("nan"), torch.float32, device) for _ in range(2))
        impl.rope_store(qkv, 1, 1, angle.cos(), angle.sin(), pos, row, k_store, v_store)
        for r in range(2):
            assert torch.equal(v_store[row[r], 0, :2], qkv[r, :2, 32:])
            assert (v_store[row[r], 0, scratch[r]] == qkv[r, 2:, 32:]).all(-1).any()
        assert k_pool.isfinite().all(-1).sum() == v_pool.isfinite().all(-1).sum() == 6


def test_positions_beyond_two_to_the_31_elements(device: torch.device, assert_close) -> None:
    """Strides and slots are multiplied in 64 bits. On a CPU only the pages that are touched take memory."""
    reference, triton = implementations("attention")
    stride, n = 1 << 25, 70
    store = torch.empty((n - 1) * stride + 16, dtype=torch.float16, device=device).as_strided(
        (1, 1, n, 16), (16, 16, stride, 1)
    )
    store.copy_(torch.randn(1, 1, n, 16))
    q, row = torch.randn(1, 3, 1, 16, device=device).half(), torch.zeros(1, dtype=torch.long, device=device)
    kv_len = torch.tensor([[70, 66, 69]], device=device)
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "SPLITS": 2, "num_warps": 4, "num_stages": 2}
    got = triton.launch(q, store, store, row, kv_len, n, None, None, **tile)
    assert_close(got, reference.attention(q, store, store, row, kv_len, n), 1e-3)

# SPDX-License-Identifier: Apache-2.0
"""Rotation and KV write: every slot of the pass is written, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.rope_store import reference

pytestmark = pytest.mark.each_choice

T = 40


def inputs(W: int, H: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Two of three store rows in reverse order, their numbers not side by side; positions scattered, stores full of NaN."""
    qkv = torch.randn(2, W, (H + 2 * K) * D).to(dtype)
    angle = torch.arange(T)[:, None] * 10000 ** -(torch.arange(D // 2) / (D // 2))
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    pos = torch.stack([torch.randperm(T)[:W] for _ in range(2)])
    row = torch.tensor([2, 9, 0, 9], device=device)[::2]
    store = torch.full((3, K, T, D), float("nan"), dtype=dtype)
    qkv, cos, sin, pos, k_store, v_store = (x.to(device) for x in (qkv, cos, sin, pos, store, store.clone()))
    return qkv, cos, sin, pos, row, k_store, v_store


def test_reference_against_complex_rotation() -> None:
    qkv, cos, sin, pos, row, k_store, v_store = inputs(5, 4, 2, 8, torch.float32, torch.device("cpu"))
    q = reference.rope_store(qkv, 4, 2, cos, sin, pos, row, k_store, v_store)
    heads = qkv.view(2, 5, 8, 8).double()
    turn = torch.complex(cos[..., :4].double(), sin[..., :4].double())
    for r in range(2):
        for w in range(5):
            p = pos[r, w]
            for h in range(8):
                z = torch.complex(heads[r, w, h, :4], heads[r, w, h, 4:]) * turn[p]
                want = torch.cat([z.real, z.imag]) if h < 6 else heads[r, w, h]
                got = q[r, w, h] if h < 4 else (k_store[row[r], h - 4, p] if h < 6 else v_store[row[r], h - 6, p])
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert k_store[1].isnan().all() and v_store.isfinite().sum() == 2 * 5 * 2 * 8


@pytest.mark.parametrize(
    ("W", "H", "K", "D"), [(1, 1, 1, 60), (5, 4, 1, 64), (33, 2, 1, 16), (32, 2, 2, 128)], ids=lambda v: str(v)
)
def test_kernel(
    device: torch.device, assert_close, W: int, H: int, K: int, D: int, dtype: torch.dtype, ratio: float
) -> None:
    from fastdllm.kernels.rope_store import triton

    qkv, cos, sin, pos, row, k_want, v_want = inputs(W, H, K, D, dtype, device)
    k_got, v_got = k_want.clone(), v_want.clone()
    want = reference.rope_store(qkv, H, K, cos, sin, pos, row, k_want, v_want)
    q = triton.rope_store(qkv, H, K, cos, sin, pos, row, k_got, v_got)
    assert q.dtype == want.dtype
    assert_close(q, want, ratio)
    assert torch.equal(k_got.isnan(), k_want.isnan()) and torch.equal(v_got.nan_to_num(), v_want.nan_to_num())
    assert_close(k_got.nan_to_num(), k_want.nan_to_num(), ratio)


@pytest.mark.parametrize(("D", "turned"), [(64, 32), (60, 20), (16, 2), (16, 14)])
def test_the_rest_of_a_head_stays(
    device: torch.device, assert_close, D: int, turned: int, dtype: torch.dtype, ratio: float
) -> None:
    """Heads of which the first channels turn are heads of so many channels, and the others beside them as they were."""
    from fastdllm.kernels.rope_store import triton

    H, K, norm = 2, 1, torch.randn(D, device=device, dtype=dtype)
    qkv, _, _, pos, row, k_want, v_want = inputs(5, H, K, D, dtype, device)
    _, cos, sin, *_ = inputs(5, H, K, turned, dtype, device)
    k_got, v_got = k_want.clone(), v_want.clone()
    want = reference.rope_store(qkv, H, K, cos, sin, pos, row, k_want, v_want, q_norm=norm, k_norm=norm)
    got = triton.rope_store(qkv, H, K, cos, sin, pos, row, k_got, v_got, q_norm=norm, k_norm=norm)
    assert_close(got, want, ratio)
    assert_close(k_got.nan_to_num(), k_want.nan_to_num(), ratio)
    assert torch.equal(k_got.isnan(), k_want.isnan()) and torch.equal(v_got.nan_to_num(), v_want.nan_to_num())
    plain, k_plain = qkv.view(2, 5, H + 2 * K, D), torch.full((3, K, T, turned), float("nan"), dtype=dtype, device=device)
    queries = reference.rope_store(qkv, H, K, cos, sin, pos, row, k_want, v_want)
    narrow = plain[..., :turned].flatten(2)
    alone = reference.rope_store(narrow, H, K, cos, sin, pos, row, k_plain, k_plain.clone())
    assert torch.equal(queries[..., :turned], alone) and torch.equal(queries[..., turned:], plain[:, :, :H, turned:])


@pytest.mark.parametrize("C", [60, 544])
@pytest.mark.parametrize(("W", "H", "K", "D"), [(1, 1, 1, 60), (5, 4, 1, 64), (40, 2, 2, 16)], ids=str)
def test_after_a_product(
    device: torch.device, assert_close, W: int, H: int, K: int, D: int, C: int, dtype: torch.dtype, ratio: float
) -> None:
    """Queries, keys and values with a bias, from partial sums (few rows) and whole (many, or an odd width)."""
    from fastdllm.kernels.rope_store import triton

    qkv, cos, sin, pos, row, k_want, v_want = inputs(W, H, K, D, dtype, device)
    k_got, v_got = k_want.clone(), v_want.clone()
    x, bias = torch.randn(2, W, C, device=device).to(dtype), torch.randn(qkv.shape[-1], device=device).to(dtype)
    w = torch.randn(qkv.shape[-1], C, device=device).to(dtype) * C**-0.5
    want = reference.linear_rope_store(x, w, H, K, cos, sin, pos, row, k_want, v_want, bias=bias)
    q = triton.linear_rope_store(x, w, H, K, cos, sin, pos, row, k_got, v_got, bias=bias)
    assert_close(q, want, 2 * ratio)
    for got, expected in ((k_got, k_want), (v_got, v_want)):
        assert torch.equal(got.isnan(), expected.isnan())
        assert_close(got.nan_to_num(), expected.nan_to_num(), 2 * ratio)


@pytest.mark.parametrize("normed", ["q", "k", "qk"])
def test_normalised_heads_against_float64(normed: str) -> None:
    """The norm is over a head alone and comes before the rotation; values are left as they are."""
    D, eps = 8, 1e-3
    qkv, cos, sin, pos, row, k_store, v_store = inputs(5, 4, 2, D, torch.float32, torch.device("cpu"))
    norms = {f"{n}_norm": torch.rand(D) + 0.5 for n in normed}
    q = reference.rope_store(qkv, 4, 2, cos, sin, pos, row, k_store, v_store, eps=eps, **norms)
    x = qkv.view(2, 5, 8, D).double()
    for part, name in ((x[:, :, :4], "q_norm"), (x[:, :, 4:6], "k_norm")):
        if name in norms:
            part.copy_(part / (part.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norms[name].double())
    c, s = cos[pos][:, :, None].double(), sin[pos][:, :, None].double()
    turned = x * c + torch.cat([-x[..., 4:], x[..., :4]], -1) * s
    torch.testing.assert_close(q.double(), turned[:, :, :4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(k_store[row[:, None], :, pos].double(), turned[:, :, 4:6], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(v_store[row[:, None], :, pos].double(), x[:, :, 6:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normed", ["q", "k", "qk"])
@pytest.mark.parametrize(("W", "H", "K", "D", "C"), [(1, 1, 1, 60, 60), (5, 7, 1, 64, 544), (40, 2, 2, 16, 60)], ids=str)
def test_normalised_heads(
    device: torch.device, assert_close, W: int, H: int, K: int, D: int, C: int, normed: str, dtype: torch.dtype, ratio: float
) -> None:
    """Programs whose heads are queries, keys and values at once, after partial sums and after a whole product."""
    from fastdllm.kernels.rope_store import triton

    qkv, cos, sin, pos, row, k_want, v_want = inputs(W, H, K, D, dtype, device)
    k_got, v_got = k_want.clone(), v_want.clone()
    x, w = torch.randn(2, W, C, device=device).to(dtype), torch.randn(qkv.shape[-1], C, device=device).to(dtype) * C**-0.5
    given = {f"{n}_norm": (torch.rand(D, device=device) + 0.5).to(dtype) for n in normed} | {"eps": 1e-2}
    want = reference.linear_rope_store(x, w, H, K, cos, sin, pos, row, k_want, v_want, **given)
    got = triton.linear_rope_store(x, w, H, K, cos, sin, pos, row, k_got, v_got, **given)
    assert_close(got, want, 2 * ratio)
    for a, b in ((k_got, k_want), (v_got, v_want)):
        assert torch.equal(a.isnan(), b.isnan())
        assert_close(a.nan_to_num(), b.nan_to_num(), 2 * ratio)


@pytest.mark.parametrize(("W", "H", "K", "D"), [(1, 1, 1, 60), (33, 2, 1, 16)], ids=lambda v: str(v))
def test_slots_may_differ_from_positions(device: torch.device, assert_close, W: int, H: int, K: int, D: int) -> None:
    """Rotation goes by position, the place by slot: the same keys as without slots, elsewhere. Positions may repeat."""
    from fastdllm.kernels.rope_store import triton

    qkv, cos, sin, pos, row, k_plain, v_plain = inputs(W, H, K, D, torch.float32, device)
    slot = torch.stack([torch.randperm(T)[:W] for _ in range(2)]).to(device)
    k_got, v_got = k_plain.clone(), v_plain.clone()
    k_ref, v_ref = k_plain.clone(), v_plain.clone()
    q_plain = reference.rope_store(qkv, H, K, cos, sin, pos, row, k_plain, v_plain)
    q_ref = reference.rope_store(qkv, H, K, cos, sin, pos, row, k_ref, v_ref, slot)
    q_got = triton.rope_store(qkv, H, K, cos, sin, pos, row, k_got, v_got, slot)
    assert torch.equal(q_ref, q_plain)
    assert torch.equal(k_ref[row[:, None], :, slot], k_plain[row[:, None], :, pos])
    assert torch.equal(v_ref[row[:, None], :, slot], v_plain[row[:, None], :, pos])
    assert k_ref.isfinite().sum() == 2 * W * K * D, "another slot was written"
    assert_close(q_got, q_ref, 2e-6)
    assert torch.equal(k_got.isnan(), k_ref.isnan()) and torch.equal(v_got.nan_to_num(), v_ref.nan_to_num())
    assert_close(k_got.nan_to_num(), k_ref.nan_to_num(), 2e-6)

    repeated = pos[:, :1].expand_as(pos)
    k_want, k_twice = torch.zeros_like(k_ref), torch.zeros_like(k_ref)
    reference.rope_store(qkv, H, K, cos, sin, repeated, row, k_want, torch.zeros_like(v_ref), slot)
    triton.rope_store(qkv, H, K, cos, sin, repeated, row, k_twice, torch.zeros_like(v_ref), slot)
    assert_close(k_twice, k_want, 2e-6)


def test_store_may_be_a_view_in_another_dtype(device: torch.device, assert_close) -> None:
    """One layer of a larger store, kept in bf16 while the model computes in fp32."""
    from fastdllm.kernels.rope_store import triton

    qkv, cos, sin, pos, row, _, _ = inputs(5, 4, 2, 64, torch.float32, device)
    store = torch.zeros(2, 2, 3, 2, T, 64, dtype=torch.bfloat16, device=device)
    want = reference.rope_store(qkv, 4, 2, cos, sin, pos, row, store[0, 0], store[0, 1])
    q = triton.rope_store(qkv, 4, 2, cos, sin, pos, row, store[1, 0], store[1, 1])
    assert q.dtype == want.dtype == torch.bfloat16
    assert_close(q, want, 1e-2)
    assert_close(store[1], store[0], 1e-2)

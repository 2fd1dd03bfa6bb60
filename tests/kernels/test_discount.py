# SPDX-License-Identifier: Apache-2.0
"""Attention between a block's positions, and confidences discounted by it, against literal loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.block_attention import reference as block_attention
from fastdllm.kernels.discount import reference as discount

pytestmark = pytest.mark.each_choice

# (W, H, K, D, keys, Q): one position, ragged tiles, GQA 1, 4 and 7, head sizes that are no power of two, a wide block.
SHAPES = [
    (1, 1, 1, 64, 1, 1),
    (5, 4, 1, 60, 63, 5),
    (33, 2, 1, 16, 111, 32),
    (40, 2, 2, 128, 140, 70),
    (8, 7, 1, 64, 130, 4),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, hidden: bool) -> list[Tensor | None]:
    """Two rows of a store whose rows overlap, the queries of each in another order than its block; one slot is beyond what
    anybody may see."""
    W, H, K, D, keys, Q = shape
    q = torch.randn(2 * W, H, D).to(dtype)
    k = torch.randn(K, 3 * keys + 7, D).to(dtype).as_strided((3, K, keys + 7, D), (keys * D, (3 * keys + 7) * D, D, 1))
    limit = torch.randint(1, keys + 1, (2 * W,))
    query = torch.stack([torch.randint(0, W, (Q,)) + W * r for r in (0, 1)])
    slot = torch.stack([torch.randperm(max(keys, Q))[:Q] for _ in (0, 1)])
    slot[1, -1] = keys + 5
    hide = torch.tensor([[keys // 3, keys // 2], [0, 0]], device=device) if hidden else None
    return [
        q.to(device),
        k.to(device),
        torch.tensor([2, 0], device=device),
        *(x.to(device) for x in (limit, query, slot)),
        hide,
    ]


def naive(q: Tensor, k: Tensor, row: Tensor, limit: Tensor, query: Tensor, slot: Tensor, hide: Tensor | None) -> Tensor:
    """One query and head at a time, in float64."""
    (R, Q), (_, H, D) = query.shape, q.shape
    out = torch.zeros(R, Q, Q, dtype=torch.float64, device=q.device)
    for r in range(R):
        for i in range(Q):
            n = int(query[r, i])
            seen = [j for j in range(int(limit[n])) if hide is None or not hide[r, 0] <= j < hide[r, 1]]
            for h in range(H if seen else 0):
                score = k[row[r], h // (H // k.shape[1]), seen].double() @ q[n, h].double() * D**-0.5
                share = dict(zip(seen, (score.softmax(0) / H).tolist(), strict=True))
                out[r, i] += torch.tensor([share.get(j, 0.0) for j in slot[r].tolist()], device=q.device)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
def test_block_attention(device: torch.device, assert_close, shape: tuple[int, ...], hidden: bool, dtype, ratio) -> None:
    from fastdllm.kernels.block_attention import triton

    q, k, row, limit, query, slot, hide = inputs(shape, dtype, device, hidden)
    want = naive(q, k, row, limit, query, slot, hide)
    keys = shape[4]
    got = block_attention.block_attention(q, k, row, limit, keys, query, slot, hide)
    assert_close(got, want, 1e-6)
    assert_close(triton.block_attention(q, k, row, limit, keys, query, slot, hide), want, ratio)


def test_slots_that_nobody_sees_may_hold_anything(device: torch.device, assert_close) -> None:
    from fastdllm.kernels.block_attention import triton

    q, k, row, limit, query, slot, _ = inputs((6, 4, 2, 16, 40, 6), torch.float32, device, False)
    k = torch.randn(3, 2, 47, 16, device=device)
    limit = limit.clamp(max=30)
    slot[0, 0], limit[query[1, 2]] = 35, 0  # a slot beyond every limit, and a query that sees nothing
    hide = torch.tensor([[3, 9], [4, 8]], device=device)
    poisoned = k.clone()
    poisoned[:, :, 30:] = torch.nan
    for r, b in enumerate(row.tolist()):
        poisoned[b, :, hide[r, 0] : hide[r, 1]] = torch.nan
    want = naive(q, k, row, limit, query, slot, hide)
    for op in (block_attention.block_attention, triton.block_attention):
        got = op(q, poisoned, row, limit, 40, query, slot, hide)
        assert_close(got, want, 2e-6)
        assert (got[1, 2] == 0).all() and (got[0, :, 0] == 0).all()


def loop(conf: list[float], masked: list[bool], attention: list[list[float]], weight: float) -> list[float]:
    """The greedy set as the paper states it, one row."""
    worth, chosen = list(conf), list[int]()
    left = [i for i, m in enumerate(masked) if m]

    def utility(i: int) -> float:
        return conf[i] - weight * sum(attention[i][s] * (1 - conf[s]) for s in chosen)

    while left:
        best = max(left, key=utility)  # of equal ones the first
        worth[best] = utility(best)
        chosen.append(best)
        left.remove(best)
    return worth


def rows(R: int, Q: int, device: torch.device) -> list[Tensor]:
    """Rows with fewer and fewer candidates, none in the last; the attention is a view with other strides."""
    conf = (torch.randint(1, 9, (R, Q)) / 8).to(device)  # eighths: many equal ones, and sums that are exact
    masked = torch.rand(R, Q, device=device) < torch.linspace(1.2, 0, R, device=device)[:, None]
    attention = (torch.randint(0, 5, (Q, R, Q), device=device) / 16).permute(1, 2, 0)
    return [conf, masked, attention]


@pytest.mark.parametrize("width", [1, 3, 8, 32, 70])
def test_discount(device: torch.device, width: int) -> None:
    from fastdllm.kernels.discount import triton

    conf, masked, attention = rows(7, width, device)
    for weight in (0.0, 0.5, 4.0):
        want = [loop(*row, weight) for row in zip(conf.tolist(), masked.tolist(), attention.tolist(), strict=True)]
        for op in (discount.discount, triton.discount):
            got = op(conf, masked, attention, weight)
            torch.testing.assert_close(got.cpu(), torch.tensor(want), rtol=1e-5, atol=1e-5)
            assert torch.equal(got[~masked], conf[~masked])
            assert (got <= conf).all()


def test_no_weight_and_no_candidates_change_nothing(device: torch.device) -> None:
    from fastdllm.kernels.discount import triton

    conf, masked, attention = rows(4, 9, device)
    conf[0, 3] = torch.nan
    for op in (discount.discount, triton.discount):
        torch.testing.assert_close(op(conf, masked, attention, 0.0), conf, rtol=0, atol=0, equal_nan=True)
        nobody = torch.zeros_like(masked)
        torch.testing.assert_close(op(conf, nobody, attention, 3.0), conf, rtol=0, atol=0, equal_nan=True)


def test_nan_is_taken_last_and_harms_no_number(device: torch.device) -> None:
    from fastdllm.kernels.discount import triton

    conf = torch.tensor([[0.5, torch.nan, 0.75, torch.nan]], device=device)
    attention = torch.full((1, 4, 4), 0.5, device=device)
    for op in (discount.discount, triton.discount):
        got = op(conf, torch.ones_like(conf, dtype=torch.bool), attention, 1.0)
        assert got[0, [0, 2]].tolist() == [0.375, 0.75] and got[0, [1, 3]].isnan().all()

# SPDX-License-Identifier: Apache-2.0
"""Layers that run for some positions: scores, the choice of positions in pieces, and the way back."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.partial import reference

pytestmark = pytest.mark.each_choice

NAN = float("nan")
EPS = 1e-5
SHAPES = [(1, 1, 4), (3, 8, 60), (4, 33, 64)]  # R, W, C


def implementations() -> list[ModuleType]:
    from fastdllm.kernels.partial import triton

    return [reference, triton]


def places(R: int, W: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of a state of R + 2 rows, and places of W + 3 in them: out of order, distinct within a row."""
    row = torch.randperm(R + 2)[:R].to(device)
    return row, torch.stack([torch.randperm(W + 3)[:W] for _ in range(R)]).to(device)


@pytest.mark.parametrize(("K", "D"), [(1, 16), (2, 60), (7, 128)])
def test_drift_against_float64(device: torch.device, K: int, D: int, dtype: torch.dtype) -> None:
    """Of a store whose rows overlap and whose other slots hold NaN; a vector of zeros has drifted by 1 from any."""
    slots, unit, T = 40, 4, 20
    pool = torch.full((K, slots, D), NAN)
    row, at = torch.tensor([5, 0]), torch.tensor([[3, 7, 0], [1, 19, 2]])
    x = torch.randn(2, 3, K * D).to(dtype)
    kept = torch.randn(2, 3, K * D).to(dtype)
    kept[0, 1], x[1, 2], kept[1, 0] = 0, 0, 2 * x[1, 0]
    for r in range(2):
        for w in range(3):
            pool[:, row[r] * unit + at[r, w]] = kept[r, w].float().view(K, D)
    store = pool.to(device, dtype).as_strided((6, K, T, D), (unit * D, slots * D, D, 1))
    bonus = torch.tensor([[0.0, 4.0, 0.5], [1.0, 0.0, 0.0]])
    for impl in implementations():
        got = impl.drift(x.to(device), store, row.to(device), at.to(device), bonus.to(device), still=1e-3)
        assert got.dtype == torch.float32
        for r in range(2):
            for w in range(3):
                a, b = x[r, w].double(), kept[r, w].double()
                size = float(a.norm() * b.norm())
                want = 1 - float(a @ b) / size if size else 1.0
                want = (0.0 if want < 1e-3 else want) + float(bonus[r, w])
                assert math.isclose(float(got[r, w]), want, rel_tol=1e-5, abs_tol=1e-5)


@pytest.mark.parametrize(("R", "W", "C"), SHAPES)
@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("keep", [False, True], ids=["forget", "keep"])
@pytest.mark.usefixtures("scalar_masks")
def test_pick(device: torch.device, assert_close, R: int, W: int, C: int, n: int, keep: bool) -> None:
    """Each row's best, once each; what fills the shape writes nowhere but to the row's scratch slot. Rows that run whole, in
    part and not at all, with ties and NaN among the scores, and two pieces more than the rows need."""
    quota = [[W, min(3, W), 0, W // 2][r % 4] for r in range(R)]
    h, norm = torch.randn(R, W, C, device=device), torch.rand(C, device=device)
    score = (torch.rand(R, W) * 5).round()
    score[:, ::4] = NAN
    ids, pos, kv_len = torch.randint(0, 99, (3, R, W))
    scratch = 1000 + torch.arange(R)
    score, ids, pos, kv_len, scratch = (t.to(device) for t in (score, ids, pos, kv_len, scratch))
    row, at = places(R, W, device)
    piece = torch.tensor([(r, i) for r, q in enumerate(quota) for i in range(0, q, n)], device=device)
    for impl in implementations():
        state = {}
        if keep:
            entry = torch.full((R + 2, W + 3, C), NAN, device=device)
            seen = torch.full((R + 2, W + 3), -7, device=device)
            state = {"row": row, "at": at, "entry": entry, "ids": ids, "seen": seen}
        asked = torch.tensor(quota, device=device)
        got = impl.pick(h, score, asked, len(piece) + 2, n, pos, kv_len, scratch, norm, EPS, **state)
        assert got.h.shape == got.y.shape == (len(piece) + 2, n, C) and got.source.dtype == torch.int32
        assert got.row.tolist() == [*piece[:, 0].tolist(), R - 1, R - 1]
        for r in range(R):
            order = sorted(range(W), key=lambda w, r=r: (score[r, w].isnan().item(), -score[r, w].nan_to_num().item(), w))
            best = order[: quota[r]]
            assert [w for w in range(W) if got.source[r, w] >= 0] == sorted(best)
            for w in best:
                p, i = divmod(int(got.source[r, w]), n)
                assert piece[p, 0] == r and order[int(piece[p, 1]) + i] == w
                assert torch.equal(got.h[p, i], h[r, w])
                assert (got.pos[p, i], got.kv_len[p, i]) == (pos[r, w], kv_len[r, w])
            if keep:
                assert torch.equal(entry[row[r], at[r, best]], h[r, best]) and torch.equal(
                    seen[row[r], at[r, best]], ids[r, best]
                )
        mine = piece[:, 1:] + torch.arange(n, device=device) < asked[piece[:, :1]]
        spare = torch.cat([~mine, torch.ones(2, n, dtype=torch.bool, device=device)])
        assert torch.equal(got.pos[spare], scratch[got.row[:, None].expand(-1, n)][spare])
        want = got.h.double() / (got.h.double().square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
        assert_close(got.y, want, 1e-5)
        if keep:
            assert entry.isfinite().all(-1).sum() == (seen != -7).sum() == sum(quota)


@pytest.mark.parametrize(("R", "W", "C"), SHAPES)
@pytest.mark.parametrize("output", [False, True], ids=["delta", "output"])
def test_merge(
    device: torch.device, assert_close, R: int, W: int, C: int, output: bool, dtype: torch.dtype, ratio: float
) -> None:
    """Positions that ran give what they became and remember it; the others what they remember. Nothing else is written."""
    h, fresh, norm = (torch.randn(*shape, C).to(device, dtype) for shape in ((R, W), (2, W), (1,)))
    row, at = places(R, W, device)
    source = torch.full((R * W,), -1, dtype=torch.int32)
    ran = torch.randperm(R * W)[: min(R * W, 2 * W) // 2]
    source[ran] = torch.randperm(2 * W)[: len(ran)].int()
    source = source.view(R, W).to(device)
    before = torch.full((R + 2, 3, W + 3, C), NAN, dtype=dtype, device=device)  # of three runs of layers, the second
    before[row[:, None], 1, at] = torch.randn(R, W, C).to(device, dtype)
    for impl in implementations():
        cached = before.clone()
        y, out = impl.merge(h, fresh, source, cached[:, 1], row, at, norm[0], EPS, output)
        want, left = torch.empty_like(h), before.clone()
        for r in range(R):
            for w in range(W):
                i = int(source[r, w])
                if i >= 0:
                    want[r, w] = fresh[i // W, i % W]
                    left[row[r], 1, at[r, w]] = want[r, w] if output else want[r, w] - h[r, w]
                else:
                    kept = before[row[r], 1, at[r, w]]
                    want[r, w] = kept if output else h[r, w] + kept
        assert_close(out, want, ratio)
        assert torch.equal(cached.isnan(), left.isnan())
        assert_close(cached.nan_to_num(), left.nan_to_num(), ratio)
        wide = out.double()
        assert_close(y, wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * norm[0].double(), 2 * ratio)


def test_nothing_runs(device: torch.device, assert_close) -> None:
    """No piece at all: every position gets what it remembers."""
    h, cached = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 8, device=device)
    row, at = torch.arange(2, device=device), torch.arange(3, device=device).expand(2, 3)
    zeros, norm = torch.zeros(2, 3, dtype=torch.long, device=device), torch.ones(8, device=device)
    for impl in implementations():
        got = impl.pick(h, zeros.float(), zeros[:, 0], 0, 4, zeros, zeros, zeros[:, 0], norm, EPS)
        assert got.h.shape == (0, 4, 8) and (got.source == -1).all()
        kept = cached.clone()
        assert_close(impl.merge(h, got.h, got.source, kept, row, at, norm, EPS)[1], h + cached, 1e-6)
        assert torch.equal(kept, cached)


def test_one_merge_does_for_a_run_of_layers() -> None:
    """Reuse layer by layer, each remembering what it added, and one difference of the run's ends give the same."""
    layers = [torch.randn(6, 6, dtype=torch.float64) / 4 for _ in range(4)]
    row, at = torch.arange(2), torch.arange(5).expand(2, 5)
    one, each = torch.zeros(2, 5, 6, dtype=torch.float64), torch.zeros(4, 2, 5, 6, dtype=torch.float64)
    norm, scratch = torch.ones(6, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    for step in range(5):
        h = torch.randn(2, 5, 6, dtype=torch.float64)
        quota = torch.tensor([5, 5] if step == 0 else [2, step % 3])
        got = reference.pick(h, torch.rand(2, 5), quota, int((-(-quota // 2)).sum()), 2, at, at, scratch, norm, EPS)
        x, want = got.h, h.clone()
        for index, w in enumerate(layers):
            x = x + torch.tanh(x @ w)
            added = torch.tanh(want @ w)
            each[index] = torch.where((got.source >= 0)[..., None], added, each[index])
            want = want + each[index]
        torch.testing.assert_close(reference.merge(h, x, got.source, one, row, at, norm, EPS)[1], want)

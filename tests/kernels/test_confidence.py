# SPDX-License-Identifier: Apache-2.0
"""Confidence: top token, probability, log-sum-exp, entropy and margin, over logits and fused with the head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.confidence import reference
from fastdllm.kernels.confidence.reference import Confidence

pytestmark = pytest.mark.pairwise


def bans(V: int, device: torch.device) -> Tensor:
    """A mask id, and a run of unused rows at the end; never everything."""
    banned = torch.zeros(V, dtype=torch.bool, device=device)
    banned[V // 2 :] = torch.arange(V - V // 2, device=device) > V // 8
    if V > 1:
        banned[V // 3] = True
    return banned


def check(got: Confidence, want: Confidence, ratio: float, assert_close) -> None:
    assert torch.equal(got.top, want.top)
    for name in ("prob", "lse", "entropy", "margin"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == torch.float32
            assert_close(a, b, ratio)


def test_reference_against_float64() -> None:
    logits = torch.randn(4, 63) * 3
    banned = bans(63, logits.device)
    got = reference.confidence(logits, banned, entropy=True, margin=True)
    for n in range(4):
        x = {v: logits[n, v].double().item() for v in range(63) if not banned[v]}
        total = sum(math.exp(e) for e in x.values())
        p = sorted((math.exp(e) / total for e in x.values()), reverse=True)
        assert got.top[n].item() == max(x, key=x.__getitem__)
        want = (p[0], math.log(total), -sum(v * math.log(v) for v in p), p[0] - p[1])
        found = (got.prob[n], got.lse[n], got.entropy[n], got.margin[n])
        assert all(math.isclose(f.item(), w, rel_tol=1e-5, abs_tol=1e-6) for f, w in zip(found, want, strict=True))


@pytest.mark.parametrize(("N", "V"), [(1, 1), (5, 63), (33, 2048), (2, 50257)])
@pytest.mark.parametrize("ban", [False, True], ids=["all", "banned"])
def test_kernel(device: torch.device, assert_close, N: int, V: int, ban: bool, dtype: torch.dtype) -> None:
    from fastdllm.kernels.confidence import triton

    logits = (torch.randn(N, V, device=device) * 4).to(dtype)
    banned = bans(V, device) if ban else None
    if ban:
        logits.masked_fill_(banned, math.nan)  # what is banned counts for nothing, whatever stands there
    want = reference.confidence(logits, banned, entropy=True, margin=True)
    check(triton.confidence(logits, banned, entropy=True, margin=True), want, 1e-5, assert_close)
    check(triton.confidence(logits, banned), Confidence(*want[:3], None, None), 1e-5, assert_close)


def test_kernel_reads_strided_rows(device: torch.device, assert_close) -> None:
    from fastdllm.kernels.confidence import triton

    logits = torch.randn(5, 200, device=device)[:, :111]
    check(triton.confidence(logits), reference.confidence(logits), 1e-5, assert_close)


def test_ties_go_to_the_smaller_id(device: torch.device) -> None:
    """Within a vocabulary tile and across tiles; bf16 logits tie often."""
    from fastdllm.kernels.confidence import triton

    logits = torch.zeros(2, 9000, device=device)
    logits[0, [17, 40, 8500]] = 5
    logits[1, [8500, 8999]] = 5
    for impl in (reference, triton):
        got = impl.confidence(logits, margin=True)
        assert got.top.tolist() == [17, 8500] and got.margin.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_bad_logits_stay_in_range(device: torch.device, bad: float) -> None:
    from fastdllm.kernels.confidence import triton

    got = triton.confidence(torch.full((2, 5000), bad, device=device))
    assert ((got.top >= 0) & (got.top < 5000)).all()
    assert not (got.prob > 0.5).any()


@pytest.mark.parametrize(("N", "C", "V"), [(1, 16, 1), (5, 60, 63), (33, 128, 130), (32, 256, 500)])
def test_fused_head(device: torch.device, assert_close, N: int, C: int, V: int, dtype: torch.dtype) -> None:
    from fastdllm.kernels.confidence import triton

    hidden, weight = torch.randn(N, C, device=device).to(dtype), (torch.randn(V, C, device=device) / 4).to(dtype)
    banned = bans(V, device)
    logits = hidden.float() @ weight.float().T
    want = reference.confidence(logits.to(dtype), banned, entropy=True, margin=True)
    # Sums in another order round to a neighbour now and then, and the interpreter truncates: then a probability is off by a
    # unit in the last place of its logit, and of two near logits the other may lead.
    unit = logits.abs().amax().item() * torch.finfo(dtype).eps
    for tile in ((64, 128), (128, 64)):
        got = triton.launch_head(hidden, weight, banned, True, True, *tile)
        led = logits.masked_fill(banned, -torch.inf).gather(1, got.top[:, None])[:, 0]
        assert (led >= logits.masked_fill(banned, -torch.inf).amax(1) - 2 * unit - 1e-5).all()
        for name in ("prob", "lse", "entropy", "margin"):
            assert_close(getattr(got, name), getattr(want, name), max(1e-5, 2 * unit))


@pytest.mark.parametrize(("N", "kind"), [(3, "plain"), (65, "plain"), (3, "int8")])
def test_head_of_any_size(device: torch.device, assert_close, N: int, kind: str) -> None:
    """Fused up to 64 positions, a product and then its statistics beyond and for 8-bit weights: the same to a rounding."""
    from fastdllm.kernels import quantize_weight
    from fastdllm.kernels.confidence import triton

    hidden, weight = torch.randn(N, 64, device=device).half(), (torch.randn(100, 64, device=device) / 4).half()
    wq, scale = (weight, None) if kind == "plain" else quantize_weight(weight, kind)
    banned = bans(100, device)
    got, want = (x.head_confidence(hidden, wq, banned, False, True, scale) for x in (triton, reference))
    assert torch.equal(got.top, want.top) and got.entropy is None
    assert_close(got.prob, want.prob, 1e-2)
    assert_close(got.margin, want.margin, 1e-2)

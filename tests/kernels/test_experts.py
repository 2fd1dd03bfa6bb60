# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts, whichever way it is computed, is the sum over the chosen experts that a loop makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.experts import reference
from fastdllm.kernels.linear.reference import quantize_weight

pytestmark = pytest.mark.each_choice
# rows, experts, how many of them work, channels of one, channels that work always, C
SHAPES = [(1, 1, 1, 4, 0, 8), (5, 6, 2, 12, 4, 20), (33, 8, 3, 16, 16, 64), (9, 5, 5, 7, 3, 24)]
WIDE = [(65, 6, 2, 16, 0, 32), (130, 8, 3, 24, 8, 64)]  # more positions than those for which all experts compute


def inputs(
    N: int, count: int, k: int, inner: int, shared: int, C: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """x, chosen, weight, gate_up, down, norm, residual; one expert that nobody chose where there is one to spare."""
    F = count * inner + shared
    x, residual = (torch.randn(N, 1, C).to(dtype) for _ in range(2))
    some = max(k, count - 1)
    chosen = torch.stack([torch.randperm(some)[:k] for _ in range(N)]).view(N, 1, k)
    gate_up, down = torch.randn(2 * F, C) * C**-0.5, torch.randn(C, F) * inner**-0.5
    norm = torch.rand(C) + 0.5
    made = x, chosen, torch.rand(N, 1, k), gate_up.to(dtype), down.to(dtype), norm.to(dtype), residual
    return tuple(t.to(device) for t in made)


def loop(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, count: int, inner: int) -> Tensor:
    """Position by position, expert by expert, in float64."""
    x, weight, gate_up, down = (t.double().cpu() for t in (x, weight, gate_up, down))
    F = down.shape[1]
    out = torch.zeros_like(x)
    for n in range(len(x)):
        parts = [(slice(e * inner, (e + 1) * inner), w) for e, w in zip(chosen[n, 0].tolist(), weight[n, 0], strict=True)]
        for part, share in [*parts, (slice(count * inner, F), 1.0)]:
            gate, up = gate_up[:F][part] @ x[n, 0], gate_up[F:][part] @ x[n, 0]
            out[n, 0] += share * (down[:, part] @ (gate * gate.sigmoid() * up))
    return out


def normalised(y: Tensor, norm: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = y + residual.double().cpu()
    return h / (h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double().cpu(), h


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
@pytest.mark.parametrize("grouped", [True, False])
def test_reference_against_a_loop(shape: tuple[int, ...], grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not grouped:
        monkeypatch.setattr(reference, "GROUPED", None)
        monkeypatch.setattr(reference, "CHUNK", 7)
    _, count, _, inner, *_ = shape
    x, chosen, weight, gate_up, down, norm, residual = inputs(*shape, torch.float32)
    y, h = reference.experts_rmsnorm(x, chosen, weight, gate_up, down, count, inner, norm, 1e-5, residual)
    want = normalised(loop(x, chosen, weight, gate_up, down, count, inner), norm, residual)
    for got, expected in zip((y, h), want, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(reference.GROUPED is None, reason="this torch has no grouped product")
@pytest.mark.parametrize("shape", WIDE, ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_sorted_by_expert_and_side_by_side_are_one(
    device: torch.device, assert_close, shape: tuple[int, ...], given: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, chosen, weight, gate_up, down, norm, residual = inputs(*shape, given, device)
    rest = (shape[1], shape[3], norm, 1e-5, residual)
    if device.type == "cuda" and given == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10):
        assert reference.is_sorted(x.flatten(0, 1), gate_up, None, shape[3])
    monkeypatch.setattr(reference, "SORTED_CHUNK", 50)
    fast = reference.experts_rmsnorm(x, chosen, weight, gate_up, down, *rest)
    monkeypatch.setattr(reference, "GROUPED", None)
    plain = reference.experts_rmsnorm(x, chosen, weight, gate_up, down, *rest)
    for got, want in zip(fast, plain, strict=True):
        assert_close(got, want, 2e-6 if given == torch.float32 else 1e-2)


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
@pytest.mark.parametrize("kind", [None, "fp8", "int8", "int4"])
def test_kernel(device: torch.device, assert_close, shape: tuple[int, ...], kind: str | None, dtype: torch.dtype) -> None:
    from fastdllm.kernels.experts import triton

    _, count, _, inner, *_ = shape
    x, chosen, weight, gate_up, down, norm, residual = inputs(*shape, dtype, device)
    scales = (None, None)
    if kind is not None:
        if dtype == torch.float16 and kind == "fp8":
            pytest.skip("fp8 weights meet bf16 activations")
        (gate_up, first), (down, second) = quantize_weight(gate_up, kind), quantize_weight(down, kind)
        scales = (first, second)
    given = x, chosen, weight, gate_up, down, count, inner, norm, 1e-5, residual, *scales
    ratio = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for got, want in zip(triton.experts_rmsnorm(*given), reference.experts_rmsnorm(*given), strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want, 0.1 if kind == "fp8" else ratio)


def test_what_nobody_asked_for_may_overflow() -> None:
    x, chosen, weight, gate_up, down, norm, residual = inputs(4, 3, 1, 8, 0, 16, torch.float16)
    gate_up.view(2, 3, 8, 16)[:, 2] = 6e4  # the last expert, which no position chose
    y, _ = reference.experts_rmsnorm(x, chosen, weight, gate_up, down, 3, 8, norm, 1e-5, residual)
    assert y.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("N", [32, 200])
def test_a_graph_follows_what_is_chosen(N: int, assert_close) -> None:
    """Captured with one choice, replayed with another: nothing of the first is left, and nothing is read on the host."""
    from fastdllm.kernels import experts_rmsnorm

    x, chosen, weight, gate_up, down, norm, residual = inputs(N, 16, 4, 64, 64, 128, torch.bfloat16, "cuda")
    rest = (gate_up, down, 16, 64, norm, 1e-5, residual)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        experts_rmsnorm(x, chosen, weight, *rest)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts_rmsnorm(x, chosen, weight, *rest)
    other = torch.stack([torch.randperm(16)[:4] for _ in range(N)]).view(N, 1, 4).cuda()
    for choice in (other, torch.arange(4, device="cuda").expand(N, 1, 4)):
        chosen.copy_(choice)
        graph.replay()
        for got, want in zip(out, reference.experts_rmsnorm(x, choice, weight, *rest), strict=True):
            assert_close(got, want, 1e-2)

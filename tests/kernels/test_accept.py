# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules against literal loops, and the promises every rule makes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.accept import reference

pytestmark = pytest.mark.pairwise

VALUE = {"threshold": 0.9, "threshold_strict": 0.9, "quota": 3.0, "factor": 1.0, "factor_published": 0.75}


def loop(conf: list[float], masked: list[bool], rule: str, value: float) -> set[int]:
    """The rule as its source states it, one row."""
    order = sorted((i for i, m in enumerate(masked) if m), key=lambda i: -conf[i] if conf[i] == conf[i] else math.inf)
    if not order:
        return set()
    c = [conf[i] for i in order]
    if rule == "threshold":
        chosen = [i for i in order if conf[i] >= value]
    elif rule == "threshold_strict":
        chosen = [i for i in order if conf[i] > value]
    elif rule == "quota":
        chosen = order[: int(value)]
    elif rule == "factor":
        chosen = order[: max((n for n in range(1, len(c) + 1) if (n + 1) * (1 - c[n - 1]) < value), default=0)]
    else:
        scan = [-1.0] + [1 - value / (n + 1) for n in range(2, len(c) + 1)]
        stop = next((n for n in range(len(c)) if c[n] < scan[n]), len(c) - 1)
        chosen = order[: stop + 1 if stop in (0, len(c) - 1) else stop]
    return set(chosen) | {order[0]}


def rows(R: int, Q: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Confidences on a grid of 1/64 (exact in fp32, many ties), some rows all masked, one with no mask at all."""
    conf = torch.where(torch.rand(R, Q) < 0.6, 1 - torch.rand(R, Q) ** 3 * 0.3, torch.rand(R, Q))
    masked = torch.rand(R, Q) < torch.rand(R, 1) * 1.5
    masked[0], masked[-1] = False, True
    ids, top = torch.randint(0, 99, (2, R, Q))
    return tuple(x.to(device) for x in (ids, top + 100, (conf * 64).round() / 64, masked))


def implementations() -> list:
    from fastdllm.kernels.accept import triton

    return [reference, triton]


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize(("R", "Q"), [(2, 1), (40, 5), (24, 32), (6, 33)])
def test_rules(device: torch.device, rule: str, R: int, Q: int) -> None:
    ids, top, conf, masked = rows(R, Q, device)
    value = torch.full((R,), VALUE[rule], device=device)
    for impl in implementations():
        out = impl.accept(ids, top, conf, masked, rule, value)
        for r in range(R):
            want = loop(conf[r].tolist(), masked[r].tolist(), rule, VALUE[rule])
            assert {i for i in range(Q) if out[r, i] != ids[r, i]} == want
            assert all(out[r, i] == top[r, i] for i in want)


@pytest.mark.parametrize("rule", reference.RULES)
def test_values_are_per_row(device: torch.device, rule: str) -> None:
    ids, top, conf, masked = rows(12, 9, device)
    value = torch.rand(24, device=device)[::2] * (4 if rule == "quota" else 1)
    for impl in implementations():
        whole = impl.accept(ids, top, conf, masked, rule, value)
        alone = [
            impl.accept(ids[i], top[i], conf[i], masked[i], rule, value[i]) for i in (slice(r, r + 1) for r in range(12))
        ]
        assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("rule", reference.RULES)
def test_nan_never_commits_before_a_number(device: torch.device, rule: str) -> None:
    nan = float("nan")
    conf = torch.tensor([[nan, 0.1, nan, 0.99], [nan, nan, 0.3, 0.2]], device=device)
    masked = torch.tensor([[True, True, True, False], [True, True, False, False]], device=device)
    ids, top = torch.zeros(2, 4, dtype=torch.int64, device=device), torch.ones(2, 4, dtype=torch.int64, device=device)
    value = torch.full((2,), 1.0 if rule == "quota" else 0.5, device=device)
    for impl in implementations():
        out = impl.accept(ids, top, conf, masked, rule, value)
        assert out[0, 1] == 1 and out[0, 3] == 0
        assert out[1, 0] == 1 and (out[1, 2:] == 0).all()


def test_published_factor_takes_the_last_position_where_the_paper_does_not(device: torch.device) -> None:
    conf = torch.tensor([[0.99, 0.98, 0.97, 0.2]], device=device)
    ids, top = torch.zeros(1, 4, dtype=torch.int64, device=device), torch.ones(1, 4, dtype=torch.int64, device=device)
    for impl in implementations():
        count = [
            impl.accept(ids, top, conf, conf > 0, rule, torch.ones(1, device=device)).sum().item()
            for rule in ("factor", "factor_published")
        ]
        assert count == [3, 4]


def test_negative_confidences(device: torch.device) -> None:
    """Negative entropy is a confidence too."""
    conf = torch.tensor([[-3.0, -0.5, -9.0]], device=device)
    ids, top = torch.zeros(1, 3, dtype=torch.int64, device=device), torch.ones(1, 3, dtype=torch.int64, device=device)
    for impl in implementations():
        out = impl.accept(ids, top, conf, conf < 0, "quota", torch.tensor([2.0], device=device))
        assert out.tolist() == [[1, 1, 0]]


def test_unknown_rule() -> None:
    x = torch.zeros(1, 1)
    for impl in implementations():
        with pytest.raises(ValueError, match="rule='best' is not one of threshold"):
            impl.accept(x.long(), x.long(), x, x > 0, "best", torch.zeros(1))

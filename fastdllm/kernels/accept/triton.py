# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules in one launch, one program a row.

A position's rank is the number of positions before it in (confidence falling, position rising) order. Every
rule is then a comparison of a position's own rank and confidence, or a count of such comparisons; nothing is
sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.accept.reference import RULES
from fastdllm.kernels.pdl import LAUNCH, wait


@triton.jit
def _sort_key(b_conf, m):
    """Real confidences by value, then NaN, then what is not masked."""
    lowest = -3.4028234663852886e38
    b_key = tl.where(b_conf != b_conf, lowest, tl.maximum(b_conf, lowest))
    return tl.where(m, b_key, -float("inf"))


@triton.jit
def _accept_kernel(ids, top, conf, masked, value, out, Q, RULE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr):
    i_r = tl.program_id(0).to(tl.int64)
    o_q = tl.arange(0, BLOCK_Q)
    p_q = i_r * Q + o_q
    wait()
    b_masked = tl.load(masked + p_q, mask=o_q < Q, other=0) != 0
    b_conf = tl.load(conf + p_q, mask=o_q < Q, other=0.0)
    b_key = _sort_key(b_conf, b_masked)
    b_value = tl.load(value + i_r)

    b_rank = tl.zeros((BLOCK_Q,), dtype=tl.int32)
    for j in range(0, Q, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        b_mj = tl.load(masked + i_r * Q + o_j, mask=o_j < Q, other=0) != 0
        b_kj = _sort_key(tl.load(conf + i_r * Q + o_j, mask=o_j < Q, other=0.0), b_mj)
        tie = (b_kj[None, :] == b_key[:, None]) & (o_j[None, :] < o_q[:, None])
        b_rank += tl.sum(((b_kj[None, :] > b_key[:, None]) | tie).to(tl.int32), 1)

    n = (b_rank + 2).to(tl.float32)  # n + 1 of the factor rule, for the position that would be the n-th committed
    if RULE == "threshold":
        chosen = b_conf >= b_value
    elif RULE == "threshold_strict":
        chosen = b_conf > b_value
    elif RULE == "quota":
        chosen = b_rank < b_value
    elif RULE == "factor":
        chosen = b_rank < tl.sum((b_masked & (n * (1.0 - b_key) < b_value)).to(tl.int32), 0)
    else:
        count = tl.sum(b_masked.to(tl.int32), 0)
        # Rounded division: the approximate one would decide differently from torch at the boundary.
        fails = b_masked & (b_rank > 0) & (b_key < 1.0 - tl.div_rn(b_value, n))
        first = tl.min(tl.where(fails, b_rank, count), 0)
        chosen = b_rank < tl.where(first >= count - 1, count, first)
    commit = (chosen | (b_rank == 0)) & b_masked
    b_ids = tl.load(ids + p_q, mask=o_q < Q, other=0)
    b_top = tl.load(top + p_q, mask=o_q < Q, other=0)
    tl.store(out + p_q, tl.where(commit, b_top, b_ids), mask=o_q < Q)


def accept(ids: Tensor, top: Tensor, conf: Tensor, masked: Tensor, rule: str, value: Tensor) -> Tensor:
    """See `fastdllm.kernels.accept.reference.accept`."""
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of {', '.join(RULES)}")
    R, Q = ids.shape
    out = torch.empty((R, Q), dtype=ids.dtype, device=ids.device)
    _accept_kernel[(R,)](
        ids.contiguous(),
        top.contiguous(),
        conf.contiguous(),
        masked.contiguous(),
        value.contiguous(),
        out,
        Q,
        RULE=rule,
        BLOCK_Q=triton.next_power_of_2(Q),
        BLOCK_J=32,
        num_warps=4,
        **LAUNCH,
    )
    return out

# SPDX-License-Identifier: Apache-2.0
"""One program for each row; the candidates stay in registers while they are taken one after another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.pdl import LAUNCH, wait


@triton.jit
def _discount_kernel(conf, masked, attention, out, Q, weight, stride_r, stride_i, stride_s, BLOCK_Q: tl.constexpr):
    i_r = tl.program_id(0).to(tl.int64)
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < Q
    wait()
    b_conf = tl.load(conf + i_r * Q + o_q, mask=m_q, other=0.0)
    left = (tl.load(masked + i_r * Q + o_q, mask=m_q, other=0) != 0) & m_q
    b_worth = b_conf
    for _ in range(0, tl.sum(left.to(tl.int32), 0)):
        b_key = tl.where(left, tl.where(b_worth != b_worth, -3.4028234663852886e38, b_worth), -float("inf"))
        best = tl.min(tl.where(b_key == tl.max(b_key, 0), o_q, Q - 1), 0)
        left &= o_q != best
        doubt = 1.0 - tl.sum(tl.where(o_q == best, b_conf, 0.0), 0)
        doubt = tl.where(doubt < 0.0, 0.0, tl.where(doubt > 1.0, 1.0, doubt))  # NaN stays one
        p_toward = attention + i_r * stride_r + o_q.to(tl.int64) * stride_i + best.to(tl.int64) * stride_s
        b_toward = tl.load(p_toward, mask=left, other=0.0)
        b_worth = tl.where(left, b_worth - weight * b_toward * doubt, b_worth)
    tl.store(out + i_r * Q + o_q, b_worth, mask=m_q)


def discount(conf: Tensor, masked: Tensor, attention: Tensor, weight: float) -> Tensor:
    """See `fastdllm.kernels.discount.reference.discount`."""
    R, Q = conf.shape
    out = torch.empty((R, Q), dtype=conf.dtype, device=conf.device)
    _discount_kernel[(R,)](
        conf.contiguous(),
        masked.contiguous(),
        attention,
        out,
        Q,
        weight,
        *attention.stride(),
        BLOCK_Q=triton.next_power_of_2(Q),
        num_warps=1 if Q <= 64 else 4,
        **LAUNCH,
    )
    return out

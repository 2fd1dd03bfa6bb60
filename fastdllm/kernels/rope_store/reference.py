# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding (Su et al., arXiv 2104.09864; half-split layout) and KV write in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdllm.kernels.linear.reference import Activations, linear
from fastdllm.kernels.rmsnorm.reference import rmsnorm


def rope_store(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    pos: Tensor,
    row: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    slot: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`linear_rope_store` of a projection that is there already, qkv [R, W, (H + 2K) D]."""
    R, W, _ = qkv.shape
    each = qkv.view(R, W, heads + 2 * kv_heads, -1)
    qk, v = each[:, :, : heads + kv_heads], each[:, :, heads + kv_heads :]
    if q_norm is not None or k_norm is not None:
        q, k = qk[:, :, :heads], qk[:, :, heads:]
        q = q if q_norm is None else rmsnorm(q, q_norm, eps)[0]
        k = k if k_norm is None else rmsnorm(k, k_norm, eps)[0]
        qk = torch.cat([q, k], 2)
    c, s = torch.embedding(cos, pos).unsqueeze(2), torch.embedding(sin, pos).unsqueeze(2)
    qk = _rotate(qk, c, s).to(k_store.dtype)  # together: small operations cost by number
    slot = pos if slot is None else slot
    # Index dimensions parted by a slice come first: the indexed store is [R, W, K, D].
    k_store[row[:, None], :, slot] = qk[:, :, heads:]
    v_store[row[:, None], :, slot] = v.to(v_store.dtype)
    return qk[:, :, :heads]


def linear_rope_store(
    x: Activations,
    weight: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    pos: Tensor,
    row: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    slot: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Project x [R, W, C] to H query, K key and K value heads of D, rotate, and write keys and values into the store.

    weight: [(H + 2K) D, C], the queries' rows first, then the keys'; scale, bias: see `fastdllm.kernels.linear`.
    cos, sin: [Tmax, r] fp32 in the half-split layout, indexed by position; the rotation is computed in fp32. Of each head
        the first r <= D channels turn, and the others stay.
    pos: [R, W] int64, the positions. row: [R] int64, the rows of the store.
    k_store, v_store: [B, K, T, D], contiguous in D, else of any strides; rows may overlap. Slots [row[r], :, pos[r, w]] are
        overwritten, or [row[r], :, slot[r, w]] where `slot` [R, W] int64 is given, and nothing else.
    q_norm, k_norm: [D]; each query or key head is normalised by its root mean square before the rotation (Qwen3).

    Returns the queries [R, W, H, D] in the store's dtype.
    """
    qkv = linear(x, weight, scale, bias)
    return rope_store(qkv, heads, kv_heads, cos, sin, pos, row, k_store, v_store, slot, q_norm, k_norm, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-high, low) * sin for as many numbers of a head as cos has, with few copies; the others stay as is."""
    x, turned = x.float(), cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((_rotate(x[..., :turned], cos, sin), x[..., turned:]), -1)
    half = turned // 2
    out = x * cos
    out[..., :half].sub_(x[..., half:] * sin[..., :half])
    out[..., half:].add_(x[..., :half] * sin[..., half:])
    return out

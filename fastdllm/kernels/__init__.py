# SPDX-License-Identifier: Apache-2.0
"""The operations a forward is made of: one folder each, `reference.py` (torch) and `triton.py` with the same
signature.

CUDA tensors use Triton where it imports, everything else the reference. FASTDLLM_KERNELS=reference or =triton
overrides that for every tensor (read once, at import). Importing this package does not import Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastdllm.kernels.accept import reference as _accept
from fastdllm.kernels.attention import reference as _attention
from fastdllm.kernels.confidence import reference as _confidence
from fastdllm.kernels.confidence.reference import Confidence
from fastdllm.kernels.linear import reference as _linear
from fastdllm.kernels.rmsnorm import reference as _rmsnorm
from fastdllm.kernels.rope_store import reference as _rope_store
from fastdllm.kernels.silu_mul import reference as _silu_mul

__all__ = [
    "Confidence",
    "accept",
    "attention",
    "confidence",
    "head_confidence",
    "linear",
    "linear_rmsnorm",
    "linear_rope_store",
    "linear_silu_mul",
    "quantize_weight",
    "rmsnorm",
]

_CHOICE = os.environ.get("FASTDLLM_KERNELS", "auto")
if _CHOICE not in ("auto", "reference", "triton"):
    raise ValueError(f"FASTDLLM_KERNELS={_CHOICE!r} is not one of auto, reference, triton")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _triton(op: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{op}.triton")


def _pick(reference: ModuleType, x: Tensor) -> ModuleType:
    """The module that implements an op for `x`: the reference's own, or its Triton twin, which has no gradient."""
    if x.requires_grad and torch.is_grad_enabled():
        return reference
    if _CHOICE == "triton" or (_CHOICE == "auto" and x.is_cuda and _has_triton()):
        return _triton(reference.__name__.split(".")[-2])
    return reference


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Normalise x [..., C] (plus `residual` [..., C]) by its root mean square. Returns (y, h), h = x +
    residual.

    Statistics in fp32; the result is cast back to x.dtype before the product with weight [C], as transformers
    does.
    """
    return _pick(_rmsnorm, x).rmsnorm(x, weight, eps, residual)


def linear_rmsnorm(
    x: Tensor,
    wq: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rmsnorm` of `linear(x, wq, scale, bias)` plus `residual` [..., N], weight [N]. Returns (y, h), both [..., N]."""
    return _pick(_rmsnorm, x).linear_rmsnorm(x, wq, weight, eps, residual, scale, bias)


def linear_silu_mul(x: Tensor, wq: Tensor, scale: Tensor | None = None) -> Tensor:
    """SwiGLU: silu(first half) * second half of `linear(x, wq, scale)`, wq [2F, C]; returns [..., F]."""
    return _pick(_silu_mul, x).linear_silu_mul(x, wq, scale)


def linear_rope_store(
    x: Tensor,
    wq: Tensor,
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
) -> Tensor:
    """Project x [R, W, C] to queries, keys and values by wq [(H + 2K) D, C], rotate, and write keys and values
    into the store, in place.

    cos, sin [Tmax, D] fp32 in the half-split layout; pos [R, W] and row [R] int64; k_store, v_store [B, K, T,
    D], of which slots [row[r], :, pos[r, w]] are overwritten, or [row[r], :, slot[r, w]] where `slot` [R, W] int64
    is given. Rotation in fp32. Returns q [R, W, H, D] in the store's dtype.
    """
    return _pick(_rope_store, x).linear_rope_store(
        x, wq, heads, kv_heads, cos, sin, pos, row, k_store, v_store, scale, bias, slot
    )


def attention(
    q: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    row: Tensor,
    limit: Tensor,
    keys: int,
    hide: Tensor | None = None,
    scale: float | None = None,
    uniform: bool = False,
    swap: Tensor | None = None,
) -> Tensor:
    """Queries q [R, W, H, D] over the store's rows `row` [R]; k_store, v_store [B, K, T, D]. Returns [R, W,
    H, D].

    Query (r, w) sees slots j < limit[r, w] (int64) that are not in [hide[r, 0], hide[r, 1]) (int64 [R, 2]);
    one that sees nothing gives zeros. Only slots [0, keys) are looked at: `keys` bounds every limit. Query
    head h reads kv head h // (H / K). `scale` is 1/sqrt(D) unless given. `uniform=True` promises that every
    limit is `keys` and nothing is hidden.

    `swap` [R, W, 3] int64 gives each query (start, stop, instead): it does not see slots [start, stop) but as many
    from `instead` on in their place, whatever its limit; start = stop changes nothing. `hide` holds for both.
    """
    # Triton multiplies fp32 outside the matrix unit and takes half a minute to compile it; the library has both.
    chosen = _attention if _CHOICE == "auto" and q.dtype == torch.float32 else _pick(_attention, q)
    return chosen.attention(q, k_store, v_store, row, limit, keys, hide, scale, uniform, swap)


def confidence(logits: Tensor, banned: Tensor | None = None, entropy: bool = False, margin: bool = False) -> Confidence:
    """Top token and softmax statistics of logits [N, V] in fp32; entries of `banned` [V] bool have
    probability 0.

    Of equal logits the one with the smaller id is the top. `entropy` (nats) and `margin` (best minus
    second-best probability) are computed where asked for.
    """
    return _pick(_confidence, logits).confidence(logits, banned, entropy, margin)


def head_confidence(
    hidden: Tensor,
    wq: Tensor,
    banned: Tensor | None = None,
    entropy: bool = False,
    margin: bool = False,
    scale: Tensor | None = None,
) -> Confidence:
    """`confidence` of `linear(hidden, wq, scale)`, hidden [N, C] and wq [V, C]: logits that need not reach memory."""
    return _pick(_confidence, hidden).head_confidence(hidden, wq, banned, entropy, margin, scale)


def accept(ids: Tensor, top: Tensor, conf: Tensor, masked: Tensor, rule: str, value: Tensor) -> Tensor:
    """The block's next ids [R, Q]: `top` [R, Q] where it is committed, `ids` elsewhere. No host read.

    Only positions of `masked` [R, Q] bool are committed, and in each row that has one at least the most
    confident (conf [R, Q] fp32, ties by position; NaN comes after every number). `rule`, with value [R] fp32:
    threshold: conf >= value; threshold_strict: conf > value; quota: the `value` most confident; factor: the n
    most confident, n the largest with (n + 1)(1 - c_(n)) < value (Fast-dLLM, arXiv 2505.22618);
    factor_published: that rule as the published code scans it, >= and the last position included when the
    scan stops there.
    """
    return _pick(_accept, conf).accept(ids, top, conf, masked, rule, value)


def quantize_weight(w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Quantise w [N, C] to "fp8" (e4m3) or "int8": (wq [N, C], scale [N] fp32), w close to wq * scale[:, None]."""
    return _linear.quantize_weight(w, kind)


def linear(x: Tensor, wq: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x [..., C] times the transpose of wq [N, C], plus bias [N]; returns [..., N].

    With `scale` [N] the weight is a quantised one (`quantize_weight`): products accumulate in fp32 and are scaled by output
    channel. fp8 weights meet fp8 activations, quantised here with one scale per token; int8 weights meet x as it is.
    """
    return _pick(_linear, x).linear(x, wq, scale, bias)

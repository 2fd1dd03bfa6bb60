# SPDX-License-Identifier: Apache-2.0
"""The network of `fastdllm.models` written for training: packed tokens, plain functions that compile and capture well.

Parameters are the published tensors themselves, kept apart (Muon orthogonalises q, k and v one by one) and joined by the
core's own table of names, so a checkpoint needs no renaming.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdllm.models.spec import ModelSpec
from fastdllm.training.objective import target_states
from scripts.recipes.tiny.tiny_formats import FAMILIES, expected_shapes, parts_of

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10; a CPU does not need it
    varlen_attn = None  # type: ignore[assignment]

Parameters = dict[str, Tensor]  # published name -> fp32 tensor
MAX_DOCUMENT = 1024  # tokens of the longest packed document, its tail included
# torch 2.10 has is_causal, later versions window_size in its place.
WINDOWED = varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters
ONLY_PAST = {"window_size": (-1, 0)} if WINDOWED else {"is_causal": True}
LAYER_PARTS = ("attn_norm", "qkv.weight", "qkv.bias", "out.weight", "ffn_norm", "gate_up.weight", "down.weight")


@dataclass
class Batch:
    """One step's tokens, N in a row.

    ids, positions [N] int64. targets [M] int64 and their shares in the loss, weights [M] fp32: M is N, or for block
    diffusion B (T - 1). `ends` [documents + 1] int32: cumulative lengths of documents that attend to themselves only.
    Block diffusion has instead `mask` [2B, 1, 2T, 2T], added to attention scores, with N = 2B * 2T, and `masked` [B, T]
    bool, the tokens that the first view masks. `drill` [M] bool: targets that the reported accuracy leaves out.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    ends: Tensor | None = None
    mask: Tensor | None = None
    masked: Tensor | None = None
    drill: Tensor | None = None


def initialise(family: str, spec: ModelSpec, seed: int) -> Parameters:
    """Norms one, biases zero, embeddings 0.02, matrices 1/sqrt(fan in); those that write the residual scaled down."""
    generator = torch.Generator().manual_seed(seed)
    table, parameters = FAMILIES[family].names(spec), {}
    for name, shape in expected_shapes(family, spec).items():
        part = table[name][0]
        if part.endswith("norm"):
            parameters[name] = torch.ones(shape)
        elif part.endswith(".bias"):
            parameters[name] = torch.zeros(shape)
        else:
            scale = 0.02 if part.startswith("embed") else 1 / math.sqrt(shape[1])
            if part.endswith(("out.weight", "down.weight")):
                scale /= math.sqrt(2 * spec.layers)
            parameters[name] = torch.randn(shape, generator=generator) * scale
    return parameters


def group(family: str, spec: ModelSpec, parameters: Parameters) -> dict[str, list[Tensor]]:
    """Name in the core's network -> the published tensors that fill it, top row first."""
    grouped: dict[str, list[Tensor]] = {}
    for name, (target, _) in sorted(parts_of(family, spec).items(), key=lambda part: part[1]):
        grouped.setdefault(target, []).append(parameters[name])
    return grouped


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def rope(spec: ModelSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [N, 1, D], half-split layout."""
    exponent = torch.arange(0, spec.head_dim, 2, device=positions.device, dtype=torch.float32) / spec.head_dim
    angle = positions.float()[:, None] * spec.rope_theta**-exponent
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos(), angle.sin()


def attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
    """q, k, v [N, H, D] -> [N, H, D], within documents (`ends`) or under `mask`."""
    if mask is None and q.is_cuda:
        only_past: dict[str, Any] = ONLY_PAST if causal else {}
        return varlen_attn(q, k, v, ends, ends, MAX_DOCUMENT, MAX_DOCUMENT, **only_past)  # type: ignore
    if mask is None:
        assert ends is not None
        place = torch.arange(q.shape[0], device=q.device)
        document = torch.searchsorted(ends[1:].long(), place, right=True)
        mask = (document[:, None] == document)[None, None]
        if causal:
            mask = mask & (place[:, None] >= place)
    rows, heads, dim = mask.shape[0], q.shape[1], q.shape[2]
    q, k, v = (x.view(rows, -1, heads, dim).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(-1, heads, dim)


def layer(
    x: Tensor,
    attn_norm: list[Tensor],
    qkv: list[Tensor],
    qkv_bias: list[Tensor] | None,
    out: list[Tensor],
    ffn_norm: list[Tensor],
    gate_up: list[Tensor],
    down: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    ends: Tensor | None,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
    causal: bool,
) -> Tensor:
    """One block on [N, C]; every weight comes as the published tensors that it is joined of."""
    tokens, dtype, dim = x.shape[0], x.dtype, qkv[0].shape[0] // heads
    h = rms_norm(x, attn_norm[0], eps)
    joined = F.linear(h, torch.cat(qkv).to(dtype), None if qkv_bias is None else torch.cat(qkv_bias).to(dtype))
    q, k, v = joined.view(tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
    q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()
    if kv_heads < heads:
        k, v = (z.repeat_interleave(heads // kv_heads, 1) for z in (k, v))
    x = x + F.linear(attend(q, k, v, ends, mask, causal).reshape(tokens, -1), out[0].to(dtype))
    gate, up = F.linear(rms_norm(x, ffn_norm[0], eps), torch.cat(gate_up).to(dtype)).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down[0].to(dtype))


def cross_entropy(h: Tensor, norm: Tensor, head: Tensor, targets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[N] fp32 losses and [N] bool, whether the target is the most probable token."""
    logits = F.linear(rms_norm(h, norm, eps), head.to(h.dtype)).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


class Network:
    """`parameters` under `spec`. `compiled` compiles the two functions that take the time."""

    def __init__(self, family: str, spec: ModelSpec, parameters: Parameters, compiled: bool, dtype: torch.dtype) -> None:
        self.spec, self.dtype, self.causal = spec, dtype, family == "qwen"
        grouped = group(family, spec, parameters)
        self.embed, self.norm = grouped["embed.weight"][0], grouped["norm"][0]
        self.head = grouped.get("head.weight", [self.embed])[0]
        self.layers = [[grouped.get(f"layers.{i}.{part}") for part in LAYER_PARTS] for i in range(spec.layers)]
        self.layer: Callable[..., Tensor] = torch.compile(layer, dynamic=False) if compiled else layer
        self.cross_entropy = torch.compile(cross_entropy, dynamic=False) if compiled else cross_entropy

    def hidden(self, ids: Tensor, positions: Tensor, ends: Tensor | None, mask: Tensor | None) -> Tensor:
        """[N, C] before the final norm; row i predicts the token at position i + shift."""
        s = self.spec
        cos, sin = rope(s, positions)
        x = F.embedding(ids, self.embed).to(self.dtype)
        for weights in self.layers:
            x = self.layer(x, *weights, cos, sin, ends, mask, s.heads, s.kv_heads, s.rms_eps, self.causal)
        return x

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy [M] of every target and whether it was hit. No target is the first token of its document."""
        h = self.hidden(batch.ids, batch.positions, batch.ends, batch.mask)
        if batch.masked is not None:
            rows, width = batch.masked.shape
            noisy = h.view(2 * rows, 2 * width, -1)[:, :width]
            h = target_states(noisy, batch.masked).flatten(0, 1)
        elif self.spec.shift:
            h = torch.cat([h[:1], h[:-1]])
        return self.cross_entropy(h, self.norm, self.head, batch.targets, self.spec.rms_eps)

# SPDX-License-Identifier: Apache-2.0
"""The network in plain torch, one sequence at a time: the ground the reference loops stand on.

It shares nothing with the engine but the weights: no store, no windows, no kernels. Keys and values pass through a function
that the loop supplies, so that a loop can concatenate or replace them as the published ones do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdllm.models import Model

KV = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]  # (layer, k [W, K, D], v) -> all keys and values to attend to


def plain(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v


def keep(sink: dict[int, tuple[Tensor, Tensor]]) -> KV:
    """Attend to the pass itself, and remember its keys and values."""

    def kv(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        sink[layer] = (k, v)
        return k, v

    return kv


def append_to(past: dict[int, tuple[Tensor, Tensor]], sink: dict[int, tuple[Tensor, Tensor]] | None = None) -> KV:
    """Attend to the past and the pass; `sink` remembers both together."""

    def kv(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if past:
            k, v = torch.cat([past[layer][0], k]), torch.cat([past[layer][1], v])
        if sink is not None:
            sink[layer] = (k, v)
        return k, v

    return kv


def replace_in(past: dict[int, tuple[Tensor, Tensor]], start: int) -> KV:
    """Overwrite the rows from `start` in the past, then attend to all of it."""

    def kv(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past[layer][0][start : start + len(k)] = k
        past[layer][1][start : start + len(v)] = v
        return past[layer]

    return kv


class PlainNetwork:
    """Calls: (ids [W], start, kv) -> logits [W, V], the mask's column at -inf. `grid`: block-causal block size, 0 for none;
    with `causal` no position sees a later one.

    `forwards` counts the calls.
    """

    def __init__(self, model: Model, grid: int = 0, origin: int = 0) -> None:
        self.spec, self.grid, self.origin, self.forwards = model.spec, grid, origin, 0
        self.banned = model.banned
        self.weights = {k: v.detach() for k, v in model.network.state_dict().items()}

    def _norm(self, h: Tensor, name: str) -> Tensor:
        return h * torch.rsqrt((h * h).mean(-1, keepdim=True) + self.spec.rms_eps) * self.weights[name]

    def _rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        """x [W, heads, D] as complex pairs (i, i + D / 2), turned by pos * theta^(-2i / D)."""
        half = x.shape[-1] // 2
        angle = pos[:, None].double() * self.spec.rope_theta ** (-torch.arange(half).double() / half)
        turned = (
            torch.complex(x[..., :half].double(), x[..., half:].double())
            * torch.polar(torch.ones(()).double(), angle)[:, None]
        )
        return torch.cat([turned.real, turned.imag], -1).float()

    def __call__(self, ids: Tensor, start: int = 0, kv: KV = plain, causal: bool = False) -> Tensor:
        self.forwards += 1
        s, w = self.spec, self.weights
        pos = start + torch.arange(len(ids))
        h = w["embed.weight"][ids]
        for i in range(s.layers):
            p = f"layers.{i}."
            y = self._norm(h, p + "attn_norm") @ w[p + "qkv.weight"].T + (w[p + "qkv.bias"] if s.qkv_bias else 0)
            q, k, v = y.view(len(ids), -1, s.head_dim).split([s.heads, s.kv_heads, s.kv_heads], 1)
            if s.qk_norm:
                q, k = self._norm(q, p + "q_norm"), self._norm(k, p + "k_norm")
            k, v = kv(i, self._rotate(k, pos), v.clone())
            group = s.heads // s.kv_heads
            score = torch.einsum("whd,thd->hwt", self._rotate(q, pos), k.repeat_interleave(group, 1)) / s.head_dim**0.5
            if self.grid:
                hidden = (torch.arange(len(k)) - self.origin) // self.grid > (pos[:, None] - self.origin) // self.grid
                score = score.masked_fill(hidden, -torch.inf)
            if causal:
                score = score.masked_fill(torch.arange(len(k)) > pos[:, None], -torch.inf)
            y = torch.einsum("hwt,thd->whd", score.softmax(-1), v.repeat_interleave(group, 1)).flatten(1)
            h = h + y @ w[p + "out.weight"].T
            gate, up = (self._norm(h, p + "ffn_norm") @ w[p + "gate_up.weight"].T).chunk(2, -1)
            h = h + (torch.nn.functional.silu(gate) * up) @ w[p + "down.weight"].T
        head = w["embed.weight"] if s.tied_head else w["head.weight"]
        return (self._norm(h, "norm") @ head.T).masked_fill(self.banned, -torch.inf)

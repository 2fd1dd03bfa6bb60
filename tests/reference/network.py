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
        """x [W, heads, D] as complex pairs (i, i + r / 2) of its first r channels, turned by pos * theta^(-2i / r)."""
        if (turned := self.spec.rotary) and turned < x.shape[-1]:
            return torch.cat([self._turn(x[..., :turned], pos), x[..., turned:]], -1)
        return self._turn(x, pos)

    def _turn(self, x: Tensor, pos: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = pos[:, None].double() * self.spec.rope_theta ** (-torch.arange(half).double() / half)
        turned = (
            torch.complex(x[..., :half].double(), x[..., half:].double())
            * torch.polar(torch.ones(()).double(), angle)[:, None]
        )
        return torch.cat([turned.real, turned.imag], -1).float()

    def _shares(self, y: Tensor, p: str, channels: int) -> Tensor:
        """What each inner channel of a layer's experts is times, for one position y [C]."""
        e, out = self.spec.experts, torch.ones(channels)
        out[: e.count * e.inner] = 0
        logits = self.weights[p + "router"] @ y
        score = logits.softmax(0) if e.score == "softmax" else logits.sigmoid()
        wish = (score if e.score == "softmax" else score + self.weights[p + "router_bias"]).tolist()
        size = e.count // e.groups
        groups = [range(g * size, (g + 1) * size) for g in range(e.groups)]
        if e.groups > 1:
            groups.sort(key=lambda group: -sum(sorted((wish[i] for i in group), reverse=True)[:2]))
        allowed = sorted((i for group in groups[: e.active_groups] for i in group), key=lambda i: -wish[i])[: e.active]
        total = float(sum(score[i] for i in allowed)) if e.score == "sigmoid" and e.active > 1 else 1.0
        for i in allowed:
            out[i * e.inner : (i + 1) * e.inner] = score[i] / total * e.scale
        return out

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
            y = self._norm(h, p + "ffn_norm")
            gate, up = (y @ w[p + "gate_up.weight"].T).chunk(2, -1)
            act = torch.nn.functional.silu(gate) * up
            if s.experts and i >= s.experts.dense:
                act = act * torch.stack([self._shares(row, p, act.shape[1]) for row in y])
            h = h + act @ w[p + "down.weight"].T
        head = w["embed.weight"] if s.tied_head else w["head.weight"]
        return (self._norm(h, "norm") @ head.T).masked_fill(self.banned, -torch.inf)

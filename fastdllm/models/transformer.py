# SPDX-License-Identifier: Apache-2.0
"""The only network: embedding, L x [RMSNorm, grouped-query attention, RMSNorm, SwiGLU or experts], RMSNorm, head.

The families differ only in the numbers of their `ModelSpec`. The network knows nothing of caches, blocks or masks: a
`Window` says which positions to recompute and what they see, and the keys and values go into the store. Projections that
read the same input are one matrix (q/k/v, gate/up), because at batch 1 a forward costs what reading the weights costs, and
few large reads run closer to the memory's speed than many small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdllm import kernels
from fastdllm.forward import Look, Window
from fastdllm.kernels import Activations
from fastdllm.kernels.linear.reference import FP8
from fastdllm.models.rope import frequencies
from fastdllm.models.routing import route
from fastdllm.models.spec import ModelSpec
from fastdllm.store import KVStore

SLACK = 1024  # positions beyond the context that a store may hold: rounding, masks up to the grid, the scratch column
LayerRule = Callable[["Stack", Tensor, Tensor], Tensor]


class Linear(nn.Linear):
    """A projection through `kernels.linear`, which has a faster product than the library's for few rows.

    `scale` [out] fp32 belongs to a weight in 8 bits (`quantize.py`), otherwise it is None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.scale, self.bias)

    @property
    def in_fp8(self) -> bool:
        """Whether the product takes tokens in fp8; quantised beforehand, they would have no gradient."""
        return self.weight.dtype == FP8 and not torch.is_grad_enabled()


def normed(to_fp8: bool) -> Callable[..., tuple[Any, Tensor]]:
    """The product with the norm after it, whose result is quantised for a product that takes fp8."""
    return kernels.linear_rmsnorm_fp8 if to_fp8 else kernels.linear_rmsnorm


class Layer(nn.Module):
    """One transformer layer over the positions of a window."""

    def __init__(self, spec: ModelSpec, index: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        make = {"dtype": dtype, "device": device}
        self.spec, inner = spec, spec.inner(index)
        self.experts = spec.experts if spec.experts and index >= spec.experts.dense else None
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.attn_norm = nn.Parameter(torch.ones(spec.width, **make))
        self.qkv = Linear(spec.width, q + 2 * kv, bias=spec.qkv_bias, **make)
        if spec.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(spec.head_dim, **make))
            self.k_norm = nn.Parameter(torch.ones(spec.head_dim, **make))
        self.out = Linear(q, spec.width, bias=False, **make)
        self.ffn_norm = nn.Parameter(torch.ones(spec.width, **make))
        self.gate_up = Linear(spec.width, 2 * inner, bias=False, **make)
        self.down = Linear(inner, spec.width, bias=False, **make)
        self.router_bias = None
        if self.experts:
            scored = self.experts.score == "sigmoid"  # in fp32, as published: a small difference chooses another expert
            make["dtype"] = torch.promote_types(dtype, torch.float32) if scored else dtype
            self.router = nn.Parameter(torch.zeros(self.experts.count, spec.width, **make))
            if scored:
                self.router_bias = nn.Parameter(torch.zeros(self.experts.count, **make))

    def forward(
        self,
        y: Activations,
        h: Tensor,
        next_norm: Tensor,
        index: int,
        window: Window,
        store: KVStore,
        rope: tuple[Tensor, Tensor],
        to_fp8: bool = False,
    ) -> tuple[Activations, Tensor]:
        """y: the layer's input h [R, W, C], normalised. Returns its output normalised by `next_norm` [C], and its output.

        rope: see `Transformer.rope`.
        to_fp8: the normalised output goes to a product with fp8 weights only, so it may be quantised.

        Each product comes with what reads it (rotation and store, norm, gate), so that one kernel may do both.
        """
        spec, k, v, qkv, out, down = self.spec, store.k[index], store.v[index], self.qkv, self.out, self.down
        row, pos, slot = window.row, window.pos, window.slot
        q = kernels.linear_rope_store(
            y, qkv.weight, spec.heads, spec.kv_heads, *rope, pos, row, k, v, qkv.scale, qkv.bias, slot, **self._norms()
        )  # [R, W, H, D]
        if window.look is not None and index == spec.layers - 1:
            self._between(window.look, q, k, window)
        attention = kernels.attention_fp8 if out.in_fp8 else kernels.attention
        y = attention(
            q, k, v, row, window.kv_len, window.max_kv_len,
            hide=window.hide, dense=window.dense, swap=window.swap, together=window.together,
        )  # fmt: skip
        if isinstance(y, Tensor):  # tokens in fp8 have all heads side by side
            y = y.flatten(2)
        gate_up, eps = self.gate_up, spec.rms_eps
        quantized = self.experts is None and gate_up.in_fp8  # a router reads plain numbers
        y, h = normed(quantized)(y, out.weight, self.ffn_norm, eps, h, out.scale)
        if self.experts is None:
            gated = kernels.linear_silu_mul_fp8 if down.in_fp8 else kernels.linear_silu_mul
            return normed(to_fp8)(gated(y, gate_up.weight, gate_up.scale), down.weight, next_norm, eps, h, down.scale)
        chosen, share = route(y, self.router, self.router_bias, self.experts)
        e, scales = self.experts, (gate_up.scale, down.scale)
        return kernels.experts_rmsnorm(
            y, chosen, share, gate_up.weight, down.weight, e.count, e.inner, next_norm, eps, h, *scales
        )

    def _between(self, look: Look, q: Tensor, k: Tensor, window: Window) -> None:
        """Write what the queries q [R, W, H, D] attend to in the block's positions."""
        limit = window.kv_len.flatten()
        # A padded one may point beyond the last query.
        query = (look.first[:, None] + look.source).clamp(max=len(limit) - 1)
        between = kernels.block_attention(
            q.flatten(0, 1), k, look.row, limit, window.max_kv_len, query, look.slot, hide=look.hide
        )
        look.out.copy_(between)

    def _norms(self) -> dict[str, Any]:
        """The arguments of the projection that normalise query and key heads, none where the family has no such norms."""
        return {"q_norm": self.q_norm, "k_norm": self.k_norm, "eps": self.spec.rms_eps} if self.spec.qk_norm else {}

    def values(self, y: Tensor) -> Tensor:
        """The values [R, W, K * D] that the layer stores for its normalised input y [R, W, C]; nothing is stored."""
        n = self.spec.kv_heads * self.spec.head_dim
        scale, bias = (None if x is None else x[-n:] for x in (self.qkv.scale, self.qkv.bias))
        return kernels.linear(y, self.qkv.weight[-n:], scale, bias)


class Stack:
    """The layers of one forward, for a rule that decides for which positions they run (`fastdllm.reuse`)."""

    def __init__(self, network: Transformer, store: KVStore) -> None:
        self.layers, self.store, self.spec, self.rope = network.layers, store, network.spec, network.rope()
        self.norms = [*(layer.attn_norm for layer in network.layers), network.norm]

    def run(self, index: int, y: Activations, h: Tensor, window: Window) -> tuple[Any, Tensor]:
        """Layer `index` for its input h [R, W, C] and y, h normalised. Returns its output normalised, and its output.

        Between layers with fp8 weights what is normalised may be in fp8.
        """
        to_fp8 = index + 1 < len(self.layers) and self.layers[index + 1].qkv.in_fp8
        return self.layers[index](y, h, self.norms[index + 1], index, window, self.store, self.rope, to_fp8)


class Transformer(nn.Module):
    """Token ids [R, W] -> final hidden states [R, W, C]; `logits` applies the head to the rows that are asked for."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.spec = spec
        # From zeros: drawing nn.Embedding's own values for a network on `meta` imports torch's compiler, over a second.
        table = torch.zeros(spec.vocab, spec.width, dtype=dtype, device=device)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(spec, index, dtype, device) for index in range(spec.layers))
        self.norm = nn.Parameter(torch.ones(spec.width, dtype=dtype, device=device))
        self.head = Linear(spec.width, spec.vocab, bias=False, dtype=dtype, device=device)
        if spec.tied_head:
            self.head.weight = self.embed.weight
        self._rope: tuple[Tensor, Tensor] | None = None

    def rope(self) -> tuple[Tensor, Tensor]:
        """cos, sin [max_length + SLACK, r] in fp32 (half-split layout) on the weights' device, of the r channels that turn.

        Made once and for the whole context: captured graphs point at the table.
        """
        device = self.norm.device
        if self._rope is None or self._rope[0].device != device:
            inverse, scale = frequencies(self.spec.rotary or self.spec.head_dim, self.spec.rope_theta, self.spec.stretch)
            angle = torch.arange(self.spec.max_length + SLACK, dtype=torch.float32)[:, None] * inverse
            angle = torch.cat([angle, angle], -1)
            self._rope = ((angle.cos() * scale).to(device), (angle.sin() * scale).to(device))
        return self._rope

    def forward(self, ids: Tensor, window: Window, store: KVStore, rule: LayerRule | None = None) -> Tensor:
        """Recompute `window` and overwrite its slots of `store`.

        ids [R, W] int64. `rule`, if given, runs the layers in the network's place: it gets the stack, the first layer's
        input, normalised, and that input, and returns the last one's output [R, W, C], normalised.
        """
        stack = Stack(self, store)
        y, h = kernels.rmsnorm(self.embed(ids), stack.norms[0], self.spec.rms_eps)
        if rule is not None:
            return rule(stack, y, h)
        for index in range(len(self.layers)):
            y, h = stack.run(index, y, h, window)
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] -> logits [..., V] in the weights' dtype."""
        return self.head(hidden)

    def confidence(self, hidden: Tensor, banned: Tensor, entropy: bool, margin: bool) -> kernels.Confidence:
        """`kernels.confidence` of the logits of hidden [N, C], where nothing else needs them."""
        return kernels.head_confidence(hidden, self.head.weight, banned, entropy, margin, self.head.scale)

    def new_store(self, rows: int, length: int, apart: int | None = None) -> KVStore:
        """A store for `rows` sequences of `length` positions, `apart` slots from one to the next, on the weights' device."""
        s = self.spec
        return KVStore(s.layers, rows, s.kv_heads, length, s.head_dim, self.norm.dtype, self.norm.device, apart)

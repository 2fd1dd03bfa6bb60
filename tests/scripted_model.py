# SPDX-License-Identifier: Apache-2.0
"""Models that say what a test wants, whatever they read: for exact counts of forwards and exact stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdllm import kernels
from fastdllm.models import Model
from fastdllm.models.spec import ModelSpec
from fastdllm.models.transformer import Transformer
from tests.random_models import random_model


class ScriptedNetwork(Transformer):
    """Predicts `tokens[i]` with probability `conf[i]` for position i; the last entry holds for all positions beyond."""

    def __init__(self, spec: ModelSpec, tokens: Sequence[int], conf: Sequence[float]) -> None:
        super().__init__(spec)
        self.tokens, self.conf = torch.tensor(tokens), torch.tensor(conf)

    def forward(self, ids: Tensor, window: Any, store: Any, hook: Any = None) -> Tensor:
        shift = torch.full_like(window.pos[:, :1], self.spec.shift)
        if self.spec.causal_context:  # a pass from left to right predicts the next token
            ahead = window.pos == window.pos[:, :1] + torch.arange(window.pos.shape[1])  # without padding
            shift = ((window.kv_len == window.pos + 1) | ~ahead).all(1, keepdim=True).long()
        return (window.pos + shift)[..., None].float().expand(-1, -1, self.spec.width)

    def logits(self, hidden: Tensor) -> Tensor:
        at = hidden[..., 0].long()
        conf = self.conf[at.clamp(max=len(self.conf) - 1)]
        out = ((1 - conf) / (self.spec.vocab - 1)).clamp(min=1e-9).log()[..., None].expand(*at.shape, self.spec.vocab)
        return out.scatter(-1, self.tokens[at.clamp(max=len(self.tokens) - 1)][..., None], conf.log()[..., None])

    def confidence(self, hidden: Tensor, banned: Tensor, entropy: bool, margin: bool) -> kernels.Confidence:
        return kernels.confidence(self.logits(hidden), banned, entropy, margin)


def scripted_model(family: str, tokens: Sequence[int], conf: Sequence[float] = (1.0,), **changes: Any) -> Model:
    """`changes`: fields of the spec."""
    spec = replace(random_model(family).spec, **changes)
    return Model(ScriptedNetwork(spec, tokens, conf).requires_grad_(False), spec, None, f"scripted-{family}")


def with_logits(model: Model, change: Callable[[Tensor], Tensor]) -> Model:
    """The model with its logits passed through `change`."""
    original = model.network.logits
    model.network.logits = lambda hidden: change(original(hidden))
    model.network.confidence = lambda hidden, banned, **asked: kernels.confidence(
        model.network.logits(hidden), banned, **asked
    )
    return model

# SPDX-License-Identifier: Apache-2.0
"""What the network makes of texts: hidden states, for probes, embeddings and analyses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdllm.fields import coerce
from fastdllm.likelihood import canvases
from fastdllm.models import Model
from fastdllm.prompts import Prompts, encode
from fastdllm.threads import use_threads


@torch.no_grad()
def hidden_states(model: Model, prompts: Prompts, *, attention_mask: Any = None, batch_size: int = 8) -> list[Tensor]:
    """The last layer's hidden states of each prompt, after the final norm: [P, C] fp32 on the CPU. One forward, no decoding.

    model: what `load` returned.
    prompts: as `generate` takes them. Masks among the ids are read as masks.
    attention_mask: of prompts given as ids [B, P], 0 on padding.
    batch_size: prompts in one forward; a prompt's states do not depend on it.

    Every position sees what it sees as a part of a prompt: all others in bidirectional families, its own and earlier blocks
    in block-causal ones, earlier positions where the context is causal. `model.network.logits` makes logits [P, V] of them
    (in the model's type, on its device). Row p predicts position p, in Dream and Fast-dLLM v2 position p + 1.

    Raises ValueError for bad input and for a prompt that exceeds the model's context.
    """
    rows = encode(model, prompts, attention_mask)
    batch_size = coerce("batch_size", batch_size, int)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for i, row in enumerate(rows):
        if len(row) > model.spec.max_length:
            raise ValueError(f"prompt {i} has {len(row)} tokens, more than the model's context of {model.spec.max_length}")
    use_threads(model)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # side by side with their like: little padding
    out: dict[int, Tensor] = {}
    for start in range(0, len(rows), batch_size):
        batch = order[start : start + batch_size]
        length = len(rows[batch[0]])
        store = model.network.new_store(len(batch), length + 1)
        ids, window = canvases(model, [rows[i] for i in batch], [None] * len(batch), length, store)
        hidden = model.network(ids.to(model.device), window, store).float().cpu()  # [B, T, C]
        out |= {i: states[: len(rows[i])].clone() for i, states in zip(batch, hidden, strict=True)}
    return [out[i] for i in range(len(rows))]

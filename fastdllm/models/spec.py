# SPDX-License-Identifier: Apache-2.0
"""The closed list of differences between LLaDA, Dream and Fast-dLLM v2.

One network (`transformer.py`) runs them all; a new family is a function from its config.json to a `ModelSpec` and a table of
weight names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelSpec:
    """Shapes, conventions and special ids of one checkpoint.

    `shift`: row j of a forward over positions [s, ...) predicts position s + j + shift. `block_causal`: the block size of a
    model whose queries see their own and earlier blocks only, 0 for a bidirectional model. `vocab` counts embedding rows;
    `mask_id` and `stop_ids` are token ids; `defaults` are the family's decoding defaults.
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_length: int
    rms_eps: float
    rope_theta: float
    qkv_bias: bool
    tied_head: bool
    shift: int
    block_causal: int
    mask_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.family}: {self.heads} heads are no multiple of {self.kv_heads} key-value heads")
        for name in ("mask_id", "pad_id"):
            if not 0 <= getattr(self, name) < self.vocab:
                raise ValueError(
                    f"{self.family}: {name}={getattr(self, name)} is outside the vocabulary of {self.vocab} rows"
                )


@dataclass(frozen=True)
class Family:
    """How a family's published files become a model.

    `spec(config, ids)` reads config.json and the tokenizer's special tokens (a mapping from text to id); `names(spec)` maps
    each published tensor name to (our parameter, first row it fills); `optional` names tensors that some checkpoints carry
    and that are not needed.
    """

    spec: Callable[[Mapping[str, Any], Mapping[str, int]], ModelSpec]
    names: Callable[[ModelSpec], dict[str, tuple[str, int]]]
    optional: Callable[[ModelSpec], set[str]]

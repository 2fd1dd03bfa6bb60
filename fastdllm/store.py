# SPDX-License-Identifier: Apache-2.0
"""The one KV store of a run, the canvas of tokens beside it, and the description of one forward over them.

Keys are stored after RoPE: a rotated key depends on its token and its position only, so nothing is ever rotated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class KVStore:
    """Keys and values of every layer: `k`, `v` [L, B, K, T, D], preallocated, written in place."""

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, rows, kv_heads, length, head_dim)
        size = 2 * dtype.itemsize * layers * rows * kv_heads * length * head_dim
        try:
            # Zeros, not empty: a slot that nobody wrote is hidden by a mask, and 0 * NaN would not stay hidden.
            self.k = torch.zeros(shape, dtype=dtype, device=device)
            self.v = torch.zeros(shape, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the KV store for {rows} rows of {length} positions needs {size / 2**30:.2f} GiB "
                f"({layers} layers, {kv_heads} KV heads of {head_dim}, {dtype}); use a smaller batch_size, "
                "shorter prompts or a smaller gen_length"
            ) from error


@dataclass
class Canvas:
    """The tokens of every row and which of them are open.

    x [B, T + 1] int64; masked [B, T + 1] bool, never true in a prompt, whatever ids it holds; free [B, T + 1] bool, the
    positions whose token decoding chooses (neither prompt nor constraint). The last column is scratch: padding reads and
    writes there, and no query sees it. The store may be longer: shadows (`shadows.py`) keep their keys behind the rest.
    """

    x: Tensor
    masked: Tensor
    free: Tensor
    store: KVStore
    _states: dict[Hashable, Any] = field(default_factory=dict)

    def state(self, owner: Hashable, make: Callable[[int], Any]) -> Any:
        """Static tensors of a decoder or of layer reuse, made once for this canvas by `make(rows)`: captured graphs keep
        pointing at them."""
        if owner not in self._states:
            self._states[owner] = make(self.x.shape[0])
        return self._states[owner]


@dataclass(frozen=True)
class Window:
    """What one forward recomputes and sees, as tensors (R rows of the batch, W positions each).

    row [R]: the row's slot in the store. pos [R, W]: positions recomputed; their slots are overwritten. limit [R, W]: each
    query sees slots [0, limit), except [hide[0], hide[1]) with hide [R, 2]. `keys` bounds every limit; `uniform` says that
    every limit equals `keys` and nothing is hidden, so that no mask is needed. Shadows only: slot [R, W], where the keys and
    values go if not to `pos`; swap [R, W, 3], the slots that a query sees in place of others (`kernels.attention`).
    """

    row: Tensor
    pos: Tensor
    limit: Tensor
    keys: int
    uniform: bool = False
    hide: Tensor | None = None
    slot: Tensor | None = None
    swap: Tensor | None = None

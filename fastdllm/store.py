# SPDX-License-Identifier: Apache-2.0
"""The memory of a run: the KV store, and the canvas of tokens.

Keys are stored after RoPE: a rotated key depends on its token and its position only, so nothing is ever rotated twice.

Rows of unequal length share one pool of slots. Row r begins at slot r * UNIT and is as long as it needs to be, so that a
batch takes the sum of its rows and not their number times the longest. Seen as a matrix [rows, length] the rows overlap;
whoever holds a row keeps to its own slots (`Places`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

UNIT = 32  # slots: rows begin at multiples of it
NUMBERS = 16  # numbers that a request may bring along: temperature, threshold, ...


def units(slots: int) -> int:
    """How many units hold so many slots."""
    return -(-slots // UNIT)


Positions = TypeVar("Positions", int, Tensor)


def block_end(pos: Positions, block: int, origin: Any = 0) -> Positions:
    """The end of the block of `block` positions that each of `pos` lies in: what a block-causal query sees.

    origin: where some block begins, like `pos`; blocks are cut from there on in both directions.
    """
    if isinstance(origin, int) and origin == 0:
        return (pos // block + 1) * block
    skew = -origin % block
    return ((pos + skew) // block + 1) * block - skew


def span(start: Tensor, stop: Tensor, width: int, scratch: Tensor) -> Tensor:
    """Positions [R, width] from start [R] on; from stop [R] on the scratch position [R]."""
    pos = start[:, None] + torch.arange(width, device=start.device)
    return torch.where(pos < stop[:, None], pos, scratch[:, None])


class KVStore:
    """Keys and values of every layer: `k`, `v` [L, B, K, T, D], preallocated, written in place.

    apart: slots from the beginning of a row to that of the next; T unless given. With less, rows overlap.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        apart: int | None = None,
    ) -> None:
        apart = length if apart is None else apart
        slots = (rows - 1) * apart + length
        flat = (layers, kv_heads, slots, head_dim)
        shape = (layers, rows, kv_heads, length, head_dim)
        strides = (kv_heads * slots * head_dim, apart * head_dim, slots * head_dim, head_dim, 1)
        try:
            # Zeros, not empty: a slot that nobody wrote is hidden by a mask, and 0 * NaN would not stay hidden.
            self.k = torch.zeros(flat, dtype=dtype, device=device).as_strided(shape, strides)
            self.v = torch.zeros(flat, dtype=dtype, device=device).as_strided(shape, strides)
        except torch.OutOfMemoryError as error:
            size = 2 * dtype.itemsize * layers * kv_heads * slots * head_dim
            raise torch.OutOfMemoryError(
                f"the KV store for {slots} positions needs {size / 2**30:.2f} GiB "
                f"({layers} layers, {kv_heads} KV heads of {head_dim}, {dtype}); use a smaller batch_size, "
                "shorter prompts or a smaller gen_length"
            ) from error


@dataclass(frozen=True)
class Room:
    """What a run needs of a canvas.

    longest, shortest: units of its longest and shortest row.
    total: units in all.
    requests: how many at once.
    stops: the most stop tokens that a request has.
    """

    longest: int
    shortest: int
    total: int
    requests: int
    stops: int

    @property
    def rows(self) -> int:
        """Places where a row may begin; the longest fits at each of them."""
        return self.total - self.shortest + 1


class Places:
    """Which units of the pool are taken. Lanes of a request lie side by side; the first gap that fits is given."""

    def __init__(self, begin: int, rows: int) -> None:
        self.begin, self.rows = begin, rows
        self.taken: list[tuple[int, int]] = []  # (first unit, units), in order

    def take(self, size: int, lanes: int) -> int | None:
        """The first row of `lanes` rows of `size` units each, None where they do not fit now."""
        at = self.begin
        for i, (start, length) in enumerate([*self.taken, (self.rows + size, 0)]):
            if at + size * lanes <= start and at + size * (lanes - 1) < self.rows:
                self.taken.insert(i, (at, size * lanes))
                return at
            at = start + length
        return None

    def give(self, row: int) -> None:
        """Give back what begins at this row."""
        self.taken = [(start, length) for start, length in self.taken if start != row]


@dataclass
class Canvas:
    """The tokens of every row and which of them are open (N rows of T slots, S requests).

    x: [N, T] int64, the tokens.
    masked: [N, T] bool, open positions; never true in a prompt, whatever ids it holds.
    chosen: [N, T] bool, positions whose token decoding chooses: neither prompt nor constraint.
    logprobs: [N, T] fp32, the log-probability of each token when it was committed.
    committed_at: [N, T] int64, the forward of its request that committed it.
    stops: [S, n] int64, the stop tokens of each request.
    numbers: [S, NUMBERS] fp32, what each request sets for itself.
    graphs: what a runner has captured on these tensors.
    met: how often a runner has met what it may capture.
    """

    x: Tensor
    masked: Tensor
    chosen: Tensor
    logprobs: Tensor
    committed_at: Tensor
    stops: Tensor
    numbers: Tensor
    store: KVStore
    idle: int = 0
    graphs: dict[Hashable, Any] = field(default_factory=dict)
    met: Counter[Hashable] = field(default_factory=Counter)
    _states: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nobody holds a place any more."""
        self.places = Places(self.idle, len(self.x))
        self.slots = list(range(len(self.numbers) - bool(self.idle)))[::-1]

    def holds(self, room: Room) -> bool:
        """Whether this canvas has room for it."""
        return (
            len(self.x) >= self.idle + room.rows
            and self.x.shape[1] >= room.longest * UNIT
            and len(self.numbers) >= room.requests + bool(self.idle)
            and self.stops.shape[1] >= room.stops
        )

    def state(self, owner: Hashable, make: Callable[[int], Any]) -> Any:
        """Static tensors of a decoder or of layer reuse, made once for this canvas by `make(S)`: captured graphs keep
        pointing at them."""
        if owner not in self._states:
            self._states[owner] = make(len(self.numbers))
        return self._states[owner]


def new_canvas(room: Room, new_store: Callable[[int, int, int], KVStore], device: torch.device, idle: int = 0) -> Canvas:
    """An empty canvas with that room, and before it `idle` units that no request gets.

    new_store: (rows, length, slots between rows) -> the store.
    """
    rows, length, spare = idle + room.rows, room.longest * UNIT, bool(idle)
    slots = (rows - 1) * UNIT + length

    def tensor(dtype: torch.dtype) -> Tensor:
        return torch.zeros(slots, dtype=dtype, device=device).as_strided((rows, length), (UNIT, 1))

    return Canvas(
        x=tensor(torch.long),
        masked=tensor(torch.bool),
        chosen=tensor(torch.bool),
        logprobs=tensor(torch.float32),
        committed_at=tensor(torch.long),
        stops=torch.full((room.requests + spare, room.stops), -1, device=device),
        numbers=torch.zeros(room.requests + spare, NUMBERS, device=device),
        store=new_store(rows, length, UNIT),
        idle=idle,
    )

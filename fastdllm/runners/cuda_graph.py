# SPDX-License-Identifier: Apache-2.0
"""Replay each step as one captured CUDA graph.

A step of an 8B model is some three hundred kernel launches, which take the host longer than the device needs to run them for
up to a thousand positions. Captured, they are one launch. A graph belongs to the canvas on which it was captured, and is
keyed by the run's choices and by what shapes it: rows, width, key bucket and the step's other choices. Prompts of different
lengths share it, because starts and lengths are tensors. Larger passes run eagerly: they take the device so long that their
launches are hidden. So does the first pass of any shape: among callers who come and go many shapes never return. It also
compiles the kernels, which a capture cannot.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastdllm.forward import Plan, Shape
from fastdllm.runners.base import Result, Step
from fastdllm.store import UNIT, Canvas, Room, new_canvas, units

if TYPE_CHECKING:
    from fastdllm.models import Model

CAPTURED_POSITIONS = 2048  # of all rows together; larger passes run eagerly
EAGER_FIRST = 1  # of a runner that is not told otherwise
WIDTH_BUCKET, WIDE_BUCKET = 8, 64  # positions of a pass, rounded up to a multiple of this; of the second above it
KEY_BUCKET = 256  # keys a graph looks at, rounded up: attention skips what lies beyond a row's own length
LENGTH_BUCKET = 512  # slots: canvases are rounded up to this, so that later prompts find room and keep the graphs
IDLE = 1  # units before the first row: the row that fills up a graph


def bucket(rows: int) -> int:
    """Rows of the graph that runs `rows` rows: a power of two up to 8, then at most a quarter or three rows more than asked,
    since padded rows of a large batch cost time like others."""
    power = 1 << (rows - 1).bit_length()
    step = max(4, power // 8)
    return power if rows <= 8 else -(-rows // step) * step


def packed_bucket(positions: int) -> int:
    """Positions of the graph that runs a packed forward of so many: a multiple of WIDTH_BUCKET, at most an eighth more where
    there are many. Each of them costs time, so that steps are half as long as those of rows."""
    step = max(WIDTH_BUCKET, 1 << (positions - 1).bit_length() >> 4)
    return -(-positions // step) * step


def captured(shape: Shape, rows: int, length: int) -> Shape | None:
    """The shape that a graph for `rows` rows has in the place of `shape`, on a canvas of `length` slots a row; None if the
    pass is too large to capture."""
    multiple = 1 if shape.width == 1 else WIDTH_BUCKET if shape.width <= WIDE_BUCKET else WIDE_BUCKET
    width = -(-shape.width // multiple) * multiple
    keys = min(length, -(-shape.max_kv_len // KEY_BUCKET) * KEY_BUCKET)
    pieces = bucket(shape.pieces) if shape.pieces else 0
    packed = packed_bucket(shape.packed) if shape.packed else 0
    shape = replace(shape, width=width, max_kv_len=keys, dense=False, packed=packed, pieces=pieces)
    return shape if shape.positions(rows) <= CAPTURED_POSITIONS else None


@dataclass
class Graph:
    """A captured step. `host` is its plans in pinned memory, from where the graph fetches them to `table` first; `noise` is
    its other input, and `out` its result. `key` keeps alive what else the graph's kernels point to."""

    graph: torch.cuda.CUDAGraph
    host: Tensor
    table: Tensor
    noise: Tensor | None
    out: Any
    key: Hashable


class Runner:
    """Lends canvases and keeps those that come back, with their graphs, for later runs. eager_first: passes of a shape that
    run eagerly before it is captured."""

    packs: ClassVar[bool] = True

    def __init__(self, eager_first: int | None = None) -> None:
        self.eager_first = EAGER_FIRST if eager_first is None else eager_first
        self.free: list[Canvas] = []
        self._lock = threading.Lock()

    @contextmanager
    def canvas(self, model: Model, room: Room) -> Iterator[Canvas]:
        canvas = self._borrow(room) or self._make(model, room)
        try:
            yield canvas
        finally:
            canvas.clear()
            with self._lock:
                self.free.append(canvas)

    def _borrow(self, room: Room) -> Canvas | None:
        """The smallest free canvas with that room. If there is none, all free ones are dropped first: a new one takes their
        memory."""
        with self._lock:
            fitting = [canvas for canvas in self.free if canvas.holds(room)]
            if not fitting:
                for canvas in self.free:
                    canvas.graphs.clear()  # before the tensors that they point to
                self.free.clear()
                return None
            canvas = min(fitting, key=lambda canvas: len(canvas.x))
            self.free = [kept for kept in self.free if kept is not canvas]
            return canvas

    def _make(self, model: Model, room: Room) -> Canvas:
        step = units(LENGTH_BUCKET)
        longest, more = -(-room.longest // step) * step, -(-(room.rows - 1) // step) * step
        room = replace(room, longest=longest, total=more + room.shortest, requests=bucket(room.requests))
        return new_canvas(room, model.network.new_store, model.device, IDLE)

    def __call__(
        self, canvas: Canvas, step: Step[Result], key: Hashable, plans: list[Plan], noise: Tensor | None, shape: Shape
    ) -> Result:
        rows = bucket(len(plans))
        graphed = captured(shape, rows, canvas.x.shape[1])
        if graphed is None:
            return step(torch.tensor(plans, dtype=torch.long, device=canvas.x.device), noise, shape)
        idle = Plan.idle(len(canvas.numbers) - 1, IDLE * UNIT - 1, graphed.width)
        name = (key, rows, graphed, None if noise is None else noise.shape[1:])
        padded = plans + [idle] * (rows - len(plans))
        if name not in canvas.graphs:
            if canvas.met[name] < self.eager_first:
                if noise is not None and rows > len(plans):
                    noise = torch.cat([noise, noise.new_full((rows - len(plans), *noise.shape[1:]), 0.5)])
                table = torch.tensor(padded, dtype=torch.long, device=canvas.x.device)
                out = step(table, noise, graphed).head(len(plans))
                canvas.met[name] += 1  # not before: a pass that failed has compiled nothing
                return out
            canvas.graphs[name] = self._capture(canvas, step, name, idle, noise)
        graph = canvas.graphs[name]
        # The graph's last fetch from this memory is over: the host has read its result since.
        graph.host.numpy()[:] = padded
        if noise is not None:
            graph.noise[: len(plans)].copy_(noise)
        graph.graph.replay()
        return graph.out.head(len(plans))

    def _capture(self, canvas: Canvas, step: Step[Any], name: Any, idle: Plan, noise: Tensor | None) -> Graph:
        if canvas.x.device.type != "cuda":
            raise ValueError(f"runner='cuda_graph' needs a model on a GPU, not on {canvas.x.device.type!r}; use 'eager'")
        _, rows, shape, _ = name
        host = torch.tensor([idle] * rows, dtype=torch.long).pin_memory()
        table = host.to(canvas.x.device)
        noise = None if noise is None else noise.new_full((rows, *noise.shape[1:]), 0.5)
        if not canvas.met[name]:  # no eager pass has compiled the kernels
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(table, noise, shape)
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # All graphs of a canvas share one memory pool, which goes with the last of them.
        pool = next((kept.graph.pool() for kept in canvas.graphs.values()), None)
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            table.copy_(host, non_blocking=True)
            out = step(table, noise, shape)
        return Graph(graph, host, table, noise, out, name)

# SPDX-License-Identifier: Apache-2.0
"""Replay each step as one captured CUDA graph.

A step of an 8B model is some three hundred kernel launches, which take the host longer than the device needs to run them for
up to a thousand positions. Captured, they are one launch. A graph is keyed by what shapes it: rows, width, key bucket and
the step function's choices; prompts of different lengths share it, because starts and lengths are tensors. Larger passes run
eagerly: they take the device so long that their launches are hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdllm.packing import PIECE
from fastdllm.runners import eager
from fastdllm.store import Canvas

CAPTURED_POSITIONS = 2048  # of all rows together; larger passes run eagerly
WIDTH_BUCKET, WIDE_BUCKET = 8, 64  # positions of a pass, rounded up to a multiple of this; of the second above it
KEY_BUCKET = 256  # keys a graph looks at, rounded up: attention skips what lies beyond a row's own length
LENGTH_BUCKET = 512  # canvas lengths are rounded up to this, so that later prompts find room and keep the graphs


def bucket(rows: int) -> int:
    """Rows of the graph that runs `rows` rows: a power of two up to 8, then at most an eighth or three rows more than asked,
    since padded rows of a large batch cost time like others."""
    power = 1 << (rows - 1).bit_length()
    step = max(4, power // 8)
    return power if rows <= 8 else -(-rows // step) * step


@dataclass
class Graph:
    """A captured step. `host` is its plan in pinned memory, from where the graph fetches it to `plan` first; `noise` is its
    other input, and `out` its result. `step` keeps alive what else the graph's kernels point to."""

    graph: torch.cuda.CUDAGraph
    host: Tensor
    plan: Tensor
    noise: Tensor | None
    out: Any
    step: Callable[..., Any]


class Runner(eager.Runner):
    """Keeps one canvas and its graphs across runs; both are made anew when a run needs more room.

    `bind(key)` names the choices that shape the step function (decoder, sampler, ...): equal keys share graphs.
    """

    packs = True

    def __init__(self) -> None:
        self.graphs: dict[Hashable, Graph] = {}
        self.kept: Canvas | None = None
        self.key: Hashable = None

    def bind(self, key: Hashable) -> Runner:
        self.key = key
        return self

    def canvas(self, model: Any, rows: int, length: int, shadows: int = 0) -> Canvas:
        """Room for `rows` sequences of `length` positions and a scratch row, which warm-up and padding write to, and in the
        store for `shadows` slots."""
        kept = self.kept
        room = (0, 0, 0) if kept is None else (*kept.x.shape, kept.store.k.shape[3] - kept.x.shape[1])
        if any(has < needs for has, needs in zip(room, (rows + 1, length + 1, shadows), strict=True)):
            self.graphs.clear()  # before the canvas they point to
            self.kept = None
            length = -(-(length + 1) // LENGTH_BUCKET) * LENGTH_BUCKET - 1
            self.kept = super().canvas(model, rows + 1, length, shadows)
        return self.kept

    def __call__(self, step: Callable[..., Any], plan: list[list[int]], noise: Tensor | None, **static: Any) -> Any:
        """As `eager.Runner`, with passes up to CAPTURED_POSITIONS replayed. The result is valid until the next call."""
        width, rows, length = static["width"], bucket(len(plan)), self.kept.store.k.shape[3]
        if static["active"] is None:  # layer reuse counts the positions of a pass
            multiple = WIDTH_BUCKET if width <= WIDE_BUCKET else WIDE_BUCKET
            width = -(-width // multiple) * multiple
        packed = bucket(static["packed"]) if static["packed"] else 0
        if (packed * PIECE or rows * width) > CAPTURED_POSITIONS:
            return super().__call__(step, plan, noise, **static)
        keys = min(length, -(-static["keys"] // KEY_BUCKET) * KEY_BUCKET)
        static |= {"width": width, "keys": keys, "uniform": False, "packed": packed}
        # Of the scratch row, no position: its pass is padding alone, and one that is packed takes no piece.
        idle = [self.kept.x.shape[0] - 1, 0, 0, width, width, 0, 1, 0, 0, 0, 1, 0, 0, 0]
        key = (self.key, rows, *static.values(), noise is None)
        if key not in self.graphs:
            self.graphs[key] = self._capture(step, idle, rows, noise, static)
        graph = self.graphs[key]
        # The graph's last fetch from this memory is over: the host has read its result since.
        graph.host.numpy()[:] = plan + [idle] * (rows - len(plan))
        if noise is not None:
            graph.noise[: len(plan)].copy_(noise)
        graph.graph.replay()
        return graph.out.first(len(plan))

    def _capture(
        self, step: Callable[..., Any], idle: list[int], rows: int, noise: Tensor | None, static: dict[str, Any]
    ) -> Graph:
        host = torch.tensor([idle] * rows, dtype=torch.long).pin_memory()
        plan = host.to(self.kept.x.device)
        noise = None if noise is None else noise.new_full((rows, *noise.shape[1:]), 0.5)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels and lets cuBLAS take its workspace outside the capture
            step(plan, noise, **static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # All graphs share one memory pool, which goes with the last of them.
        pool = next((kept.graph.pool() for kept in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            plan.copy_(host, non_blocking=True)
            out = step(plan, noise, **static)
        return Graph(graph, host, plan, noise, out, step)

# SPDX-License-Identifier: Apache-2.0
"""Replay each narrow step as one captured CUDA graph.

A block step of an 8B model is some three hundred kernel launches, which take the host longer than the device needs to run
them. Captured, they are one launch. A graph is keyed by what shapes it: rows, width, key bucket and the step function's
choices; prompts of different lengths share it, because starts and lengths are tensors. Wide passes run eagerly: they take
the device so long that their launches are hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdllm.runners import eager
from fastdllm.store import Canvas

CAPTURED_WIDTH = 64  # wider passes run eagerly
KEY_BUCKET = 256  # keys a graph looks at, rounded up: attention skips what lies beyond a row's own length
LENGTH_BUCKET = 512  # canvas lengths are rounded up to this, so that later prompts find room and keep the graphs


@dataclass
class Graph:
    """A captured step with its static inputs and outputs. The plan reaches the device from pinned memory (`host`). `step`
    keeps alive what the graph's kernels point to."""

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

    def __init__(self) -> None:
        self.graphs: dict[Hashable, Graph] = {}
        self.pool: tuple[int, int] | None = None
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
            self.graphs.clear()  # before the canvas they point to; their memory pool goes with the last of them
            self.kept, self.pool = None, None
            length = -(-(length + 1) // LENGTH_BUCKET) * LENGTH_BUCKET - 1
            self.kept = super().canvas(model, rows + 1, length, shadows)
        return self.kept

    def __call__(self, step: Callable[..., Any], plan: list[list[int]], noise: Tensor | None, **static: Any) -> Any:
        """As `eager.Runner`, with passes up to CAPTURED_WIDTH replayed. The result is valid until the next call."""
        width = static["width"]
        if width > CAPTURED_WIDTH:
            return super().__call__(step, plan, noise, **static)
        rows = 1 << (len(plan) - 1).bit_length()
        length = self.kept.store.k.shape[3]
        static |= {"keys": min(length, -(-static["keys"] // KEY_BUCKET) * KEY_BUCKET), "uniform": False}
        idle = [self.kept.x.shape[0] - 1, 0, width, width, width, 0, 1, 0, 0, 0, 1, 0, 0, 0]
        key = (self.key, rows, *static.values(), noise is None)
        if key not in self.graphs:
            self.graphs[key] = self._capture(step, idle, rows, noise, static)
        graph = self.graphs[key]
        graph.host.copy_(
            torch.tensor(plan + [idle] * (rows - len(plan)))
        )  # the last copy from it is done: the host read since
        graph.plan.copy_(graph.host, non_blocking=True)
        if noise is not None:
            graph.noise[: len(plan)].copy_(noise)
        graph.graph.replay()
        return graph.out.first(len(plan))

    def _capture(
        self, step: Callable[..., Any], idle: list[int], rows: int, noise: Tensor | None, static: dict[str, Any]
    ) -> Graph:
        device = self.kept.x.device
        plan = torch.tensor([idle] * rows, dtype=torch.long, device=device)
        noise = None if noise is None else noise.new_full((rows, *noise.shape[1:]), 0.5)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles the kernels and lets cuBLAS take its workspace outside the capture
                step(plan, noise, **static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = step(plan, noise, **static)
        self.pool = self.pool or graph.pool()
        return Graph(graph, torch.empty(plan.shape, dtype=torch.long, pin_memory=True), plan, noise, out, step)

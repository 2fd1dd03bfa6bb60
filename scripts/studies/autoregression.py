# SPDX-License-Identifier: Apache-2.0
"""A network read from left to right, one token a forward: the baseline that block diffusion has to beat.

Everything is what diffusion has: the network and its kernels, the KV store, the canvas, the runner that captures a step as
one CUDA graph, the fused head. A row's next position is counted on the device, so the host only replays the graph and reads
the new tokens, which whoever watches for a stop token has to do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastdllm.engine.batch import PASS_TOKENS
from fastdllm.forward import Plan, Shape, Window
from fastdllm.models import Model
from fastdllm.runners.base import Runner
from fastdllm.stats import Stats
from fastdllm.store import UNIT, Canvas, Room, span, units


@dataclass
class Tokens:
    """What a forward chose: ids [R]."""

    ids: Tensor

    def head(self, rows: int) -> Tokens:
        return Tokens(self.ids[:rows])


@dataclass
class Answers:
    """sequences: ids [P + length] of each prompt and its answer, on the CPU."""

    sequences: list[Tensor]
    stats: Stats


def counters(canvas: Canvas, slots: int) -> Tensor:
    """[slots] int64: how many positions of each request have been read."""
    return torch.zeros(slots, dtype=torch.long, device=canvas.x.device)


def read_on(model: Model, canvas: Canvas, table: Tensor, noise: Tensor | None, shape: Shape) -> Tokens:
    """Read each row's next positions from left to right and write the likeliest token after them.

    table [R, n]: `Plan`s. A row whose plan has stop = 0 reads one position, others all up to there. Nothing is read on the
    host, so that a runner may capture this.
    """
    plan = Plan.columns(table)
    done = canvas.state("autoregression", partial(counters, canvas))
    start = torch.minimum(done[plan.slot], plan.scratch - 1)  # rows that fill up a graph count on
    stop = torch.where(plan.stop > 0, plan.stop, start + 1)
    row, pos = plan.row[:, None], span(start, stop, shape.width, plan.scratch)
    window = Window(plan.row, pos, pos + 1, shape.max_kv_len)
    hidden = model.network(canvas.x[row, pos], window, canvas.store)
    last = hidden[torch.arange(len(stop), device=stop.device), stop - start - 1]
    top = model.network.confidence(last, model.banned, False, False).top
    canvas.x[plan.row, stop] = top
    done[plan.slot] = stop
    return Tokens(top)


@torch.inference_mode()
def autoregress(model: Model, prompts: Sequence[Tensor], length: int, runner: Runner) -> Answers:
    """Answer every prompt at once with `length` tokens each, the likeliest one after the other.

    Seconds begin with the forward over the prompts, and end when the host has read the last token.
    """
    sizes = [units(len(prompt) + length) + 1 for prompt in prompts]
    with runner.canvas(model, Room(max(sizes), min(sizes), sum(sizes), len(sizes), 1)) as canvas:
        plans = [place(canvas, prompt, size) for prompt, size in zip(prompts, sizes, strict=True)]
        canvas.state("autoregression", partial(counters, canvas)).zero_()
        step, started = partial(read_on, model, canvas), time.perf_counter()
        for some, shape in opening(plans):
            runner(canvas, step, "autoregression", some, None, shape).ids.tolist()  # sync: as the engine's loop does
        one, longest = [plan._replace(stop=0) for plan in plans], max(map(len, prompts))
        for i in range(1, length):
            shape = Shape(width=1, max_kv_len=longest + i, dense=False)
            runner(canvas, step, "autoregression", one, None, shape).ids.tolist()  # sync: a stop token would end a row
        seconds = time.perf_counter() - started
        found = [canvas.x[p.row, : len(prompt) + length].cpu() for p, prompt in zip(plans, prompts, strict=True)]
    read = [len(prompt) + length - 1 for prompt in prompts]
    return Answers(
        found,
        Stats(
            forwards=length, seconds=seconds, row_forwards=[length] * len(read), row_positions=read,
            row_layer_tokens=[n * model.spec.layers for n in read], row_cached=[0] * len(read),
            row_tokens=[length] * len(read),
        ),
    )  # fmt: skip


def place(canvas: Canvas, prompt: Tensor, size: int) -> Plan:
    """Write a prompt into `size` units of the canvas; the plan that reads it."""
    row = canvas.places.take(size, 1)
    assert row is not None  # the canvas was made for all of them
    canvas.x[row, : len(prompt)] = prompt.to(canvas.x.device)
    idle = Plan.idle(canvas.slots.pop(), size * UNIT - 1, 0)
    return idle._replace(row=row, stop=len(prompt))


def opening(plans: list[Plan]) -> Iterator[tuple[list[Plan], Shape]]:
    """Forwards over whole prompts, as many together as the engine's loop takes."""
    width = max(plan.stop for plan in plans)
    most = max(1, PASS_TOKENS // width)
    for i in range(0, len(plans), most):
        yield plans[i : i + most], Shape(width=width, max_kv_len=width, dense=False)

# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: open a block, step until it holds no mask, go on to the next.

    round:  rows -> batches of like passes -> one forward each (`step.denoise`) -> one host read -> each row moves on

Every row walks through its own blocks and gets one forward per round. So no row waits for another, a row of a batch gives
what it gives by itself, and a row that finishes leaves its place to the next request.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdllm.decoding import Decoding
from fastdllm.engine.admission import Desk, room
from fastdllm.engine.batch import Batch, batches
from fastdllm.engine.row import Request, Result, Row
from fastdllm.engine.source import Listed, Source
from fastdllm.engine.step import denoise
from fastdllm.store import Canvas
from fastdllm.threads import use_threads

if TYPE_CHECKING:
    from fastdllm.models import Model
    from fastdllm.runners.base import Runner


@dataclass
class Step:
    """One forward.

    rows: the numbers of the requests that it served, R of them.
    starts, stops: where their blocks lie, as positions of prompt and answer.
    seconds: how long the step took, by the clock; the first of a round includes the planning of all.
    done: the requests that it finished, by number.

    The rest is None without `trace`. Q is the width of the widest block:

    ids: [R, Q] int64, the block after the step; the mask id where a token was remasked.
    confidence: [R, Q] fp32, NaN where nothing was scored.
    committed: [R, Q] bool, what this step committed.
    logprobs: [R, Q] fp32, of the token that stands there now, where it was scored.
    likeliest: for requests with `alternatives`, the likeliest tokens of each position and their log-probabilities, [R, Q, n]
        each.
    """

    rows: list[int]
    starts: list[int]
    stops: list[int]
    seconds: float
    done: dict[int, Result]
    ids: Tensor | None = None
    confidence: Tensor | None = None
    committed: Tensor | None = None
    logprobs: Tensor | None = None
    likeliest: tuple[Tensor, Tensor] | None = None


@torch.inference_mode()
def decode(
    model: Model,
    requests: Sequence[Request] | Source,
    run: Decoding,
    runner: Runner,
    *,
    rows: int | None = None,
    positions: int | None = None,
    trace: bool = False,
) -> Generator[Step, None, None]:
    """Decode every request; yields one `Step` per forward.

    requests: a list, or a source that hands them over as they come (`source.py`).
    rows: requests on the canvas at once; default all of a list.
    positions: slots of the canvas and the KV store in all, which bounds their memory; default what `rows` need.

    Any number of runs may take turns on one model and runner. Closing the generator stops the run and frees its canvas.
    Raises ValueError for a request that the run cannot answer, NothingCommitted for a decoder that does not go on.
    """
    source = Listed(requests) if isinstance(requests, Sequence) else requests
    spec = model.spec
    use_threads(model)
    with runner.canvas(model, room(model, source, run, rows, positions)) as canvas:
        desk = Desk(model, run, canvas, source)
        shift = 0 if run.cache.begins else spec.shift - run.lookback
        execute = partial(runner, canvas, partial(denoise, model, canvas, run), run.key)
        while desk.open():
            started = time.perf_counter()
            for batch in batches(desk.live, run, spec.shift, runner.packs):
                blocks = [row.block for row in batch.rows]
                out = execute(batch.plans(shift), batch.noise(run, spec.vocab), batch.shape)
                source.meanwhile()
                status = out.status.tolist()  # sync: masks left, stopped, drift and so on decide the next forward
                batch.advance(run, status, spec.layers)
                ask_for_more(canvas, batch)
                done = desk.settle(batch.rows)
                step = Step([r.number for r in batch.rows], [b.start for b in blocks], [b.stop for b in blocks], 0.0, done)
                if trace:
                    step.ids, step.confidence, step.committed = out.ids.clone(), out.conf.clone(), out.committed.clone()
                    step.logprobs = out.logprob.clone()
                    step.likeliest = out.likeliest and (out.likeliest[0].clone(), out.likeliest[1].clone())
                step.seconds = time.perf_counter() - started
                yield step
                started = time.perf_counter()


def ask_for_more(canvas: Canvas, batch: Batch) -> None:
    """Where a block is full and a request says what is enough, ask whether its answer is."""
    for row in batch.rows:
        if row.request.ends and not row.finished and row.opening:
            so_far = canvas.x[row.place.row, len(row.request.prompt) : row.block.start]
            row.finished = row.stopped = row.request.ends(so_far.cpu())  # sync: once a block, where its text may end it


__all__ = ["Batch", "Row", "Step", "decode"]

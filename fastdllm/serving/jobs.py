# SPDX-License-Identifier: Apache-2.0
"""A submitted request, and the events that its caller is told: one for each forward, and one at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor

from fastdllm.engine import Request, Result, Step
from fastdllm.engine.row import Cost
from fastdllm.serving.errors import NotANumber


@dataclass(frozen=True)
class Progress:
    """One forward of a request: the `forward`-th, over the block that starts at position `start` of the answer and now holds
    `ids` (the mask id where open). confidence, committed, logprobs, likeliest: of each position (see `engine.Step`).
    seconds: what the forward took; rows: the requests that it served together."""

    forward: int
    start: int
    ids: list[int]
    confidence: list[float]
    committed: list[bool]
    logprobs: list[float]
    likeliest: list[list[tuple[int, float]]] | None = None
    seconds: float = 0.0
    rows: int = 1


@dataclass(frozen=True)
class Finished:
    """The answer is complete. ids: of all its positions, masks at most after its end. logprobs: of each when it was
    committed, NaN where none was. committed_at: by which of its forwards, from 1; 0 where none did. cost: what it took."""

    ids: list[int]
    logprobs: list[float]
    committed_at: list[int]
    cost: Cost

    @property
    def forwards(self) -> int:
        return self.cost.forwards

    @property
    def positions(self) -> int:
        return self.cost.positions

    @property
    def cached(self) -> int:
        return self.cost.cached


@dataclass(frozen=True)
class Failed:
    """There will be no answer."""

    error: BaseException


def ending(result: Result, prompt: int) -> Finished | Failed:
    """What becomes of a result after a prompt of that length, without tensors: nothing of the device leaves the decoding
    thread. One read brings everything, in fp32, where ids and numbers of forwards are exact."""
    columns = torch.stack([result.ids[prompt:].float(), result.logprobs, result.committed_at.float()]).tolist()
    ids, logprobs, committed_at = columns
    if any(isnan(logprob) and at > 0 for logprob, at in zip(logprobs, committed_at, strict=True)):
        return Failed(NotANumber("the model's output for this request was not a number (NaN)"))
    return Finished(list(map(int, ids)), logprobs, list(map(int, committed_at)), result.cost)


Event = Progress | Finished | Failed


@dataclass(eq=False)
class Job:
    """A submitted request. deliver: takes its events, on a thread of the scheduler's, and must return at once. watched:
    whether it wants `Progress`. deadline: of `time.monotonic`. positions: what it takes of the memory budget."""

    request: Request
    deliver: Callable[[Event], None]
    watched: bool
    deadline: float | None
    positions: int
    submitted: float
    forwards: int = 0
    started: bool = False
    queued: bool = False
    withdrawn: bool = False
    over: bool = False

    def lateness(self, now: float) -> str:
        """What a request is told whose deadline has passed."""
        waited = f"within its {now - self.submitted:.1f} s"
        if not self.forwards:
            return f"the answer was not begun {waited}: other requests, or one long forward, were before it"
        return f"the answer was not finished {waited}, by {self.forwards} forwards"


@dataclass(frozen=True)
class Reading:
    """What a traced step says, on the host.

    step: the step.
    columns: [4, R, Q] fp32, ids, confidence, committed and logprobs of its blocks.
    likeliest: as that of the step.
    """

    step: Step
    columns: Tensor
    likeliest: tuple[Tensor, Tensor] | None

    def progress(self, row: int, job: Job) -> Progress:
        """What the request of a row is told."""
        step, prompt = self.step, len(job.request.prompt)
        start = max(step.starts[row] - prompt, 0)
        size = step.stops[row] - prompt - start
        ids, confidence, committed, logprobs = self.columns[:, row, :size].tolist()
        top = None
        if self.likeliest is not None and job.request.alternatives:
            tokens, chances = (part[row].tolist() for part in self.likeliest)
            top = [list(zip(*pair, strict=True)) for pair in zip(tokens, chances, strict=True)]
        of_row = (list(map(int, ids)), confidence, list(map(bool, committed)), logprobs)
        return Progress(job.forwards, start, *of_row, top, step.seconds, len(step.rows))


def read(step: Step) -> Reading:
    """One read for all rows: at each the thread may lose the interpreter to the callers' threads. Ids are exact in fp32."""
    of_block = (step.ids, step.confidence, step.committed, step.logprobs)
    columns = torch.stack([part.float() for part in of_block if part is not None]).cpu()
    return Reading(step, columns, step.likeliest and (step.likeliest[0].cpu(), step.likeliest[1].cpu()))

# SPDX-License-Identifier: Apache-2.0
"""Thousands of tiny requests from many threads, withdrawn, late and poisoned at random: each comes to an end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastdllm import DecodeConfig
from fastdllm.engine import Request
from fastdllm.serving import scheduler as under_test
from fastdllm.serving.errors import Expired, Overloaded
from fastdllm.serving.jobs import Failed, Finished, Job, Progress
from fastdllm.serving.scheduler import Scheduler
from tests.scripted_model import scripted_model

THREADS, EACH, PATIENCE = 8, 125, 300.0


class Watched:
    """A request and what became of it."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.forwards, self.last, self.given_up = 0, None, False
        self.over = threading.Event()

    def __call__(self, event: Any) -> None:
        assert not self.over.is_set(), "an event after the last one"
        if isinstance(event, Progress):
            self.forwards = event.forward
        else:
            self.last = event
            self.over.set()


def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one round in a hundred raise, and some of them for want of memory."""
    decode, rng = under_test.decode, random.Random(5)

    def failing(*given: Any, **options: Any) -> Iterator[Any]:
        for step in decode(*given, **options):
            yield step
            if rng.random() < 0.01:
                raise rng.choice([RuntimeError("a round failed"), torch.OutOfMemoryError("40 GiB")])

    monkeypatch.setattr(under_test, "decode", failing)


def hammer(scheduler: Scheduler, seed: int, out: list[Watched]) -> None:
    rng = random.Random(seed)
    for number in range(EACH):
        listener = Watched()
        tokens = torch.full((rng.randint(1, 40),), 7)
        request = Request(tokens, rng.choice([1, 3, 16, 40]), number, numbers={"threshold": rng.choice([0.5, 0.99])})
        deadline = time.monotonic() + rng.choice([0.0, 0.01, 0.2, 60.0, 60.0, 60.0])
        watched = rng.random() < 0.5
        while listener.job is None:
            try:
                listener.job = scheduler.submit(request, listener, watched=watched, deadline=deadline)
            except Overloaded:
                time.sleep(0.005)
        out.append(listener)
        if rng.random() < 0.1:
            scheduler.call(lambda: time.sleep(0.001))
        if rng.random() < 0.4:
            time.sleep(rng.random() * 0.01)
            listener.given_up = True
            scheduler.withdraw(listener.job)
        elif rng.random() < 0.5:
            listener.over.wait(PATIENCE)


@pytest.mark.parametrize("faults", [False, True])
def test_each_of_a_thousand_requests_comes_to_an_end(monkeypatch: pytest.MonkeyPatch, faults: bool) -> None:
    if faults:
        faulty(monkeypatch)
    model = scripted_model("llada", range(5, 40), [0.7, 0.95, 0.4])
    scheduler = Scheduler(model, DecodeConfig(gen_length=16, block_length=8), positions=640, rows=6, max_queue=20).start()
    lists: list[list[Watched]] = [[] for _ in range(THREADS)]
    threads = [threading.Thread(target=hammer, args=(scheduler, seed, out)) for seed, out in enumerate(lists)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    everyone = [listener for out in lists for listener in out]
    end = time.monotonic() + PATIENCE
    stuck = [w for w in everyone if not w.given_up and not w.over.wait(max(0.0, end - time.monotonic()))]
    assert not stuck, [(w.job, w.forwards) for w in stuck]
    assert len(everyone) == THREADS * EACH  # none was refused for good, though the budget shrinks when memory runs out
    ended = [w.last for w in everyone if w.last is not None]
    assert any(isinstance(event, Finished) for event in ended)
    assert all(isinstance(event, Finished | Failed) for event in ended)
    if not faults:
        assert all(isinstance(event.error, Expired) for event in ended if isinstance(event, Failed))
    assert scheduler.close(60) and not scheduler._active and not scheduler._waiting and not scheduler._suspects

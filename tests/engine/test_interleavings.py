# SPDX-License-Identifier: Apache-2.0
"""Runs that take turns on one model give what each gives alone: streams, whole calls, runs that are closed early."""

from __future__ import annotations

import os
import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm import registry
from fastdllm.models import Model
from fastdllm.runners import cuda_graph
from tests.random_models import FAMILIES, STOP, accepted, random_model
from tests.runners.test_bucketing import emulated

DECODERS, CACHES = registry.names("decoders"), registry.names("caches")
# Interleavings of a test and tests of a runner; FASTDLLM_INTERLEAVINGS asks for as many per test.
EACH, SEEDS = int(os.environ.get("FASTDLLM_INTERLEAVINGS", "4")), 10


@cache
def model(family: str) -> Model:
    return random_model(family, 7)


def job(rng: random.Random, family: str) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[str, Any], ...]]:
    """Random prompts and options, hashable."""
    pairs = [(d, c) for d in DECODERS for c in CACHES if accepted(family, c, d)]
    decoder, cache_name = rng.choice(pairs)
    options: dict[str, Any] = {"decoder": decoder, "cache": cache_name, "gen_length": rng.randint(1, 14), "block_length": 8}
    if rng.random() < 0.5:
        options["stop_ids"] = ()
    if decoder not in ("draft_verify", "lopa", "psd"):  # those are deterministic
        if rng.random() < 0.3:
            options |= {"temperature": rng.choice([0.3, 1.0]), "seed": rng.randint(0, 9), "top_p": rng.choice([None, 0.9])}
        elif (
            cache_name == "none"
            and family != "v2"
            and decoder not in ("wino", "self_speculate", "self_verify")
            and rng.random() < 0.5
        ):
            options["cfg_scale"] = 0.7
    if family == "v2":
        options["small_block_size"] = rng.choice([4, 8])
    if registry.find("caches", cache_name).final():
        options["prompt_cache"] = rng.choice([None, 0, 16])
    stem = tuple(rng.randrange(STOP) for _ in range(rng.choice([0, 0, 30, 70])))
    prompts = tuple(stem + tuple(rng.randrange(STOP) for _ in range(rng.randint(1, 20))) for _ in range(rng.randint(1, 3)))
    return prompts, tuple(sorted(options.items()))


def tensors(prompts: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    return [torch.tensor(prompt) for prompt in prompts]


def story(steps: list[fastdllm.engine.Step]) -> list[Any]:
    """What a run's steps say, comparable."""
    told = []
    for s in steps:
        done = {n: (r.ids.tolist(), r.logprobs, r.committed_at.tolist(), r.forwards) for n, r in s.done.items()}
        conf = s.confidence
        told.append((s.rows, s.starts, s.stops, s.ids.tolist(), conf, s.committed.tolist(), done))
    return told


def same(a: Any, b: Any) -> bool:
    """Equal; probabilities up to the rounding of a canvas of another size."""
    if isinstance(a, Tensor):
        return torch.allclose(a, b, atol=1e-4, equal_nan=True)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a) if isinstance(a, dict) else a == b


@cache
def alone(family: str, runner: str, given: Any) -> tuple[list[Any], list[list[int]]]:
    prompts, options = given
    fresh = random_model(family, 7)
    steps = list(fastdllm.stream(fresh, tensors(prompts), runner=runner, **dict(options)))
    out = fastdllm.generate(fresh, tensors(prompts), runner=runner, **dict(options))
    return story(steps), [s.tolist() for s in out.sequences]


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, SEEDS))])
@pytest.mark.parametrize("runner", ["eager", "cuda_graph"])
def test_runs_that_take_turns_give_what_each_gives_alone(runner: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    rng = random.Random(f"{runner} {seed}")
    for _ in range(EACH):
        family = rng.choice(FAMILIES)
        jobs = [job(rng, family) for _ in range(rng.randint(2, 5))]
        streams = [
            fastdllm.stream(model(family), tensors(prompts), runner=runner, **dict(options)) for prompts, options in jobs
        ]
        told: list[list[Any]] = [[] for _ in jobs]
        last = [rng.randint(1, 6) if rng.random() < 0.25 else None for _ in jobs]  # closed after so many steps
        open_now = list(range(len(jobs)))
        while open_now:
            i = rng.choice(open_now)
            if rng.random() < 0.05:  # a whole call in the middle of the others
                out = fastdllm.generate(model(family), tensors(jobs[i][0]), runner=runner, **dict(jobs[i][1]))
                assert [s.tolist() for s in out.sequences] == alone(family, runner, jobs[i])[1]
            step = next(streams[i], None)
            if step is not None:
                told[i].append(step)
            if step is None or len(told[i]) == last[i]:
                streams[i].close()
                open_now.remove(i)
        for i, given in enumerate(jobs):
            want = alone(family, runner, given)[0]
            got = story(told[i])
            assert same(got, want[: len(got)]), given
            assert last[i] is not None or len(got) == len(want)


def test_an_error_in_a_run_frees_its_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that raises gives its canvas back, and the next run is right."""
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    given, m = torch.arange(5), random_model("llada", 7)
    want = fastdllm.generate(m, given, gen_length=8, runner="cuda_graph").sequences[0]
    steps = fastdllm.stream(m, given, gen_length=8, runner="cuda_graph")
    next(steps)
    with pytest.raises(KeyError):
        steps.throw(KeyError("the caller's"))
    runner = fastdllm.build.RUNNERS[m]["cuda_graph"]
    assert runner.free and all(not canvas.places.taken for canvas in runner.free)
    assert torch.equal(fastdllm.generate(m, given, gen_length=8, runner="cuda_graph").sequences[0], want)


def test_a_model_goes_with_its_last_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners and graphs do not keep a model alive."""
    import gc
    import weakref

    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    m = random_model("llada", 3)
    fastdllm.generate(m, torch.arange(5), gen_length=8, runner="eager")
    gone = weakref.ref(m)
    del m
    gc.collect()
    assert gone() is None

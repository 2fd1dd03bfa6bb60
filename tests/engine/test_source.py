# SPDX-License-Identifier: Apache-2.0
"""Requests that come and go while others run: each gives what it gives by itself, whatever the company."""

from __future__ import annotations

import random
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm import build
from fastdllm.decoders.base import DecoderRule
from fastdllm.engine import Live, NothingCommitted, Request, Result, check, decode
from fastdllm.models import Model
from fastdllm.runners import cuda_graph, eager
from fastdllm.store import UNIT
from fastdllm.view import View
from tests.random_models import FAMILIES, STOP, VOCAB, WatchedRunner, random_model, triples
from tests.runners.test_bucketing import emulated, graphs


class Scripted:
    """Hands over requests and withdraws them in given rounds."""

    def __init__(self, arrivals: dict[int, list[Request]], withdrawals: dict[int, list[int]]) -> None:
        self.arrivals, self.withdrawals, self.round = arrivals, withdrawals, -1

    def known(self) -> None:
        return None

    def take(self, idle: bool) -> Sequence[Request] | None:
        self.round += 1
        left = [r for r in self.arrivals if r >= self.round]
        return self.arrivals.get(self.round, []) if left else None

    def withdrawn(self) -> Collection[int]:
        return self.withdrawals.get(self.round, [])

    def meanwhile(self) -> None:
        pass


def request(rng: random.Random, run: fastdllm.decoding.Decoding) -> Request:
    """A request with numbers of its own."""
    numbers: dict[str, float] = {}
    rule = run.decoder
    for name in rule.per_request:
        if rng.random() < 0.7:
            numbers[name] = rng.choice([0.2, 0.5, 0.8])
    if rule.branches == 1 and rng.random() < 0.5:
        numbers |= {"temperature": rng.choice([0.4, 1.0]), "top_p": rng.choice([1.0, 0.8]), "top_k": rng.choice([0, 5])}
    prompt = torch.tensor([rng.randrange(STOP) for _ in range(rng.randint(1, 40))])
    length, fixed = rng.randint(1, 20), {}
    if rng.random() < 0.3:
        fixed = {rng.randrange(length): rng.randrange(STOP) for _ in range(3)}
    stops = rng.choice([None, (), (3, 4), (STOP, 1, 2)])
    return Request(prompt, length, rng.randint(0, 99), fixed, stops, numbers)


def told(result: Result) -> Any:
    return (
        result.ids.tolist(), result.logprobs.nan_to_num(1).tolist(), result.committed_at.tolist(), result.forwards,
        result.positions, result.layer_tokens, result.stopped,
    )  # fmt: skip


def alone(model: Model, run: fastdllm.decoding.Decoding, asked: Request) -> Any:
    (result,) = (r for step in decode(model, [asked], run, eager.Runner()) for r in step.done.values())
    return told(result)


def close(a: Any, b: Any) -> bool:
    """Equal tokens and counts; log-probabilities up to the rounding of another batch."""
    return a[0] == b[0] and a[2:] == b[2:] and torch.allclose(torch.tensor(a[1]), torch.tensor(b[1]), atol=1e-4)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 24))])
@pytest.mark.parametrize("graphed", [False, True])
def test_requests_that_come_and_go_give_what_each_gives_alone(
    seed: int, graphed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    rng = random.Random(f"{seed} {graphed}")
    for family, cache, decoder in rng.sample(triples(), 4):
        model = random_model(family, seed)
        config = fastdllm.DecodeConfig(cache=cache, decoder=decoder, gen_length=20, block_length=8, small_block_size=4)
        run = build.assemble(model, config)
        asked = [request(rng, run) for _ in range(rng.randint(3, 9))]
        arrivals: dict[int, list[Request]] = {}
        numbers = iter(range(len(asked)))
        withdrawals: dict[int, list[int]] = {}
        at, order = 0, []
        for r in asked:
            at += rng.choice([0, 0, 1, 2, 5])
            arrivals.setdefault(at, []).append(r)
            order.append(next(numbers))
            if rng.random() < 0.3:
                withdrawals.setdefault(at + rng.randint(0, 6), []).append(order[-1])
        runner = cuda_graph.Runner() if graphed else eager.Runner()
        limits = rng.choice([{"rows": 2}, {"positions": 500}, {"rows": 3, "positions": 400}, {}])
        done: dict[int, Result] = {}
        for step in decode(model, Scripted(arrivals, withdrawals), run, runner, **limits):
            done |= step.done
        gone = {n for withdrawn in withdrawals.values() for n in withdrawn}
        assert done.keys() >= set(range(len(asked))) - gone
        for number, result in done.items():
            assert close(told(result), alone(model, run, asked[number])), (family, cache, decoder, number)
        for canvas in runner.free if graphed else []:
            assert not canvas.places.taken, "a place is still taken"


def test_one_graph_serves_all_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds, seeds, stops and lengths travel with a request: a second set of them captures nothing new."""
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    model, given = random_model(), torch.arange(9)
    counts = []
    for threshold in (0.95, 0.2, 0.4, 0.6):
        for stop_ids in ((), (1, 2, 3)):
            options = {"threshold": threshold, "stop_ids": stop_ids, "gen_length": 32, "block_length": 8}
            fastdllm.generate(model, given, runner="cuda_graph", **options)
            counts.append(len(graphs(model)))
    assert counts[0] == counts[-1]


def test_memory_is_the_sum_of_the_rows() -> None:
    """One long prompt among short ones does not make every row long, and a budget of positions is kept."""
    model, watched = random_model(), WatchedRunner()
    run = build.assemble(model, fastdllm.DecodeConfig(gen_length=8, block_length=8))
    asked = [Request(torch.arange(n) % STOP, 8) for n in (200, *[10] * 12)]
    for limits, most in (({}, 7 + 12), ({"positions": 9 * UNIT}, 9), ({"rows": 2}, 8)):
        done = [n for step in decode(model, asked, run, watched, **limits) for n in step.done]
        assert sorted(done) == list(range(13))
        x = watched.canvases[-1].x
        assert len(x) <= most and x.shape[1] == 7 * UNIT


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": torch.tensor([], dtype=torch.long)}, "empty"),
    ({"prompt": torch.tensor([1.0])}, "int64"),
    ({"prompt": torch.tensor([[1]])}, "int64"),
    ({"prompt": torch.tensor([VOCAB])}, "outside"),
    ({"prompt": torch.tensor([-1])}, "outside"),
    ({"length": 0}, "gen_length=0"),
    ({"length": 10_000}, "context"),
    ({"fixed": {99: 1}}, "outside the answer"),
    ({"fixed": {0: 38}}, "may be written"),
    ({"numbers": {"nonsense": 1.0}}, "nonsense"),
    ({"numbers": {"threshold": 7.0}}, "threshold"),
    ({"numbers": {"temperature": float("inf")}}, "temperature"),
    ({"numbers": {"temperature": float("nan")}}, "temperature"),
    ({"numbers": {"temperature": 1e39}}, "temperature"),
    ({"numbers": {"temperature": 10**400}}, "temperature"),
    ({"numbers": {"temperature": 1e-30}}, "temperature"),
    ({"numbers": {"temperature": -1.0}}, "temperature"),
    ({"numbers": {"top_p": 0.0}}, "top_p"),
    ({"numbers": {"top_p": float("nan")}}, "top_p=nan"),
    ({"numbers": {"threshold": float("nan")}}, "threshold=nan"),
    ({"numbers": {"temperature": "1.0"}}, "temperature='1.0'"),
    ({"numbers": {"temperature": None}}, "temperature=None"),
    ({"numbers": {"temperature": True}}, "temperature=True"),
    ({"numbers": {"temperature": np.bool_(True)}}, "temperature="),
    ({"numbers": {"temperature": torch.tensor([0.5, 0.5])}}, "temperature=tensor"),
    ({"numbers": {"threshold": "0.5"}}, "threshold='0.5'"),
    ({"numbers": [("temperature", 1.0)]}, "numbers="),
    ({"prompt": [1, 2]}, "int64"),
    ({"length": 8.5}, "gen_length=8.5"),
    ({"length": 8.0}, "gen_length=8.0"),
    ({"length": "8"}, "gen_length='8'"),
    ({"length": True}, "gen_length=True"),
    ({"length": None}, "gen_length=None"),
    ({"seed": 2**64}, "seed=18446744073709551616"),
    ({"seed": -(2**63) - 1}, "seed=-9223372036854775809"),
    ({"seed": 1.5}, "seed=1.5"),
    ({"seed": True}, "seed=True"),
    ({"seed": "1"}, "seed='1'"),
    ({"seed": None}, "seed=None"),
    ({"fixed": {1.5: 7}}, "constraint at position 1.5"),
    ({"fixed": {"1": 7}}, "constraint at position '1'"),
    ({"fixed": {True: 7}}, "constraint at position True"),
    ({"fixed": {1: 7.5}}, "constraint token 7.5"),
    ({"fixed": {1: "7"}}, "constraint token '7'"),
    ({"fixed": {1: True}}, "constraint token True"),
    ({"fixed": {1: VOCAB}}, "constraint token"),
    ({"fixed": [(1, 7)]}, "constraints="),
    ({"fixed": None}, "constraints=None"),
    ({"stop_ids": (1.5,)}, "stop_ids: 1.5"),
    ({"stop_ids": ("1",)}, "stop_ids: '1'"),
    ({"stop_ids": (None,)}, "stop_ids: None"),
    ({"stop_ids": (True,)}, "stop_ids: True"),
    ({"stop_ids": (2**70,)}, "stop_ids: 1180591620717411303424"),
    ({"stop_ids": (VOCAB,)}, "stop_ids: "),
    ({"stop_ids": (-1,)}, "stop_ids: -1"),
    ({"stop_ids": 1}, "stop_ids=1"),
    ({"stop_ids": "12"}, "stop_ids='12'"),
    ({"ends": "text"}, "ends='text'"),
    ({"alternatives": 1.5}, "alternatives=1.5"),
    ({"alternatives": "1"}, "alternatives='1'"),
    ({"alternatives": True}, "alternatives=True"),
    ({"alternatives": -1}, "alternatives=-1"),
]


@pytest.mark.parametrize("change, message", BAD, ids=str)
def test_a_bad_request_is_an_error_at_the_door(change: dict[str, Any], message: str) -> None:
    model = random_model("dream")
    run = build.assemble(model, fastdllm.DecodeConfig(gen_length=8))
    asked = replace(Request(torch.tensor([1, 2]), 8), **change)
    with pytest.raises(ValueError, match=message) as refused:
        check(model, run, asked)
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(ValueError, match=message):
        list(decode(model, [asked], run, eager.Runner()))
    live = Live(lambda r: check(model, run, r))
    with pytest.raises(ValueError, match=message):
        live.submit(asked)


def test_stop_tokens_have_room_on_every_canvas_that_takes_them() -> None:
    """A canvas of a live source is made before its requests come; that of a list is made for them."""
    model = random_model()
    run = build.assemble(model, fastdllm.DecodeConfig(gen_length=8, block_length=8))
    most, more = (Request(torch.arange(9), 8, stop_ids=tuple(range(n))) for n in (16, 17))
    check(model, run, most)
    with pytest.raises(ValueError, match="stop_ids has 17 tokens; a request of a live source has at most 16"):
        check(model, run, more)
    many = build.assemble(model, fastdllm.DecodeConfig(gen_length=8, block_length=8, stop_ids=tuple(range(20))))
    check(model, many, more)
    for chosen, asked in ((run, most), (many, more)):
        live = Live(partial(check, model, chosen))
        live.submit(asked)
        live.close()
        assert [n for step in decode(model, live, chosen, eager.Runner()) for n in step.done] == [0]
    assert [n for step in decode(model, [more], run, eager.Runner()) for n in step.done] == [0]


@pytest.mark.parametrize("kind", [int, np.int64, np.int32], ids=lambda kind: kind.__name__)
def test_numpys_numbers_are_numbers_of_a_request(kind: Any) -> None:
    model = random_model("dream")
    run = build.assemble(model, fastdllm.DecodeConfig(gen_length=8, block_length=8))
    numbers = {"temperature": np.float32(1.0), "threshold": np.float64(0.5), "top_k": kind(5)}
    asked = Request(torch.arange(9), kind(8), kind(3), {kind(1): kind(7)}, (kind(2),), numbers, None, kind(2))
    plain = Request(torch.arange(9), 8, 3, {1: 7}, (2,), {name: float(value) for name, value in numbers.items()}, None, 2)
    check(model, run, asked)
    assert alone(model, run, asked) == alone(model, run, plain)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63, 2**64 - 1])
def test_every_seed_that_passes_draws(seed: int) -> None:
    model = random_model()
    run = build.assemble(model, fastdllm.DecodeConfig(gen_length=4, block_length=4))
    asked = Request(torch.arange(9), 4, seed, numbers={"temperature": 1.0})
    check(model, run, asked)
    assert alone(model, run, asked) == alone(model, run, asked)


@dataclass(frozen=True)
class Lazy(DecoderRule):
    """Commits nothing in the second block."""

    def step(self, view: View) -> Tensor:
        return torch.where(view.step[:, None] < 0, view.ids, view.ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_that_commits_nothing_is_an_error_that_names_the_row(family: str) -> None:
    model = random_model(family)
    run = replace(build.assemble(model, fastdllm.DecodeConfig(gen_length=8, block_length=8)), decoder=Lazy())
    with pytest.raises(NothingCommitted, match="request 0") as caught:
        list(decode(model, [Request(torch.arange(9), 8)], run, eager.Runner()))
    assert caught.value.number == 0


def test_a_live_source_is_fed_from_other_threads() -> None:
    model = random_model()
    run = build.assemble(model, fastdllm.DecodeConfig(gen_length=16, block_length=8))
    live, done = Live(), {}

    def work() -> None:
        for step in decode(model, live, run, eager.Runner(), rows=3):
            done.update(step.done)

    thread = threading.Thread(target=work)
    thread.start()
    rng = random.Random(0)
    asked = [request(rng, run) for _ in range(20)]
    numbers: dict[int, Request] = {}
    lock = threading.Lock()

    def feed(part: list[Request]) -> None:
        for r in part:
            with lock:
                numbers[live.submit(r)] = r

    feeders = [threading.Thread(target=feed, args=(asked[i::4],)) for i in range(4)]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join()
    live.close()
    thread.join(timeout=600)
    assert not thread.is_alive() and sorted(done) == list(range(20))
    for number, result in done.items():
        assert close(told(result), alone(model, run, numbers[number]))
    with pytest.raises(RuntimeError, match="closed"):
        live.submit(asked[0])


class Hurried(Live):
    """Somebody submits a request and withdraws it at once, between the engine's two questions of a round."""

    def __init__(self, rounds: dict[int, Request]) -> None:
        super().__init__()
        self.rounds, self.round, self.gone = rounds, -1, set[int]()

    def take(self, idle: bool) -> list[Request] | None:
        new, self.round = super().take(idle), self.round + 1
        if self.round in self.rounds:
            self.gone.add(self.submit(self.rounds[self.round]))
            self.withdraw(max(self.gone))
            if self.round == max(self.rounds):
                self.close()
        return new


@pytest.mark.parametrize("rounds", [[0], [0, 1], [0, 1, 2, 3], [1, 3]])
def test_a_request_that_is_withdrawn_before_it_is_handed_over_is_not_decoded(rounds: list[int]) -> None:
    model = random_model()
    run = build.assemble(model, fastdllm.DecodeConfig(gen_length=8, block_length=8, decoder="quota"))
    live = Hurried({at: Request(torch.arange(9), 8) for at in rounds})
    kept = [live.submit(Request(torch.arange(5 + n), 8)) for n in range(2)]
    steps = list(decode(model, live, run, eager.Runner()))
    assert live.gone == set(range(2, 2 + len(rounds)))
    assert sorted(n for step in steps for n in step.done) == kept
    assert {n for step in steps for n in step.rows} == set(kept), "a forward served a request that nobody wanted"
    live.withdraw(0)  # it has ended, which is no mistake
    for number in (-1, 2 + len(rounds)):
        with pytest.raises(ValueError, match=f"number={number} is no request"):
            live.withdraw(number)

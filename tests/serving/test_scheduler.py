# SPDX-License-Identifier: Apache-2.0
"""Many callers on one loop: nobody's answer depends on the others, and nobody's trouble is theirs."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import DecodeConfig
from fastdllm.engine import Request
from fastdllm.serving import scheduler as under_test
from fastdllm.serving.errors import Closed, Expired, NotANumber, Overloaded, TooLong
from fastdllm.serving.jobs import Failed, Finished, Progress
from fastdllm.serving.scheduler import Scheduler
from fastdllm.serving.turns import Turns
from tests.random_models import random_model

CONFIG = DecodeConfig(gen_length=32, block_length=16)
SLOW = CONFIG.replace(decoder="quota", stop_ids=())  # 32 forwards, whatever the model would say


class Listener:
    """Events of one request, and a wait for the last."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.last: queue.Queue[Any] = queue.Queue()

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if not isinstance(event, Progress):
            self.last.put(event)

    def wait(self, seconds: float = 600) -> Any:
        return self.last.get(timeout=seconds)


def prompt(model: fastdllm.Model, text: str) -> torch.Tensor:
    return torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def alone(model: fastdllm.Model, request: Request, config: DecodeConfig = CONFIG) -> list[int]:
    numbers = dict(request.numbers)
    top_k = numbers.pop("top_k", None)
    config = config.replace(
        gen_length=request.length, seed=request.seed, **numbers, **({"top_k": int(top_k)} if top_k else {})
    )
    out = fastdllm.generate(model, [request.prompt], config, constraints=dict(request.fixed))
    return out.sequences[0][len(request.prompt) :].tolist()


def until_end(model: fastdllm.Model, ids: list[int], fixed: Mapping[int, int] = MappingProxyType({})) -> list[int]:
    """The ids up to the first stop token after the last constraint, which is included, as `generate` returns them."""
    ends = [i for i, token in enumerate(ids) if token in model.spec.stop_ids and i > max(fixed, default=-1)]
    return ids[: ends[0] + 1] if ends else ids


def wait_until(condition: Any, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


@pytest.fixture
def running(model: fastdllm.Model) -> Iterator[Scheduler]:
    scheduler = Scheduler(model, CONFIG, rows=16).start()
    yield scheduler
    scheduler.close(timeout=30)


def empty(scheduler: Scheduler) -> bool:
    return not scheduler._active and not scheduler._waiting and not scheduler._suspects and not scheduler.positions_in_flight


def mixed(model: fastdllm.Model, count: int, rng: random.Random) -> list[Request]:
    """Requests that differ in everything a request may choose."""
    texts = ["Question: What is 3 + 4?\nAnswer:", "Tom has 5 apples and", "Hello", "A student has 23 pencils. " * 3]
    requests = []
    for seed in range(count):
        numbers = {"threshold": rng.choice([0.5, 0.9, 0.99])}
        if seed % 2:
            numbers |= {"temperature": rng.choice([0.3, 1.0]), "top_p": rng.choice([0.8, 1.0]), "top_k": rng.choice([0, 5])}
        fixed = {3: 44} if seed % 7 == 3 else {}
        stop_ids = () if fixed else None
        requests.append(
            Request(prompt(model, rng.choice(texts)), rng.choice([5, 16, 33, 48]), seed, fixed, stop_ids, numbers)
        )
    return requests


def test_every_answer_of_a_mixed_crowd_is_what_it_is_alone(model: fastdllm.Model, running: Scheduler) -> None:
    rng = random.Random(1)
    requests = mixed(model, 64, rng)
    listeners = [Listener() for _ in requests]
    jobs, aborted = [], set()
    for i, (request, listener) in enumerate(zip(requests, listeners, strict=True)):
        jobs.append(running.submit(request, listener))
        if i % 3 == 0:
            aborted.add(i)
            threading.Timer(rng.random() * 2, running.withdraw, [jobs[-1]]).start()
        time.sleep(rng.random() * 0.02)
    for i, (request, listener) in enumerate(zip(requests, listeners, strict=True)):
        if i not in aborted:
            event = listener.wait()
            assert isinstance(event, Finished), event
            assert until_end(model, event.ids, request.fixed) == alone(model, request), f"request {i}: {request}"
    wait_until(lambda: empty(running))
    assert running.failed == 0


def test_progress_tells_each_forward_once_and_adds_up_to_the_answer(model: fastdllm.Model, running: Scheduler) -> None:
    listener = Listener()
    running.submit(Request(prompt(model, "Question: What is 3 + 4?\nAnswer:"), 40, alternatives=3), listener)
    finished = listener.wait()
    steps = listener.events[:-1]
    assert [step.forward for step in steps] == list(range(1, finished.forwards + 1))
    written: dict[int, tuple[int, float]] = {}
    for step in steps:
        for i, new in enumerate(step.committed):
            if new:
                written[step.start + i] = (step.ids[i], step.logprobs[i])
                tokens = dict(step.likeliest[i])
                assert step.ids[i] in tokens and abs(tokens[step.ids[i]] - step.logprobs[i]) < 1e-3
    for at, (token, logprob) in written.items():
        assert finished.ids[at] == token and finished.logprobs[at] == pytest.approx(logprob, abs=1e-6)


def test_callers_hear_what_was_done_before_other_work_begins(model: fastdllm.Model, running: Scheduler) -> None:
    """A call may take long, so the news of the forward before it do not wait for the next one."""
    listener, seen = Listener(), []
    job = running.submit(Request(prompt(model, "Hello"), 60, fixed={59: 44}, stop_ids=()), listener)
    for _ in range(5):
        seen.append(running.call(lambda: (job.forwards, job.over, len(listener.events))).result(600))
    listener.wait()
    assert all(told == forwards + over for forwards, over, told in seen), seen


def test_a_withdrawn_request_frees_its_row_within_one_round(model: fastdllm.Model) -> None:
    scheduler = Scheduler(model, DecodeConfig(gen_length=200, decoder="quota", steps=200), rows=1).start()
    first, second = Listener(), Listener()
    job = scheduler.submit(Request(prompt(model, "Hello"), 200, fixed={199: 44}, stop_ids=()), first)
    wait_until(lambda: first.events)
    scheduler.submit(Request(prompt(model, "Hello"), 4), second)
    scheduler.withdraw(job)
    seen, rounds = len(first.events), scheduler.forwards
    wait_until(lambda: second.events)
    assert isinstance(second.wait(), Finished)
    assert len(first.events) <= seen + 1, "the withdrawn request is decoded further"
    assert scheduler.forwards <= rounds + 1 + 4 + 1
    assert scheduler.aborted == 1 and scheduler.close()


def test_the_queue_is_bounded_and_moves_on(model: fastdllm.Model) -> None:
    scheduler = Scheduler(model, CONFIG, rows=2, max_queue=3)
    listeners = [Listener() for _ in range(5)]
    for listener in listeners:
        scheduler.submit(Request(prompt(model, "Hello"), 8), listener)
    with pytest.raises(Overloaded) as refused:
        scheduler.submit(Request(prompt(model, "Hello"), 8), Listener())
    assert refused.value.seconds >= 1, "what Retry-After tells a client: at least one; nothing is timed here"
    scheduler.start()
    assert all(isinstance(listener.wait(), Finished) for listener in listeners)
    wait_until(lambda: empty(scheduler))
    assert scheduler.close()


def test_requests_that_come_together_are_taken_together_or_not_at_all(model: fastdllm.Model) -> None:
    scheduler = Scheduler(model, CONFIG, rows=1, max_queue=1)
    request = Request(prompt(model, "Hello"), 8)
    with pytest.raises(ValueError, match="3 answers at once are more than this server ever takes, 2"):
        scheduler.submit_all([request] * 3, [Listener()] * 3)
    assert empty(scheduler)
    first = scheduler.submit(request, Listener())  # not started, so that nothing ends meanwhile
    with pytest.raises(Overloaded):
        scheduler.submit_all([request] * 2, [Listener()] * 2)
    scheduler.withdraw(first)
    assert len(scheduler.submit_all([request] * 2, [Listener()] * 2)) == 2


def test_memory_admits_what_fits_and_the_rest_waits(model: fastdllm.Model) -> None:
    one = Request(prompt(model, "Hello"), 20)
    scheduler = Scheduler(model, CONFIG, positions=None, rows=64)
    listeners = [Listener() for _ in range(8)]
    size = scheduler.submit(one, listeners[0]).positions
    scheduler.positions = scheduler.largest = 2 * size
    for listener in listeners[1:]:
        scheduler.submit(one, listener)
    peak = []
    original = scheduler._take_in
    scheduler._take_in = lambda step, feed: (peak.append(len(feed.jobs)), original(step, feed))  # type: ignore[method-assign]
    scheduler.start()
    assert all(isinstance(listener.wait(), Finished) for listener in listeners)
    assert max(peak) == 2
    with pytest.raises(TooLong, match="positions that this server holds"):
        scheduler.submit(Request(prompt(model, "Hello"), 300), Listener())
    assert scheduler.close()


def test_a_deadline_ends_a_running_and_a_waiting_request(model: fastdllm.Model) -> None:
    scheduler = Scheduler(model, DecodeConfig(gen_length=400, decoder="quota", steps=400), rows=1).start()
    listeners = [Listener(), Listener()]
    for listener in listeners:
        request = Request(prompt(model, "Hello"), 400, fixed={399: 44}, stop_ids=())
        scheduler.submit(request, listener, deadline=time.monotonic() + 0.3)
    for listener in listeners:
        event = listener.wait()
        assert isinstance(event, Failed) and isinstance(event.error, Expired)
    wait_until(lambda: empty(scheduler))
    assert scheduler.close()


def test_a_bad_request_fails_at_its_submitter(model: fastdllm.Model, running: Scheduler) -> None:
    good = Listener()
    running.submit(Request(prompt(model, "Hello"), 8), good)
    for bad in (Request(prompt(model, "Hello"), 9999), Request(prompt(model, "Hello"), 8, numbers={"wit": 1.0})):
        with pytest.raises(ValueError):
            running.submit(bad, Listener())
    assert isinstance(good.wait(), Finished)


class Poisoned:
    """The engine's `decode`, but it raises when a request with one of these seeds has run for some rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seeds: set[int], error: Exception, after: int = 1) -> None:
        self.decode, self.seeds, self.error, self.after, self.raised = under_test.decode, seeds, error, after, 0
        monkeypatch.setattr(under_test, "decode", self)

    def __call__(self, model: Any, feed: Any, *rest: Any, **options: Any) -> Iterator[Any]:
        for rounds, step in enumerate(self.decode(model, feed, *rest, **options)):
            yield step
            if rounds >= self.after and any(job.request.seed in self.seeds for job in feed.jobs.values()):
                self.raised += 1
                raise self.error


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), torch.OutOfMemoryError("40 GiB")])
def test_a_request_that_breaks_the_loop_fails_alone(
    model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    poison = Poisoned(monkeypatch, {666, 667}, error)
    scheduler = Scheduler(model, CONFIG.replace(threshold=0.999), rows=8).start()
    seeds = [1, 666, 2, 3, 667, 4]
    requests = [Request(prompt(model, f"Tom has {seed} apples and"), 40, seed) for seed in seeds]
    listeners = [Listener() for _ in requests]
    scheduler.submit_all(requests, listeners)
    for request, listener in zip(requests, listeners, strict=True):
        event = listener.wait()
        if request.seed in poison.seeds:
            assert isinstance(event, Failed) and event.error is error
        else:
            assert isinstance(event, Finished)
            assert until_end(model, event.ids) == alone(model, request, CONFIG.replace(threshold=0.999))
    assert poison.raised >= 3 and scheduler.alive
    later = Listener()
    scheduler.submit(requests[0], later)
    assert isinstance(later.wait(), Finished)
    wait_until(lambda: empty(scheduler))
    assert scheduler.close()


def test_a_request_as_long_as_the_server_takes_is_taken_after_memory_ran_out(
    model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poisoned(monkeypatch, {666}, torch.OutOfMemoryError("40 GiB"))
    scheduler = Scheduler(model, CONFIG.replace(threshold=0.999), positions=256).start()
    short = [Request(prompt(model, "Hello"), 8, seed) for seed in (1, 666, 2)]
    listeners = [Listener() for _ in short]
    scheduler.submit_all(short, listeners)
    assert sum(isinstance(listener.wait(), Finished) for listener in listeners) == 2
    assert scheduler.positions is not None and scheduler.positions < 200
    tokens, last = prompt(model, "Tom has 3 apples and"), Listener()
    scheduler.submit(Request(tokens, 200, 3), last)
    assert isinstance(last.wait(), Finished)
    with pytest.raises(TooLong, match="256 positions"):
        scheduler.submit(Request(tokens, 300, 3), Listener())
    assert scheduler.close()


def test_a_lost_device_ends_every_request_and_is_not_hidden(model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    Poisoned(monkeypatch, {5}, RuntimeError("device-side assert"), after=0)
    scheduler = Scheduler(model, SLOW, rows=4)
    monkeypatch.setattr(scheduler, "_device_works", lambda: False)
    listeners = [Listener() for _ in range(3)]
    for listener in listeners:
        scheduler.submit(Request(prompt(model, "Hello"), 32, 5), listener)
    scheduler.start()
    assert all(isinstance(listener.wait(), Failed) for listener in listeners)
    wait_until(lambda: not scheduler.alive)
    with pytest.raises(Closed):
        scheduler.submit(Request(prompt(model, "Hello"), 8), Listener())


def test_a_sound_round_makes_up_for_faults_before(model: fastdllm.Model, running: Scheduler) -> None:
    """The loop is given up for raising with nothing in it again and again, not for doing so once in a while."""
    running._crashes = under_test.CRASHES
    listener = Listener()
    running.submit(Request(prompt(model, "Hello"), 8), listener)
    assert isinstance(listener.wait(), Finished)
    assert running._crashes == 0


class Stuck:
    """The engine's `decode`, but a round does not come back until it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decode, self.go_on, self.began = under_test.decode, threading.Event(), threading.Event()
        monkeypatch.setattr(under_test, "decode", self)

    def __call__(self, *given: Any, **options: Any) -> Iterator[Any]:
        for step in self.decode(*given, **options):
            self.began.set()
            self.go_on.wait()
            yield step


def test_a_request_ends_at_its_deadline_though_a_round_does_not(
    model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = Stuck(monkeypatch)
    monkeypatch.setattr(under_test, "SILENT", 0.1)
    scheduler = Scheduler(model, CONFIG, rows=1).start()
    listeners = [Listener() for _ in range(3)]
    for listener, seconds in zip(listeners, (0.5, 0.7, None), strict=True):
        deadline = None if seconds is None else time.monotonic() + seconds
        scheduler.submit(Request(prompt(model, "Hello"), 8), listener, deadline=deadline)
    assert stuck.began.wait(600)
    for listener in listeners[:2]:
        event = listener.wait(600)
        assert isinstance(event, Failed) and isinstance(event.error, Expired)
        assert "was not begun" in str(event.error)
    wait_until(lambda: "go_on.wait()" in caplog.text)
    stuck.go_on.set()
    assert isinstance(listeners[2].wait(), Finished), "the others go on when the round comes back"
    wait_until(lambda: empty(scheduler))
    assert scheduler.close()


def test_no_request_is_left_alone_when_the_thread_ends(model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, also what handles failures."""
    Poisoned(monkeypatch, {5}, RuntimeError("device-side assert"), after=0)
    scheduler = Scheduler(model, SLOW, rows=4)

    def lost(*_: Any) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(scheduler, "_recover", lost)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    listeners = [Listener() for _ in range(6)]
    for listener in listeners:
        scheduler.submit(Request(prompt(model, "Hello"), 32, 5), listener)
    scheduler.start()
    assert all(isinstance(listener.wait(600), Failed) for listener in listeners)
    with pytest.raises(Closed):
        scheduler.submit(Request(prompt(model, "Hello"), 8), Listener())


def test_requests_that_a_scheduler_never_began_hear_of_its_end(model: fastdllm.Model) -> None:
    scheduler, listener = Scheduler(model, CONFIG), Listener()
    scheduler.submit(Request(prompt(model, "Hello"), 8), listener)
    future = scheduler.call(lambda: 1)
    assert scheduler.close(1)
    assert isinstance(listener.wait(1), Failed)
    with pytest.raises(Closed):
        future.result(1)


def test_a_request_larger_than_what_is_left_of_the_budget_is_tried_alone(model: fastdllm.Model) -> None:
    """Memory ran out, so the budget shrank below what was taken before: nobody may wait for it for ever."""
    scheduler = Scheduler(model, CONFIG, positions=4096, rows=8)
    listeners = [Listener() for _ in range(3)]
    for listener, length in zip(listeners, (8, 300, 8), strict=True):
        scheduler.submit(Request(prompt(model, "Hello"), length), listener)
    scheduler.positions = 64
    scheduler.start()
    assert all(isinstance(listener.wait(600), Finished) for listener in listeners)
    assert scheduler.close()


def test_a_request_whose_answer_is_nan_fails_alone(model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(prompt(model, text), 16, stop_ids=()) for text in ("Tom has 5 apples and", "Hello", "Tom has 5")]
    expected, bad = alone(model, requests[0], CONFIG.replace(stop_ids=[])), requests[1].prompt[0]
    assert bad not in expected and bad not in requests[0].prompt and bad not in requests[2].prompt
    embed = model.network.embed.forward
    monkeypatch.setattr(
        model.network.embed, "forward", lambda ids: embed(ids).masked_fill((ids == bad)[..., None], torch.nan)
    )
    scheduler = Scheduler(model, CONFIG, rows=3)
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        scheduler.submit(request, listener)
    scheduler.start()
    events = [listener.wait(600) for listener in listeners]
    assert isinstance(events[1], Failed) and isinstance(events[1].error, NotANumber)
    assert isinstance(events[0], Finished) and events[0].ids == expected
    assert isinstance(events[2], Finished) and scheduler.failed == 1
    assert scheduler.close()


def test_a_server_may_have_many_stop_tokens(model: fastdllm.Model) -> None:
    scheduler = Scheduler(model, CONFIG.replace(stop_ids=list(range(20)))).start()
    listener = Listener()
    scheduler.submit(Request(prompt(model, "Hello"), 8), listener)
    assert isinstance(listener.wait(600), Finished)
    assert scheduler.close()


def test_calls_run_between_rounds_and_their_errors_are_their_own(model: fastdllm.Model, running: Scheduler) -> None:
    listener = Listener()
    running.submit(Request(prompt(model, "Hello"), 48), listener)
    assert running.call(threading.current_thread).result(600) is running._thread
    with pytest.raises(ZeroDivisionError):
        running.call(lambda: 1 // 0).result(600)
    assert isinstance(listener.wait(), Finished)


def test_answers_go_on_while_calls_keep_coming(model: fastdllm.Model, running: Scheduler) -> None:
    """A call that is followed by another one leaves a round between them."""
    over, called = threading.Event(), []

    def again() -> None:
        called.append(running.forwards)
        if not over.is_set():
            running.call(again)

    running.call(again)
    listener = Listener()
    job = running.submit(Request(prompt(model, "Hello"), 32, numbers={"threshold": 1.0}), listener)
    assert isinstance(listener.wait(), Finished)
    over.set()
    assert job.forwards > 1 and set(range(running.forwards)) <= set(called), "one call before each forward"


def test_another_run_of_the_device_goes_on_while_calls_keep_coming(model: fastdllm.Model) -> None:
    turns, over = Turns(), threading.Event()
    busy, other = (Scheduler(model, CONFIG, turns=turns).start() for _ in range(2))

    def again() -> None:
        if not over.is_set():
            busy.call(again)

    busy.call(again)
    listener = Listener()
    other.submit(Request(prompt(model, "Hello"), 32), listener)
    assert isinstance(listener.wait(), Finished)
    over.set()
    assert busy.close() and other.close()


def test_calls_wait_in_a_queue_that_is_bounded(model: fastdllm.Model) -> None:
    """Besides the next one as many as requests may; who has left does not count."""
    scheduler = Scheduler(model, CONFIG, max_queue=2)
    waiting = [scheduler.call(threading.get_ident) for _ in range(3)]
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        scheduler.call(threading.get_ident)
    waiting.pop().cancel()
    waiting.append(scheduler.call(threading.get_ident))
    scheduler.start()
    assert len({future.result(600) for future in waiting}) == 1
    assert scheduler.close()


@pytest.mark.parametrize("steps", [None, 8, 16])
def test_a_schedule_keeps_its_pace_in_answers_of_any_length(model: fastdllm.Model, steps: int | None) -> None:
    """The engine's own length may be shorter than a block, which is no reason to commit more tokens in a step."""
    config = DecodeConfig(gen_length=16, block_length=32, decoder="quota", steps=steps, stop_ids=())
    scheduler = Scheduler(model, config).start()
    for length in (32, 64, 96):
        listener = Listener()
        scheduler.submit(Request(prompt(model, "Hello"), length), listener)
        assert listener.wait().forwards == length * (steps or 16) // 16
    assert scheduler.close()


def test_closing_finishes_what_was_taken_and_refuses_the_rest(model: fastdllm.Model) -> None:
    scheduler = Scheduler(model, CONFIG, rows=2).start()
    listeners = [Listener() for _ in range(6)]
    for listener in listeners:
        scheduler.submit(Request(prompt(model, "Hello"), 32), listener)
    assert scheduler.close()
    assert all(isinstance(listener.last.get_nowait(), Finished) for listener in listeners)
    with pytest.raises(Closed):
        scheduler.submit(Request(prompt(model, "Hello"), 8), Listener())


def test_a_request_takes_what_an_earlier_one_computed_of_its_prompt() -> None:
    """Across requests, and across the turns of a chat, whose prompts hold earlier answers."""
    model = random_model("v2")
    config = DecodeConfig(gen_length=16, block_length=8, small_block_size=4, stop_ids=())
    scheduler = Scheduler(model, config).start()
    try:
        history, cached = torch.arange(30) % 20, []
        for turn in range(3):
            listener = Listener()
            scheduler.submit(Request(history, 16), listener, watched=False)
            done = listener.wait()
            assert done.ids == fastdllm.generate(model, history, config).sequences[0][len(history) :].tolist()
            cached.append(done.cached)
            history = torch.cat([history, torch.tensor(done.ids), torch.arange(3) + turn])
    finally:
        scheduler.close(20)
    assert cached == [0, 40, 56]

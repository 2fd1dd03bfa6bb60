# SPDX-License-Identifier: Apache-2.0
"""Runs of the page for settings of visitors: made, waited for, lent, left alone, and closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

pytest.importorskip("httpx", reason="fastapi's test client needs it")
from fastapi.testclient import TestClient

import fastdllm
from fastdllm import DecodeConfig
from fastdllm.runners import eager
from fastdllm.serving import page as under_test
from fastdllm.serving.app import create_app
from fastdllm.serving.errors import ApiError
from fastdllm.serving.page import Page, PageBody, beside, plan
from fastdllm.serving.scheduler import Scheduler
from fastdllm.serving.service import Service
from tests.serving.test_page import CONFIG, body, events, text_of

HANG = 300.0  # seconds after which a wait is given up; nothing here takes as long


def test_runs_are_bounded_and_the_idle_ones_make_room(model: fastdllm.Model) -> None:
    app = create_app(Service(model, CONFIG, rows=4), wait_until_warm=True)
    page: Page = app.state.page
    page._most = 1
    with TestClient(app, base_url="http://localhost") as client:
        for name in ("paper", "one", "paper"):
            assert text_of(events(client, setting={"name": name}))
            assert len(page._runs) == 1 and not any(run.users for run in page._runs.values())
            kept = {name: len(of) for name, of in vars(page).items() if isinstance(of, dict)}
            assert max(kept.values()) == 1, f"visitors choose the keys, and what they chose before is forgotten: {kept}"
        next(iter(page._runs.values())).users += 1
        response = client.post("/page/chat", json=body(setting={"name": "one"}))
        assert (
            response.status_code == 429
            and response.headers["Retry-After"]
            and response.json()["error"]["code"] == "settings_busy"
        )


class Making:
    """A page with few runs, and every service that it makes for one. As each is begun, and before it is handed over,
    `begun` is told and whatever a test puts into `hold` is called."""

    def __init__(self, model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
        self.page, self.made = Page([Service(model, CONFIG, rows=4)], runs=runs), list[Service]()
        self.most, self.begun, self.hold = 0, threading.Semaphore(0), lambda: None

        def watched(own: Service, config: DecodeConfig) -> Service:
            self.most = max(self.most, 1 + len(self.alive))
            self.begun.release()
            self.hold()
            self.made.append(beside(own, config))
            return self.made[-1]

        monkeypatch.setattr(under_test, "beside", watched)

    @property
    def alive(self) -> list[Service]:
        return [service for service in self.made if service.scheduler._thread.is_alive()]

    async def ask(self, name: str, **given: Any) -> str:
        chunks = self.page.chat(PageBody(**body(setting={"name": name}, **given)))
        async with aclosing(chunks):
            return text_of([chunk async for chunk in chunks])

    async def run(self, test: Callable[[], Awaitable[None]]) -> None:
        """The test between the start and the end of the page, which leaves no thread."""
        self.page.start()
        try:
            await asyncio.wait_for(test(), HANG)
        finally:
            await asyncio.wait_for(asyncio.to_thread(self.page.close), HANG)
        assert not self.alive and self.most <= self.page._most


async def happens(condition: Callable[[], object]) -> None:
    """Wait until it does; for ever if it does not."""
    while not condition():
        await asyncio.sleep(0.005)


async def leave(visitor: asyncio.Future[Any]) -> None:
    visitor.cancel()
    with pytest.raises(asyncio.CancelledError):
        await visitor


@pytest.fixture
def making(model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch) -> Making:
    return Making(model, monkeypatch, runs=2)


def test_visitors_who_hang_up_while_a_run_is_made_leave_nothing_behind(making: Making) -> None:
    left = threading.Semaphore(0)
    making.hold = lambda: left.acquire(timeout=HANG)

    async def test() -> None:
        for count, name in enumerate(("one", "paper", "fast", "one", "paper"), start=1):
            visitor = asyncio.ensure_future(making.ask(name))
            await asyncio.to_thread(making.begun.acquire)
            await leave(visitor)
            left.release()
            await happens(lambda: len(making.made) == count)  # noqa: B023
        assert len(making.page._runs) == 2 and not any(run.users for run in making.page._runs.values())
        left.release(2)
        assert await making.ask("paper"), "the one that was made last serves whoever comes next"
        assert len(making.made) == 5

    asyncio.run(making.run(test))


def test_the_page_closes_runs_that_are_being_made(making: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    closes, shutdown = threading.Event(), making.page._builder.shutdown
    monkeypatch.setattr(making.page._builder, "shutdown", lambda: (closes.set(), shutdown()))
    making.hold = lambda: closes.wait(HANG)

    async def test() -> None:
        visitor = asyncio.ensure_future(making.ask("one"))
        await asyncio.to_thread(making.begun.acquire)
        await leave(visitor)

    asyncio.run(making.run(test))
    assert len(making.made) == 1 and not making.alive


def test_a_run_that_is_warmed_up_holds_up_no_other(making: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up, cold = Service.warm_up, asyncio.Event()

    async def slow(service: Service) -> None:
        if service.config.name_of("decoder") == "quota":
            await cold.wait()
        await warm_up(service)

    monkeypatch.setattr(Service, "warm_up", slow)

    async def test() -> None:
        answer = await making.ask("paper")
        waiting = [asyncio.ensure_future(making.ask("one")) for _ in range(2)]
        await happens(lambda: len(making.made) == 2)
        assert await making.ask("paper") == answer and len(making.made) == 2, "that of a ready run"
        assert await making.ask("fast") and len(making.made) == 3, "and that of a new one"
        with pytest.raises(ApiError, match="2 other settings are at work") as refused:
            async with making.page._lent(*asked_for(making.page, "fast")):
                await making.ask("paper")
        assert refused.value.code == "settings_busy", "one that visitors wait for makes no room"
        assert not any(visitor.done() for visitor in waiting)
        cold.set()
        assert len(set(await asyncio.gather(*waiting))) == 1 and len(making.made) == 3, "both wait for the same run"

    asyncio.run(making.run(test))


def asked_for(page: Page, name: str) -> tuple[Service, DecodeConfig, Any]:
    """What the run of a setting is asked for by."""
    own = page._service(None)
    config, _, key = plan(own, {"name": name}, 64, 0)
    return own, config, key


@pytest.mark.parametrize("at", ["building", "warming up"])
def test_all_who_wait_hear_that_a_run_cannot_be_made_and_the_next_visitor_tries_again(
    making: Making, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    warm_up, fails = Service.warm_up, threading.Event()

    def fail() -> None:
        assert fails.wait(HANG)
        if at == "building":
            raise MemoryError("too large")

    async def cannot(service: Service) -> None:
        raise MemoryError("too large")

    making.hold = fail
    if at != "building":
        monkeypatch.setattr(Service, "warm_up", cannot)

    async def test() -> None:
        visitors = [asyncio.ensure_future(making.ask("one")) for _ in range(3)]
        await happens(lambda: sum(run.users for run in making.page._runs.values()) == 3)
        await leave(visitors.pop(0))
        fails.set()
        told = await asyncio.gather(*visitors, return_exceptions=True)
        assert [str(error) for error in told] == ["too large"] * 2 and not making.page._runs and not making.alive
        making.hold = lambda: None
        monkeypatch.setattr(Service, "warm_up", warm_up)
        assert await making.ask("one")

    asyncio.run(making.run(test))


def test_a_warm_up_that_nobody_waits_for_is_cut_where_another_run_needs_the_place(
    making: Making, monkeypatch: pytest.MonkeyPatch
) -> None:
    making.page._most = 1
    turns, warm_up, taken = making.page._service(None).turns, Service.warm_up, []

    async def held(service: Service) -> None:
        await happens(lambda: taken)
        await warm_up(service)

    monkeypatch.setattr(Service, "warm_up", held)

    async def test() -> None:
        visitor = asyncio.ensure_future(making.ask("one"))
        await happens(lambda: making.made)
        turns.take()  # so that it does not get on
        taken.append(True)
        await happens(lambda: making.made[0].scheduler._active)
        await leave(visitor)
        visitor = asyncio.ensure_future(making.ask("paper"))
        await happens(lambda: making.made[0].scheduler._closed)
        turns.give()
        assert await visitor
        assert not making.made[0].scheduler.finished and making.made[0].scheduler.failed == 1

    asyncio.run(making.run(test))


def test_a_run_whose_threads_do_not_all_start_leaves_none(model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())

    def start(scheduler: Scheduler) -> Scheduler:
        scheduler._thread.start()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Scheduler, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        beside(Service(model, CONFIG), CONFIG)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "decoding"]


def test_a_run_takes_its_memory_before_the_next_one_asks_how_much_is_free(
    model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvases, make = [], eager.new_canvas

    def slowly(*given: Any) -> Any:
        time.sleep(0.3)
        canvases.append(make(*given))
        return canvases[-1]

    monkeypatch.setattr(eager, "new_canvas", slowly)
    service = beside(Service(model, CONFIG), CONFIG)
    try:
        assert len(canvases) == 1
    finally:
        service.close()


def test_what_cannot_be_answered_opens_no_run(making: Making) -> None:
    async def test() -> None:
        for given in ({"words": "apples"}, {"messages": [{"role": "user", "content": "  "}]}):
            with pytest.raises(ApiError):
                await making.ask("one", **given)
        assert not making.made and not making.page._runs

    asyncio.run(making.run(test))


def test_a_page_that_was_closed_opens_no_run(making: Making) -> None:
    asyncio.run(making.run(lambda: asyncio.sleep(0)))
    own, config, key = asked_for(making.page, "one")
    with pytest.raises(ApiError, match="shutting down"):
        making.page._open(own, config, key)
    assert not making.made and not making.page._runs


def test_a_waiting_visitor_is_told_his_place(model: fastdllm.Model) -> None:
    app = create_app(
        Service(model, DecodeConfig(gen_length=128, decoder="quota", stop_ids=()), rows=1), wait_until_warm=True
    )
    with TestClient(app, base_url="http://localhost") as client:
        told: list[list[dict[str, Any]]] = [[], [], []]

        def visit(number: int) -> None:
            told[number] = events(client, max_tokens=128)

        visitors = [threading.Thread(target=visit, args=(number,)) for number in range(3)]
        for visitor in visitors:
            visitor.start()
        for visitor in visitors:
            visitor.join()
    places = [[event["waiting"]["place"] for event in events_ if "waiting" in event] for events_ in told]
    assert all(text_of(one) == text_of(told[0]) for one in told)
    assert any(1 in waited for waited in places), places
    assert all(waited == sorted(waited, reverse=True) for waited in places)

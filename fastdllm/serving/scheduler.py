# SPDX-License-Identifier: Apache-2.0
"""One decoding loop for many callers: requests join and leave it between two rounds.

A single thread runs `engine.decode` on a live source, so that nothing else ever launches work on the device. Callers, on any
thread, submit a request with a function that takes its events. Other work on the model (scores, typed answers) is handed
over as a call and runs between two rounds.

What a forward did is read at once, and told to the callers while the device computes the next one: to tell dozens of them
takes as long as a part of a forward.

A second thread watches the deadlines, so that a request ends in time even when a round does not come back.

When a round raises, nothing says whose fault it was. So each request that was running is tried again by itself: the one
that raises again fails. The others start anew and write the same tokens once more, since a row depends on no other.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fastdllm.build import assemble, resolve, runner
from fastdllm.config import DecodeConfig
from fastdllm.engine import Request, Step, check, decode
from fastdllm.engine.admission import ROWS, size_of
from fastdllm.forward import ALTERNATIVES
from fastdllm.serving.errors import Closed, Expired, Overloaded, TooLong
from fastdllm.serving.jobs import Event, Failed, Finished, Job, Reading, ending, read
from fastdllm.serving.turns import Turns
from fastdllm.store import UNIT

if TYPE_CHECKING:
    from fastdllm.models import Model

log = logging.getLogger("fastdllm.serving")
T = TypeVar("T")
CRASHES = 3  # times that the loop may raise with nothing in it before it is given up
HANDOVER = 5e-4  # seconds for which a thread of the process may keep the interpreter while another waits
LEAVE = 60.0  # seconds that the interpreter waits at its end for the forward at work: long ones of a CPU take less
SILENT = 60.0  # seconds of one round or call after which the log says where it is


class Feed:
    """The source of one run of the loop: hands over what waits, and says what is no longer wanted. news: what callers have
    not been told yet, as calls that tell them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._handed = 0
        self.jobs: dict[int, Job] = {}  # by number, those that the loop still holds
        self.news: list[Callable[[], None]] = []

    def known(self) -> None:
        return None

    def meanwhile(self) -> None:
        news, self.news = self.news, []
        for tell in news:
            tell()

    def take(self, idle: bool) -> list[Request] | None:
        if idle:
            self.meanwhile()
        jobs = self._scheduler._next(idle, self)
        if jobs is None:
            return None
        for job in jobs:
            self.jobs[self._handed] = job
            self._handed += 1
        return [job.request for job in jobs]

    def withdrawn(self) -> Collection[int]:
        gone = [number for number, job in self.jobs.items() if job.withdrawn]
        for number in gone:
            del self.jobs[number]
        return gone


class Scheduler:
    """Decodes submitted requests with one model under one config, in one continuous batch.

    positions: memory budget, positions of prompts and answers on the canvas at once; None: what the engine takes. rows:
    requests in one batch at most, None: as many as fit. usual: requests at once for which the run chooses what saves time,
    None: rows. max_queue: requests that may wait beyond those that fit. turns: shared with other schedulers of the device,
    whose forwards alternate with these.
    """

    def __init__(
        self,
        model: Model,
        config: DecodeConfig,
        *,
        positions: int | None = None,
        rows: int | None = None,
        usual: int | None = None,
        max_queue: int = 256,
        turns: Turns | None = None,
    ) -> None:
        self.model, self.config, self.turns = model, config, turns or Turns()
        self.positions, self.rows, self.max_queue = positions, rows or ROWS, max_queue
        self.run = assemble(model, for_any_length(model, config), usual or self.rows)
        self.largest = positions  # request that is taken; `positions` shrinks when memory runs out, this does not
        self.alternatives = 0 if self.run.decoder.branches > 1 else ALTERNATIVES
        self.revocable = self.run.decoder.revocable()
        self.tokens = self.forwards = self.finished = self.failed = self.aborted = 0  # totals, for the metrics
        self.broken: BaseException | None = None
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._suspects: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._active: set[Job] = set()
        self._crashes = 0
        self._closed = False
        self._seconds_per_answer = 0.5
        self._last_round = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="decoding", daemon=True)
        self._watch = threading.Thread(target=self._keep_deadlines, name="deadlines", daemon=True)

    # Callers' side: any thread.

    def start(self) -> Scheduler:
        # Nobody may have closed it when the interpreter ends, and a thread that is within torch then aborts the process.
        atexit.register(self._leave)
        self._thread.start()
        self._watch.start()
        return self

    @property
    def alive(self) -> bool:
        """Whether requests will be answered: the device works, and the thread has not ended."""
        return self.broken is None and (self._thread.ident is None or self._thread.is_alive())

    @property
    def running(self) -> int:
        return sum(job.started for job in tuple(self._active))

    @property
    def waiting(self) -> int:
        return sum(not job.started for job in tuple(self._active))

    @property
    def positions_in_flight(self) -> int:
        return sum(job.positions for job in tuple(self._active) if job.started)

    def submit(
        self, request: Request, deliver: Callable[[Event], None], *, watched: bool = True, deadline: float | None = None
    ) -> Job:
        """Take a request in; its events go to `deliver`, `Finished` or `Failed` last.

        Raises ValueError for a request that makes no sense (`TooLong` where it can never fit), `Overloaded` when the queue
        is full, `Closed` during shutdown.
        """
        return self.submit_all([request], [deliver], watched=watched, deadline=deadline)[0]

    def submit_all(
        self,
        requests: list[Request],
        deliver: list[Callable[[Event], None]],
        *,
        watched: bool = True,
        deadline: float | None = None,
    ) -> list[Job]:
        """As `submit`, for requests that come together: all are taken or none."""
        jobs = []
        for request, to in zip(requests, deliver, strict=True):
            check(self.model, self.run, request)
            positions = size_of(request, self.run, self.model.spec) * UNIT * self.run.lanes
            if self.largest is not None and positions > self.largest:
                raise TooLong(
                    f"{len(request.prompt)} tokens of prompt and an answer of {request.length} exceed the {self.largest} "
                    "positions that this server holds at once"
                )
            jobs.append(Job(request, to, watched, deadline, positions, time.monotonic()))
        with self._lock:
            if self._closed or not self.alive:
                raise Closed("the server is shutting down" if self._closed else "the model's device has failed")
            self._admit(jobs)
            self._waiting += jobs
            self._active.update(jobs)
            self._lock.notify_all()
        return jobs

    def _admit(self, jobs: list[Job]) -> None:
        """Mark those that must wait for memory; Overloaded when more would wait than may."""
        most = self.rows + self.max_queue
        if len(jobs) > most:
            raise ValueError(f"{len(jobs)} answers at once are more than this server ever takes, {most}")
        busy, held = len(self._active), sum(job.positions for job in self._active)
        for job in jobs:
            busy, held = busy + 1, held + job.positions
            job.queued = busy > self.rows or (self.positions is not None and held > self.positions)
        waiting = sum(job.queued and not job.started for job in self._active)
        if waiting + sum(job.queued for job in jobs) > self.max_queue:
            raise Overloaded(waiting, self.retry_after(waiting))

    def retry_after(self, waiting: int) -> int:
        """Seconds until a queue of that length has moved on, by the answers of late."""
        return max(1, min(60, round(self._seconds_per_answer * (waiting + 1) / 2)))

    def place(self, job: Job) -> int:
        """How many requests there are until this one's turn, itself included; 0: it is being answered, or over."""
        with self._lock:
            return self._waiting.index(job) + 1 if job in self._waiting else 0

    def withdraw(self, job: Job) -> None:
        """The answer is no longer wanted: its row is free within one round. Harmless for a finished one."""
        with self._lock:
            if job.over:
                return
            self.aborted += 1
            self._drop(job)

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on the decoding thread, between two rounds. Raises `Overloaded` when too much waits already, `Closed`
        during shutdown."""
        mine: Future[T] = Future()
        with self._lock:
            if self._closed or not self.alive:
                raise Closed("the server is shutting down" if self._closed else "the model's device has failed")
            waiting = sum(not future.cancelled() for _, future in self._calls)
            if waiting > self.max_queue:  # besides the next one
                raise Overloaded(waiting, self.retry_after(waiting))
            self._calls.append((work, mine))
            self._lock.notify_all()
        return mine

    def close(self, timeout: float | None = None) -> bool:
        """Take no further requests, finish those taken, and stop; False when `timeout` seconds were not enough."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        ended = self._joined(timeout)
        self._end_all(Closed("the server is shutting down"))
        if not ended:
            self._joined(timeout)
        return ended

    def _leave(self) -> None:
        """Stop because the interpreter ends, as soon as the forward at work is over."""
        self.close(0.0)
        self._joined(LEAVE)

    def _joined(self, timeout: float | None) -> bool:
        """Wait for the decoding thread; whether it has ended, or was never started."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _end_all(self, error: BaseException) -> None:
        """Fail whatever was taken and is not over."""
        with self._lock:
            for job in list(self._active):
                self._fail(job, error)
            calls, self._calls = self._calls, deque()
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    # The decoding thread.

    def _serve(self) -> None:
        # This thread comes back from the device in every round, and must not wait 5 ms for another that computes.
        sys.setswitchinterval(min(sys.getswitchinterval(), HANDOVER))
        try:
            self._run_until_closed()
        except BaseException as error:  # this thread ends now: whoever waits for it must hear
            self.broken = error
            raise
        finally:
            self._end_all(self.broken or Closed("the server is shutting down"))
            atexit.unregister(self._leave)

    def _run_until_closed(self) -> None:
        executor = runner(self.model, self.config)
        while self.broken is None:
            feed = Feed(self)
            budget = {"positions": self.positions, "rows": self.rows}
            try:
                with closing(decode(self.model, feed, self.run, executor, trace=True, **budget)) as steps:
                    while (step := self._round(steps)) is not None:
                        self._take_in(step, feed)
                feed.meanwhile()
                return
            except Exception as error:
                log.exception("a round of the decoding loop failed")
                feed.meanwhile()
                self._recover(error, list(feed.jobs.values()))

    def _round(self, steps: Iterator[Step]) -> Step | None:
        with self.turns:
            return next(steps, None)

    def _next(self, idle: bool, feed: Feed) -> list[Job] | None:
        """What the loop shall take in now. Blocks while there is nothing to do at all; None: nothing will come any more."""
        while True:
            self._run_call(feed)
            with self._lock:
                self._last_round = time.monotonic()
                jobs = self._hand_over(feed.jobs.values())
                if jobs or not idle:
                    return jobs
                if self._closed and not self._waiting and not self._suspects and not self._calls:
                    return None
                busy = bool(self._calls)
            if busy:
                with self.turns.rest():  # the other runs of the device go on between two calls
                    pass
            else:
                self._rest()

    def _rest(self) -> None:
        """Wait for something to do; the other runs of the device go on meanwhile."""
        with self.turns.rest(), self._lock:
            if not self._calls:
                self._lock.wait(0.02 if self._waiting or self._closed else 1.0)  # it may have come before we had the lock

    def _hand_over(self, held: Collection[Job]) -> list[Job]:
        """Those whose turn it is and that fit; after a failure one suspect at a time, and nothing else."""
        while self._suspects:
            if held:
                return []
            job = self._suspects.popleft()
            if not job.over:
                return [job]
        jobs: list[Job] = []
        positions, count = sum(job.positions for job in held), len(held)
        while self._waiting:
            positions, count = positions + self._waiting[0].positions, count + 1
            # The budget may have shrunk below a request, for a while or for good. By itself, each is tried.
            if count > 1 and (count > self.rows or (self.positions is not None and positions > self.positions)):
                break
            jobs.append(self._waiting.popleft())
        return jobs

    def _run_call(self, feed: Feed) -> None:
        """Run one call, if there is any: when they come as fast as they are served, answers shall go on all the same."""
        with self._lock:
            while self._calls:
                work, future = self._calls.popleft()
                if future.set_running_or_notify_cancel():
                    break
            else:
                return
        feed.meanwhile()  # the call may take long
        try:
            result = work()
        except Exception as error:
            future.set_exception(error)
            self._free_memory(error)
        else:
            future.set_result(result)
        self._last_round = time.monotonic()

    def _take_in(self, step: Step, feed: Feed) -> None:
        """Read what a step did; `feed` holds it as news for the callers."""
        jobs = [feed.jobs.get(number) for number in step.rows]
        for job in jobs:
            if job is not None:
                job.started, job.forwards = True, job.forwards + 1
        self.forwards, self._crashes = self.forwards + 1, 0  # a sound round
        if any(job is not None and job.watched and not job.withdrawn for job in jobs):
            feed.news.append(partial(self._report, jobs, read(step)))
        for number, result in step.done.items():
            job = feed.jobs.pop(number, None)
            if job is not None:
                answer = ending(result, len(job.request.prompt))
                feed.news.append(partial(self._finish, job, answer, len(step.rows)))

    def _report(self, jobs: list[Job | None], reading: Reading) -> None:
        """Tell each request of a step how far it is."""
        for i, job in enumerate(jobs):
            if job is None or not job.watched or job.withdrawn:
                continue
            progress = reading.progress(i, job)
            with self._lock:
                if not job.over:
                    self._tell(job, progress)

    def _finish(self, job: Job, answer: Finished | Failed, rows: int) -> None:
        """Hand out the answer of a job that was one of `rows`."""
        with self._lock:
            if job.over:  # withdrawn or late, meanwhile
                return
            if isinstance(answer, Failed):
                self._fail(job, answer.error)
                return
            job.over = True
            self._active.discard(job)
            self.finished += 1
            took = time.monotonic() - job.submitted
            self._seconds_per_answer += 0.1 * (took / max(1, rows) - self._seconds_per_answer)
            self._tell(job, answer)

    def _recover(self, error: BaseException, running: list[Job]) -> None:
        """After a round raised: fail the request that ran by itself, or put those that ran aside and try them one by one."""
        self._free_memory(error)
        with self._lock:
            self._crashes = 0 if running else self._crashes + 1
            if self._crashes > CRASHES or not self._device_works():
                self.broken = error
                return
            running = [job for job in running if not job.over]
            if isinstance(error, torch.OutOfMemoryError) and self.positions is not None and len(running) != 1:
                # Less from now on, but always one request.
                held = [job.positions for job in running]
                self.positions = max(3 * sum(held) // 4, *held) if held else self.positions // 2
            if len(running) == 1:
                self._fail(running[0], error)
                return
            for job in running:
                job.forwards, job.started = 0, False
            self._suspects.extend(running)

    def _device_works(self) -> bool:
        """Whether the device still computes: after some errors it answers every further call with the same one."""
        try:
            return bool(torch.ones(1, device=self.model.device).sum().item() == 1)
        except Exception:
            return False

    def _free_memory(self, error: BaseException) -> None:
        """Let go of what a failed computation holds: its tensors hang on the frames of the traceback."""
        error.__traceback__ = None
        if self.model.device.type == "cuda":
            with suppress(Exception):  # a device that is lost fails here as well
                torch.cuda.empty_cache()

    # The thread of the deadlines.

    def _keep_deadlines(self) -> None:
        while self._thread.is_alive():
            with self._lock:
                now, due = time.monotonic(), []
                for job in list(self._active):
                    if job.deadline is not None and now > job.deadline:
                        self._fail(job, Expired(job.lateness(now)))
                    elif job.deadline is not None:
                        due.append(job.deadline - now)
                silent = now - self._last_round if self._active or self._calls else 0.0
                if silent <= SILENT:
                    self._lock.wait(min([1.0, *due]))
                    continue
                self._last_round = now  # once in a while is enough
            log.warning("a round takes more than %.0f s; the decoding thread is at\n%s", silent, self._position())

    def _position(self) -> str:
        """Where the decoding thread is."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else "its end"

    # Under the lock.

    def _fail(self, job: Job, error: BaseException) -> None:
        if job.over:
            return
        self.failed += 1
        self._drop(job)
        self._tell(job, Failed(error))

    def _drop(self, job: Job) -> None:
        job.over = job.withdrawn = True
        self._active.discard(job)
        with suppress(ValueError):
            self._waiting.remove(job)
        self._lock.notify_all()

    def _tell(self, job: Job, event: Event) -> None:
        try:
            job.deliver(event)
        except Exception:  # the listener's event loop may be gone; the others go on
            log.exception("a listener failed")


def for_any_length(model: Model, config: DecodeConfig) -> DecodeConfig:
    """The config with an answer of at least one whole block, since a short default must not cut the blocks of longer
    answers, and with room for a question in a small context. A schedule keeps its pace."""
    chosen = resolve(model.spec, config)
    length = min(max(chosen.gen_length, chosen.block_length or 0), model.spec.max_length - 1)
    steps = None if chosen.steps is None else -(-chosen.steps * length // chosen.gen_length)
    return chosen.replace(gen_length=length, steps=steps)

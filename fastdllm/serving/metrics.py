# SPDX-License-Identifier: Apache-2.0
"""Figures for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from fastdllm.serving.scheduler import Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
PER_FORWARD = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Counters of one server, in a registry of their own, so that a process may hold several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("fastdllm_requests", "Requests by endpoint and status", ["endpoint", "status"], **own)
        self.prompt_tokens = Counter("fastdllm_prompt_tokens", "Tokens of answered prompts", **own)
        self.tokens = Counter("fastdllm_generated_tokens", "Tokens of finished answers, before the stop token", **own)
        self.row_forwards = Counter("fastdllm_answer_forwards", "Forwards of finished answers, each by itself", **own)
        self.first_text = Histogram("fastdllm_time_to_first_text_seconds", "From arrival to the first text that is final",
                                    buckets=SECONDS, **own)  # fmt: skip
        self.seconds = Histogram("fastdllm_request_seconds", "From arrival to the end of the answer", buckets=SECONDS, **own)
        self.per_forward = Histogram("fastdllm_tokens_per_forward", "Of a finished answer", buckets=PER_FORWARD, **own)

    def watch(self, scheduler: Scheduler) -> None:
        """Read a scheduler's own figures whenever somebody asks."""
        gauges = {
            "running": ("Requests in the batch", lambda: scheduler.running),
            "waiting": ("Requests that wait for a place", lambda: scheduler.waiting),
            "positions_in_flight": ("Positions of prompts and answers in the batch", lambda: scheduler.positions_in_flight),
            "rounds": ("Forwards of the batch so far", lambda: scheduler.forwards),
            "aborted": ("Requests withdrawn so far", lambda: scheduler.aborted),
            "failed": ("Requests that ended with an error so far", lambda: scheduler.failed),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"fastdllm_{name}", text, registry=self.registry).set_function(value)

    def finished(self, choices: list[Any], seconds: float) -> None:
        """Count the answers of one request."""
        self.seconds.observe(seconds)
        for choice in choices:
            self.prompt_tokens.inc(len(choice.prompt))
            self.tokens.inc(choice.text.tokens)
            self.row_forwards.inc(choice.result.forwards)
            self.per_forward.observe(choice.text.tokens / max(1, choice.result.forwards))

    def render(self) -> bytes:
        return generate_latest(self.registry)

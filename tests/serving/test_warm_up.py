# SPDX-License-Identifier: Apache-2.0
"""Before the first caller comes, batches of every size have run where that matters."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fastdllm
from fastdllm import DecodeConfig
from fastdllm.serving.service import Service


@pytest.mark.parametrize("together", [1, 5])
def test_answers_of_the_warm_up_end_one_after_another(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DecodeConfig(gen_length=40, decoder="quota", steps=40, stop_ids=())
    service = Service(fastdllm.load("tiny-llada"), config, rows=5).start()
    monkeypatch.setattr(service, "_together", lambda: together)
    ended, take_in = [], service.scheduler._take_in

    def watched(step: Any, feed: Any) -> None:
        ended.extend([len(step.done)] * bool(step.done))
        take_in(step, feed)

    monkeypatch.setattr(service.scheduler, "_take_in", watched)
    try:
        asyncio.run(service.warm_up())
        assert service.health == "ready"
        assert ended == [1] * sum({1, together}), "each by itself"
        assert not service.scheduler.running and not service.scheduler.waiting
    finally:
        service.close(timeout=30)


def test_it_asks_for_no_more_than_may_wait() -> None:
    service = Service(fastdllm.load("tiny-llada"), DecodeConfig(gen_length=8), rows=4, max_queue=0)
    assert service._together() == 1

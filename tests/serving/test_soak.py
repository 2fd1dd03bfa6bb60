# SPDX-License-Identifier: Apache-2.0
"""Two thousand requests, a third aborted, many malformed: no 500, no growth of memory, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import psutil
import pytest

from tests.serving.conftest import running
from tests.serving.test_server import metric, settled

REQUESTS, AT_ONCE, FIRST = 2000, 24, 500
GROWTH = 1.05


def malformed(rng: random.Random) -> bytes:
    good: dict[str, Any] = {"prompt": "Tom has", "max_tokens": 8}
    return rng.choice(
        [
            b"not json",
            b"{",
            b"\x00\x00",
            b"[" * 20_000,
            b'{"prompt": "' + b"x" * 10_000_000 + b'"}',
            b'{"prompt": "\\ud800"}',
            b'{"prompt": "a\\u0000b", "max_tokens": 4}',
            b'{"prompt": "x", "temperature": NaN}',
            json.dumps({**good, "max_tokens": -5}).encode(),
            json.dumps({**good, "max_tokens": "many"}).encode(),
            json.dumps({**good, "colour": "red"}).encode(),
            json.dumps({**good, "prompt": {"a": 1}}).encode(),
            json.dumps({**good, "prompt": [10**9]}).encode(),
        ]
    )


async def one(client: httpx.AsyncClient, number: int, rng: random.Random) -> int | None:
    """The status of one request; None if it was given up."""
    kind = rng.random()
    if kind < 0.3:
        return (await client.post("/v1/completions", content=malformed(rng), headers=JSON)).status_code
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"Tom has {number} apples. " * rng.randint(1, 4)}],
        "max_tokens": rng.choice([4, 16, 40]),
        "temperature": rng.choice([0, 0.8]),
        "seed": number,
        "threshold": rng.choice([0.5, 0.9]),
        "stream": rng.random() < 0.5,
    }
    if rng.random() < 0.2:
        body["stop"] = ["apples", "\n"]
    if rng.random() < 0.2:
        body |= {"logprobs": True, "top_logprobs": 2}
    send = client.post("/v1/chat/completions", json=body)
    if kind < 0.6:
        try:
            return (await asyncio.wait_for(send, rng.random() * 1.5)).status_code
        except asyncio.TimeoutError:
            return None
    return (await send).status_code


JSON = {"Content-Type": "application/json"}


async def soak(url: str, numbers: range, rng: random.Random) -> list[int | None]:
    limit = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def bounded(number: int) -> int | None:
            async with limit:
                return await one(client, number, rng)

        return await asyncio.gather(*(bounded(number) for number in numbers))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_thousand_requests_leave_the_server_as_it_was() -> None:
    rng = random.Random(0)
    with running("tiny-llada", "--max-batch", "16") as (url, process):
        statuses = asyncio.run(soak(url, range(FIRST), rng))
        settled(url)
        before = psutil.Process(process.pid).memory_info().rss
        statuses += asyncio.run(soak(url, range(FIRST, REQUESTS), rng))
        settled(url)
        after = psutil.Process(process.pid).memory_info().rss
        assert process.poll() is None
        assert {status for status in statuses if status is not None} <= {200, 400, 413}
        assert statuses.count(200) > REQUESTS / 3 and statuses.count(None) > REQUESTS / 20
        assert after <= before * GROWTH, f"{before / 2**20:.0f} MiB after {FIRST} requests, {after / 2**20:.0f} at the end"
        assert metric(url, "fastdllm_positions_in_flight") == 0
        assert metric(url, "fastdllm_failed") == 0

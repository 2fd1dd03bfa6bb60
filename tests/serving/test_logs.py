# SPDX-License-Identifier: Apache-2.0
"""A log that nobody reads holds nothing up."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from fastdllm.serving.logs import Unblocked
from tests.serving.conftest import serving

SMALL = 4096  # bytes of the pipe: full after some fifty requests


@contextmanager
def unread() -> Iterator[int]:
    """The end for writing of a small pipe that nobody reads."""
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, SMALL)
    try:
        yield writes
    finally:
        os.close(reads)
        os.close(writes)


def test_a_server_whose_output_nobody_reads_answers_and_ends() -> None:
    async def ask(url: str) -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            statuses = [(await client.post("/v1/completions", content=b"not json")).status_code for _ in range(200)]
            async with client.stream("POST", "/v1/completions", json={"prompt": "Tom", "stream": True}) as stream:
                assert [line async for line in stream.aiter_lines()][-2] == "data: [DONE]"
            return statuses

    with unread() as output, contextmanager(serving)(["tiny-llada", "--gen-length", "8"], 600, output) as (url, process):
        assert set(asyncio.run(ask(url))) == {400}
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0


def record(text: str, *values: object) -> logging.LogRecord:
    return logging.LogRecord("here", logging.INFO, "", 0, text, values, None)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reads, writes = os.pipe()
    yield reads, writes
    for end in (reads, writes):
        with suppress(OSError):
            os.close(end)


def test_lines_arrive_in_order_and_whole(pipe: tuple[int, int]) -> None:
    handler, parts = Unblocked(pipe[1]), []
    reader = threading.Thread(target=lambda: parts.extend(iter(lambda: os.read(pipe[0], 65536), b"")))
    reader.start()
    for number in range(3000):
        handler.emit(record("line %d \ud800 %s", number, "x" * 100))
    handler.close(60)
    os.close(pipe[1])
    reader.join(600)
    lines = b"".join(parts).decode().splitlines()
    assert lines == [f"INFO here: line {number} \\ud800 {'x' * 100}" for number in range(3000)]


def test_what_nobody_reads_is_dropped_and_counted(pipe: tuple[int, int]) -> None:
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, SMALL)
    handler = Unblocked(pipe[1], lines=10)
    for _ in range(1000):
        handler.emit(record("%s", "x" * 1000))
    parts: list[bytes] = []
    while b"dropped" not in b"".join(parts):
        parts.append(os.read(pipe[0], 65536))
    handler.close(60)
    lines = b"".join(parts).decode().splitlines()
    dropped = int(lines[-1].split(": ")[1].split()[0])
    assert dropped > 900 and len(lines) - 1 + dropped == 1000


def test_a_reader_that_is_gone_is_no_trouble(pipe: tuple[int, int]) -> None:
    handler = Unblocked(pipe[1])
    os.close(pipe[0])
    for _ in range(10):
        handler.emit(record("unheard"))
    handler.close(60)
    assert not handler._thread.is_alive()

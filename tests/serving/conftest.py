# SPDX-License-Identifier: Apache-2.0
"""A server process, a model, and a service in this process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server needs fastdllm[serve]")

import fastdllm

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "A student has 23 pencils. His sister has 7 fewer pencils than he has. How many pencils do they have together?"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


@contextmanager
def running(*arguments: str, wait: float = 100) -> Iterator[tuple[str, subprocess.Popen]]:
    """`fastdllm serve ARGUMENTS` in a process of its own, warm: (its address, the process)."""
    port = free_port()
    command = [sys.executable, "-m", "fastdllm.cli", "serve", *arguments, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + wait
        while not answers(url):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise AssertionError(process.communicate()[0].decode()[-3000:])
            time.sleep(0.2)
        yield url, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@pytest.fixture(scope="package")
def model() -> fastdllm.Model:
    return fastdllm.load("tiny-llada")


@pytest.fixture(scope="package")
def server() -> Iterator[str]:
    with running("tiny-llada", "--gen-length", "64") as (url, _):
        yield url

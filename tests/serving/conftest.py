# SPDX-License-Identifier: Apache-2.0
"""A server process, a model, and a service in this process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
def running(*arguments: str, wait: float = 600) -> Iterator[tuple[str, subprocess.Popen]]:
    """`fastdllm serve ARGUMENTS` in a process of its own, warm: (its address, the process).

    Its output goes to a file: a pipe that nobody reads fills up.
    """
    with tempfile.TemporaryFile() as output:
        yield from serving(arguments, wait, output)


def serving(arguments: Sequence[str], wait: float, output: Any) -> Iterator[tuple[str, subprocess.Popen]]:
    """As `running`, with a file or descriptor for its output."""
    port = free_port()
    command = [sys.executable, "-m", "fastdllm.cli", "serve", *arguments, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + wait
        while not answers(url):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise AssertionError(said(output))
            time.sleep(0.2)
        yield url, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def said(output: Any) -> str:
    """The end of what a server wrote to a file."""
    output.seek(0)
    return output.read().decode(errors="replace")[-3000:]


@pytest.fixture(scope="package")
def model() -> fastdllm.Model:
    return fastdllm.load("tiny-llada")


@pytest.fixture(scope="package")
def server() -> Iterator[str]:
    with running("tiny-llada", "--gen-length", "64") as (url, _):
        yield url

# SPDX-License-Identifier: Apache-2.0
"""Two replicas by Ray Serve: the same answers, and a service that outlives one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs fastdllm[ray]")

import psutil

import fastdllm
from tests.serving.conftest import QUESTION, ROOT, running
from tests.serving.test_server import post

BODY = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64}


def replicas(of: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(of.pid).children(recursive=True):
        try:
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_replica_killed_under_load_costs_no_silent_request(model: fastdllm.Model) -> None:
    expected = fastdllm.generate(model, [BODY["messages"]], gen_length=64).texts[0]
    with running("tiny-llada", "--replicas", "2", wait=300) as (url, process):
        status, answer, _ = post(url, "/v1/chat/completions", BODY)
        assert status == 200 and answer["choices"][0]["message"]["content"] == expected
        status, answer, _ = post(url, "/v1/chat/completions", {**BODY, "temperature": -1})
        assert status == 400 and answer["error"]["param"] == "temperature"
        assert len(replicas(process)) == 2

        outcomes: list[tuple[int, Any]] = []
        stop = time.monotonic() + 20

        def load() -> None:
            while time.monotonic() < stop:
                outcomes.append(_ask(url))

        threads = [threading.Thread(target=load) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(4)
        os.kill(replicas(process)[0].pid, signal.SIGKILL)
        for thread in threads:
            thread.join(200)
        assert not any(thread.is_alive() for thread in threads), "a request never ended"
        for status, text in outcomes:
            assert (status == 200 and text == expected) or 500 <= status < 600, (status, text)
        assert sum(status == 200 for status, _ in outcomes) > len(outcomes) / 2

        end = time.monotonic() + 150
        while len(replicas(process)) < 2:
            assert time.monotonic() < end, "the dead replica was not replaced"
            time.sleep(1)
        end = time.monotonic() + 100
        good = 0
        while good < 10:  # in a row
            good = good + 1 if _ask(url) == (200, expected) else 0
            assert time.monotonic() < end, "the service did not recover"
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0


def _ask(url: str) -> tuple[int, Any]:
    try:
        status, answer, _ = post(url, "/v1/chat/completions", BODY)
    except json.JSONDecodeError:
        return 500, "an error of the proxy, which is not JSON"
    return status, answer["choices"][0]["message"]["content"] if status == 200 else answer


def test_arguments_of_a_config_file_are_checked() -> None:
    code = (
        "from fastdllm.serving.ray_app import build, application, Deployed\n"
        "for bad in ({'modle': 'x'}, {'min_replicas': 3, 'max_replicas': 2}):\n"
        "    try:\n"
        "        build(bad)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
        "print(build({'model': 'tiny-llada', 'min_replicas': 1, 'max_replicas': 3}).__class__.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert "unknown argument 'modle'" in lines[0] and "min_replicas=3 must be at most max_replicas=2" in lines[1]
    assert lines[2] == "Application"

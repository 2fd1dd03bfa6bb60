# SPDX-License-Identifier: Apache-2.0
"""What every test gets: fixed seeds, no network, and uninitialised memory that shows itself.

Hangs are guarded by pytest-timeout (pyproject.toml), children of a test included: no test sets a limit of its own.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence

# Before anything imports a hub client: these are read once, at import.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Children inherit it where a shell has started the tests in the background with interruptions ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No test asserts a time, and a machine that is busy takes as long as it takes.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

_connect = socket.socket.connect


def _connect_loopback_only(self: socket.socket, address: object) -> None:
    internet = self.family in (socket.AF_INET, socket.AF_INET6)
    if internet and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"tests run without a network, but something connects to {address!r}")
    return _connect(self, address)


socket.socket.connect = _connect_loopback_only


# On a CPU the quick tests are so many of a product of parameters that any two values meet, or that each value appears.
TOGETHER = {"pairwise": 2, "each_choice": 1}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_browser = pytest.mark.skip(reason="needs a browser: apt-get install chromium")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "browser" in item.keywords and shutil.which("chromium") is None:
            item.add_marker(no_browser)
    tests = defaultdict(list)
    for item in items:
        together = min((n for mark, n in TOGETHER.items() if mark in item.keywords), default=0)
        if together and "gpu" not in item.keywords and hasattr(item, "callspec"):
            tests[item.nodeid.split("[")[0], together].append(item)
    for (test, together), of_one in tests.items():
        start = zlib.crc32(test.encode()) % len(of_one)  # each test leaves out others
        of_one = of_one[start:] + of_one[:start]
        kept = covering([[f"{name}={value!r}" for name, value in item.callspec.params.items()] for item in of_one], together)
        for index in set(range(len(of_one))) - kept:
            of_one[index].add_marker(pytest.mark.slow)


def covering(rows: Sequence[Sequence[str]], together: int) -> set[int]:
    """The indices of some rows in which any so many values appear together that do so in all of them; greedily few."""
    missing = {i: set(itertools.combinations(row, min(together, len(row)))) for i, row in enumerate(rows)}
    kept = set()
    while missing:
        best = max(missing, key=lambda i: len(missing[i]))
        kept.add(best)
        seen = set(missing[best])
        missing = {i: left for i, values in missing.items() if (left := values - seen)}
    return kept


@pytest.fixture(autouse=True)
def captured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are short: a shape's first pass is captured already."""
    monkeypatch.setattr("fastdllm.runners.cuda_graph.EAGER_FIRST", 0)


@pytest.fixture(autouse=True)
def interruptible() -> None:
    """A program that has been interrupted lets a second interruption end its process; here the process goes on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    # Not `torch.manual_seed`: without a GPU it notes the stack for each kind of device that may come, a millisecond a test.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


# torch notes its constructors when a device is first chosen in this way, and knows no others afterwards.
with torch.device("meta"):
    torch.empty(0)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        inside = sys._getframe(1).f_globals.get("__name__", "").startswith("fastdllm")
        if inside and tensor.is_floating_point() and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the package allocates uninitialised with NaN: reading it before writing fails a test."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))

# SPDX-License-Identifier: Apache-2.0
"""What the tests of the lm-eval adapters share."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

import fastdllm
from fastdllm.evaluation import answers

if find_spec("lm_eval") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def loaded_once() -> Any:
    """Every adapter of a file shares one tiny-llada."""
    model, load = fastdllm.load("tiny-llada", "cpu"), fastdllm.load
    patch = pytest.MonkeyPatch()
    patch.setattr(fastdllm, "load", lambda name, *rest, **how: model if name == "tiny-llada" else load(name, *rest, **how))
    yield
    patch.undo()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each call of `decode` was asked for."""
    calls: list[int] = []

    def counted(model: Any, requests: list, *chosen: Any, **limits: Any) -> Any:
        calls.append(len(requests))
        return decode(model, requests, *chosen, **limits)

    decode = answers.decode
    monkeypatch.setattr(answers, "decode", counted)
    return calls

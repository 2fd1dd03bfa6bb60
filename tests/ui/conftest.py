# SPDX-License-Identifier: Apache-2.0
"""One small model for every test of the chat and of the page, and the chat on lines from a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

import fastdllm
from fastdllm import Model
from fastdllm.ui import terminal
from fastdllm.ui.options import SAMPLE_QUESTION


@pytest.fixture(scope="session")
def model() -> Model:
    return fastdllm.load("tiny-llada", device="cpu")


@pytest.fixture
def question() -> str:
    return SAMPLE_QUESTION


@pytest.fixture
def chat(model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run the chat on piped lines; gives the exit code and what was written."""

    def load(name: str, **_: object) -> Model:
        if name != "tiny-llada":
            raise FileNotFoundError(f"model {name!r} is not here")
        return model

    def run(*lines: str, arguments: tuple[str, ...] = ()) -> tuple[int, str]:
        monkeypatch.setattr(fastdllm, "load", load)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode("utf-8", "surrogatepass"))))
        code = terminal.main(["--max-new-tokens", "64", *arguments])
        return code, capsys.readouterr().out

    return run

# SPDX-License-Identifier: Apache-2.0
"""One small model for every test of the chat and of the page."""

from __future__ import annotations

import pytest

import fastdllm
from fastdllm import Model
from fastdllm.ui.options import SAMPLE_QUESTION


@pytest.fixture(scope="session")
def model() -> Model:
    return fastdllm.load("tiny-llada", device="cpu")


@pytest.fixture
def question() -> str:
    return SAMPLE_QUESTION

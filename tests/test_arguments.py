# SPDX-License-Identifier: Apache-2.0
"""Every argument of every entry point, given values of any type."""

from __future__ import annotations

import inspect
import re
import warnings
from collections import UserDict
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import dream.generate
import fastdllm
import llada.generate
import v2.generation_functions
from tests.random_models import random_model


@pytest.fixture(scope="module")
def model() -> fastdllm.Model:
    return fastdllm.load("tiny-llada", device="cpu")


WILD: list[Any] = [
    *(np.array(3), np.array([[1], [2]]), np.array([object()]), np.datetime64("2020-01-01"), np.uint64(2**64 - 1)),
    *(torch.tensor(3), torch.tensor([1, 2]), torch.tensor([1.5]), torch.empty(3, 0), torch.ones(2).to_sparse()),
    *(torch.empty(3, device="meta", dtype=torch.long), torch.tensor([[1, 2]]).to_sparse(), 1j, object(), Ellipsis),
    *(Fraction(1, 2), Decimal("NaN"), b"x", memoryview(b"12"), {1: 2}, {"a" * 999: 1}, {1}, range(3), iter([1]), int),
    *(float("nan"), float("inf"), -0.0, 10**30, -1, True, "\ud800", "x" * 10_000, [[[]]], [None], UserDict(a=1)),
]


class Mute:
    """Of a class whose own methods fail."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __len__(self) -> int:
        raise RuntimeError("no len")


@pytest.mark.parametrize("value", [*WILD, Mute()], ids=lambda value: type(value).__name__)
def test_any_argument_is_taken_or_refused_in_one_short_line(model: fastdllm.Model, value: Any) -> None:
    """Every argument of every entry point, given anything: an answer, or a ValueError that can be printed."""
    question = {"name": "a", "type": "choice", "options": ["a", "b"]}
    calls: list[Callable[[], object]] = [
        lambda: fastdllm.encode(model, value),
        lambda: fastdllm.encode(model, [value]),
        lambda: fastdllm.encode(model, [[1, 2]], attention_mask=value),
        lambda: fastdllm.generate(value, "x"),
        lambda: fastdllm.generate(model, "x", value, gen_length=4),
        lambda: fastdllm.decide(model, "x", value),
        lambda: fastdllm.log_likelihoods(model, value),
        lambda: fastdllm.log_likelihoods(model, [(value, [1])], mc_num=1),
        lambda: fastdllm.load(value),
        lambda: fastdllm.register("decoder", fastdllm.DecodeConfig, name=value),
        lambda: fastdllm.register("decoder", value),
        lambda: fastdllm.PromptCache(value),
        lambda: fastdllm.hidden_states(model, value),
        lambda: fastdllm.generate(model, "x", gen_length=4, geometry=value),
    ]
    if not isinstance(value, str):  # which is a path
        calls.append(lambda: fastdllm.Trace.load(value))
    for name in ("constraints", "stop", "num_return_sequences", "progress", "trace"):
        if not (name == "num_return_sequences" and isinstance(value, int) and value > 9):
            calls.append(lambda name=name: fastdllm.generate(model, "x", gen_length=4, **{name: value}))
    for name in ("name", "type", "options", "text"):
        calls.append(lambda name=name: fastdllm.decide(model, "x", [{**question, name: value}]))
    for name in ("device", "dtype", "quantize", "block_size", "adapter", "trust_remote_code"):
        calls.append(lambda name=name: fastdllm.load("tiny-sudoku", **{"device": "cpu", name: value}))
    for option in fastdllm.DecodeConfig.__signature__.parameters:
        calls.append(lambda option=option: fastdllm.DecodeConfig(**{option: value}))
    assert not faults(calls)


PUBLISHED = [llada.generate.generate, dream.generate.diffusion_generate, v2.generation_functions.generate]


@pytest.mark.parametrize("function", PUBLISHED, ids=lambda function: function.__module__)
def test_any_argument_of_the_published_functions(function: Callable[..., object]) -> None:
    model = random_model(function.__module__.split(".")[0])
    length = "max_new_tokens" if "max_new_tokens" in inspect.signature(function).parameters else "gen_length"
    _, _, *names = inspect.signature(function).parameters
    calls: list[Callable[[], object]] = []
    for value in [*WILD, Mute()]:
        calls.append(lambda value=value: function(value, [[1, 2]], **{length: 4}))
        calls.append(lambda value=value: function(model, value, **{length: 4}))
        for name in names:
            calls.append(lambda name=name, value=value: function(model, [[1, 2]], **{length: 4, name: value}))
    assert not faults(calls)


def faults(calls: list[Callable[[], object]]) -> list[tuple[int, str]]:
    """The calls that end in another error than one short line, with what it says."""
    wrong = []
    for number, call in enumerate(calls):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            if len(text) > 2500 or "\n" in text or re.search(r"\ba (int|object|ndarray|ellipsis|Exception|array)\b", text):
                wrong.append((number, text[:300]))
        except Exception as error:
            wrong.append((number, repr(error)[:300]))
    return wrong

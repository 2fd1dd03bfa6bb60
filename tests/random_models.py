# SPDX-License-Identifier: Apache-2.0
"""The small random models of `fastdllm.testing`, and what only the tests of the engine need beside them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from fastdllm import registry, testing
from fastdllm.runners import eager
from fastdllm.store import Canvas
from fastdllm.testing import FAMILIES, MASK, STOP, VOCAB, prompts, random_model

__all__ = ["FAMILIES", "MASK", "STOP", "VOCAB", "WatchedRunner", "accepted", "prompts", "random_model", "triples"]

accepted = cache(testing.accepted)


class WatchedRunner(eager.Runner):
    """An eager runner whose canvases can be looked at."""

    def __init__(self) -> None:
        self.canvases: list[Canvas] = []

    @contextmanager
    def canvas(self, *given: Any) -> Iterator[Canvas]:
        with super().canvas(*given) as canvas:
            self.canvases.append(canvas)
            yield canvas


@cache
def triples() -> tuple[tuple[str, str, str], ...]:
    """Every (family, cache, decoder) that goes together."""
    every = itertools.product(FAMILIES, registry.names("caches"), registry.names("decoders"))
    return tuple(triple for triple in every if accepted(*triple))

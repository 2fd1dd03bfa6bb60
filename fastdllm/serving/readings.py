# SPDX-License-Identifier: Apache-2.0
"""The log-likelihood of a prompt's tokens by the chain rule, which takes a forward a token (one, in a causal model).

Clients that compare answers send one context again and again, each time with another ending, as lm-eval does. What was read
of a token depends only on those before it and on the length, so it is kept for the next prompt that begins alike.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from fastdllm.likelihood import Probe, Reading, read, token_probes

if TYPE_CHECKING:
    from fastdllm.models import Model

AT_ONCE = 16  # tokens in one forward between two rounds
KEPT = 16_384  # tokens whose readings are kept
Key = tuple[int, bytes]
Call = Callable[[Callable[[], list[Reading]]], Awaitable[list[Reading]]]


class PromptReadings:
    """Readings of prompts' tokens, the latest kept."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._kept: OrderedDict[Key, Reading] = OrderedDict()

    async def of(self, prompt: Tensor, call: Call) -> tuple[list[Reading], int]:
        """What the model says of every token of `prompt` [P] but the first, given those before it, and the forwards it took.

        call: runs work on the thread that owns the device; answers go on between two calls.
        """
        found: list[Reading | None] = []
        asked: list[tuple[int, Key, Probe]] = []
        forwards = 0

        async def ask() -> None:
            nonlocal forwards
            got = await call(lambda: self._read([probe for *_, probe in asked]))
            forwards += len(asked)
            for (at, key, _), reading in zip(asked, got, strict=True):
                found[at] = reading
                if len(reading.top) == 1:  # all tokens at once cost one forward only
                    self._keep(key, reading)
            asked.clear()

        for key, probe in self._probes(prompt):
            found.append(self._kept.get(key))
            if found[-1] is not None:
                self._kept.move_to_end(key)
                continue
            asked.append((len(found) - 1, key, probe))
            if len(asked) == AT_ONCE:
                await ask()
        if asked:
            await ask()
        return [token for reading in found if reading is not None for token in reading.each()], forwards

    def _probes(self, prompt: Tensor) -> Iterator[tuple[Key, Probe]]:
        """What to read, in order, and what names it: the canvas's length, and the tokens up to the last one read."""
        digest = hashlib.sha256(prompt[:1].cpu().numpy().tobytes())
        for probe in token_probes(self._model, prompt.cpu()):
            digest.update(probe.tokens.numpy().tobytes())
            yield (len(probe.ids), digest.digest()), probe

    def _read(self, probes: list[Probe]) -> list[Reading]:
        return [reading for _, reading in read(self._model, [(0, 0.0, probe) for probe in probes], len(probes))]

    def _keep(self, key: Key, reading: Reading) -> None:
        # Copies: as it comes a reading is a view of all that its forward read.
        self._kept[key] = Reading(*(part.clone() for part in (reading.log_prob, reading.top, reading.conf)))
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

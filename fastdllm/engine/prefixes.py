# SPDX-License-Identifier: Apache-2.0
"""Blocks that several requests' prompts begin with are computed once (`fastdllm.prompt_cache`).

Only where the cache plan keeps finished blocks for good: in a bidirectional model every key depends on all tokens, those
that are still to be written included, and so no two requests share one. The prompt's last whole block is recomputed in any
case: its output may predict the first token, and so a request takes as many forwards as without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from torch import Tensor

from fastdllm.decoding import Decoding
from fastdllm.engine.row import Request, Row
from fastdllm.memory import prompt_positions
from fastdllm.prompt_cache import ID_BYTES, PromptCache
from fastdllm.store import UNIT, Canvas

if TYPE_CHECKING:
    from fastdllm.models import Model

WORTH_A_ROUND = 64  # positions that another row is about to compute: for as many a request enters a round later


class Prefixes:
    """What a run does with a prompt cache.

    known: the run's requests where all are known; then only what two of them share is kept, and otherwise all.
    """

    def __init__(self, cache: PromptCache, model: Model, run: Decoding, known: Sequence[Request] | None) -> None:
        self.cache, self.run = cache, run
        self._tree = cache.open(model, run.block_causal)
        self._shared = None if known is None else Counter(key for r in known for key in chained(self.of(r)))

    def of(self, request: Request) -> list[bytes]:
        """The token ids of the prompt's whole blocks; none where its first pass is not the one that computes just these."""
        prompt = len(request.prompt)
        first = self.run.geometry(prompt, prompt + request.length)[0]
        work = self.run.cache.open(first)
        if work is None or (work.start, work.read) != (0, work.stop) or work.stop > prompt:
            return []
        return self._cut(request.prompt[: work.stop].cpu(), prompt)  # sync: once a request, what finds its blocks

    def _cut(self, ids: Tensor, prompt: int) -> list[bytes]:
        """ids [N] on the CPU -> those of each block that queries see or, where they see no further than themselves, of each
        UNIT. A rest that is no whole block is left out."""
        size = self.run.block_causal or UNIT
        first = prompt % size if self.run.grid_at_prompt else 0
        data = ids.numpy().tobytes()
        ends = range(first or size, len(ids) + 1, size)
        return [data[max(0, end - size) * ID_BYTES : end * ID_BYTES] for end in ends]

    def waits(self, blocks: list[bytes], live: Sequence[Row]) -> bool:
        """Whether a request should enter after the rows that have not begun yet have computed what it shares with them."""
        usable = blocks[:-1]
        common = max((in_common(usable, row.prefix) for row in live if row.cost.forwards == 0), default=0)
        common = min(common, self.cache.positions)
        return common >= WORTH_A_ROUND and common - self.cache.count(self._tree, usable) >= WORTH_A_ROUND

    def load(self, canvas: Canvas, row: Row) -> None:
        """Give a new row what is kept of its prompt."""
        lanes = range(row.place.row, row.place.row + self.run.lanes * row.place.size, row.place.size)
        row.cost.cached = row.clean = self.cache.load(self._tree, row.prefix[:-1], canvas.store, lanes)

    def keep(self, canvas: Canvas, row: Row) -> None:
        """After a forward: keep the prompt's blocks after the first one, and those of the answer after the last."""
        if row.cost.forwards == 1:
            self._keep(canvas, row, row.prefix)
        if row.finished and self._shared is None and row.clean > positions(row.prefix):
            ids = canvas.x[row.place.row, : row.clean].cpu()  # sync: once a request, what finds its blocks
            self._keep(canvas, row, self._cut(ids, len(row.request.prompt)))

    def _keep(self, canvas: Canvas, row: Row, blocks: list[bytes]) -> None:
        if self._shared is not None:
            shared = takewhile(lambda key: self._shared[key] > 1, chained(blocks))
            blocks = blocks[: sum(1 for _ in shared)]
        self.cache.keep(self._tree, blocks, canvas.store, row.place.row)


def prefixes(model: Model, run: Decoding, known: Sequence[Request] | None) -> Prefixes | None:
    """None where nothing can be shared."""
    asked = run.prompt_cache
    if asked == 0 or not run.cache.final():
        return None
    if isinstance(asked, PromptCache):
        return Prefixes(asked, model, run, None)
    if known is not None and len(known) < 2:
        return None
    return Prefixes(PromptCache(prompt_positions(model) if asked is None else asked), model, run, known)


def chained(blocks: Sequence[bytes]) -> list[int]:
    """A number for each block that depends on those before it."""
    keys: list[int] = []
    for block in blocks:
        keys.append(hash((keys[-1] if keys else 0, block)))
    return keys


def positions(blocks: Iterable[bytes]) -> int:
    return sum(map(len, blocks)) // ID_BYTES


def in_common(a: Sequence[bytes], b: Sequence[bytes]) -> int:
    """How many positions lie in the blocks that two prompts begin with in common."""
    return positions(own for own, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))

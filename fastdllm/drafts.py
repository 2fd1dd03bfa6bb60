# SPDX-License-Identifier: Apache-2.0
"""What the branches of the option `lossless` draft, and how many of them pay.

A draft is named by ranks in the scores that it is made from: (0, 1) adds the two likeliest tokens of the block to what the
row holds. Which ones come true is a matter of the model and the decoder; `scripts.studies.calibrate` measures it and writes
drafts.json next to the weights (the offline calibration of Spiffy, arXiv 2509.18085).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

Draft = tuple[int, ...]
Graph = tuple[Draft, ...]  # the drafts of the branches 1, 2, ...; each saves most steps in addition to those before it

FILE = "drafts.json"
# Of a model without the file: what was found on tiny-llada, one token per step.
DEFAULT: Graph = (
    (0,), (0, 1), (0, 1, 2), (1,), (0, 1, 2, 3), (0, 2), (0, 1, 2, 3, 4), (0, 1, 3), (2,), (0, 1, 2, 3, 4, 5), (0, 3),
    (0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 4), (3,), (0, 2, 3),
)  # fmt: skip

# What an answer of tiny-llada takes with 1, 2, ... branches: the estimate for a model without the file.
FORWARDS = (106.28, 66.04, 55.16, 50.88, 45.1, 43.0, 40.56, 39.54)
# Positions whose arithmetic takes a forward as long as reading the weights, by the kind of device: the estimate for one that
# was not measured. Lines through the times with 1, 2 and 4 branches (2026-11-30) say 286 for LLaDA-8B's shape on an H200 at
# a prompt of 128 tokens, 174 at one of 1,000, and on two CPU cores 41 for tiny-llada, 61 for tiny-fast-dllm-v2.
POSITIONS = {"cuda": 200, "cpu": 50}


def graph_of(branches: int, known: Graph = DEFAULT) -> Graph:
    """What so many branches draft: the first of the known drafts, and beyond their number ever more of the likeliest."""
    chain = tuple(tuple(range(n)) for n in range(1, branches + len(known)))
    return (*known, *(draft for draft in chain if draft not in known))[: branches - 1]


@cache
def longest(graph: Graph) -> int:
    """Steps that one forward may take: one, and one more for each draft of the longest line in which each holds the one
    before."""
    lines: dict[frozenset[int], int] = {}
    for draft in sorted(map(frozenset, graph), key=len):
        lines[draft] = 1 + max((steps for held, steps in lines.items() if held < draft), default=0)
    return 1 + max(lines.values(), default=0)


@dataclass(frozen=True)
class Calibration:
    """What was measured on a model. By decoder the drafts, and the forwards of an answer with 1, 2, ... branches; by device
    the milliseconds of a forward over a block of so many rows."""

    graphs: Mapping[str, Graph] = field(default_factory=dict)
    forwards: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    milliseconds: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Calibration:
        """What the folder of a model says; ValueError for a file that is wrong."""
        from fastdllm.models.files import present, read_object  # which import this module

        path = folder / FILE
        if not present(path):
            return cls()
        file = read_object(path)
        try:
            decoders = dict(file["decoders"])
            if any(rank < 0 for d in decoders.values() for draft in d["drafts"] for rank in draft):
                raise ValueError("a rank below 0")
            return cls(
                {name: tuple(tuple(map(int, draft)) for draft in d["drafts"]) for name, d in decoders.items()},
                {name: tuple(map(float, d["forwards"])) for name, d in decoders.items()},
                {device: {int(n): float(ms) for n, ms in t.items()} for device, t in file.get("milliseconds", {}).items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: not a file of scripts.studies.calibrate ({type(error).__name__}: {error})") from error

    def graph(self, decoder: str, branches: int) -> Graph:
        return graph_of(branches, self.graphs.get(decoder, DEFAULT))

    def best(self, decoder: str, device: str, kind: str, rows: int, positions: int, block: int) -> int:
        """How many branches take an answer the least time.

        decoder: as it was measured; quota at one token per step, for which there is an estimate besides.
        device, kind: its name and type; without measurements of that device by an estimate for the type.
        rows: requests at once.
        positions: of a forward of one row.
        block: positions of a block, over which forwards were timed.

        Raises ValueError for another decoder of which this model has no measurements.
        """
        known, table = self.forwards.get(decoder, FORWARDS if decoder == "quota" else None), self.milliseconds.get(device)
        if known is None:
            raise ValueError(
                f"lossless=0 chooses by measurements, and {FILE} has none of decoder {decoder!r}; "
                f"python -m scripts.studies.calibrate takes them"
            )

        def cost(branches: int) -> float:
            at_once = rows * branches * positions
            return milliseconds(table, at_once / block) if table else POSITIONS.get(kind, POSITIONS["cpu"]) + at_once

        return min(range(1, len(known) + 1), key=lambda n: known[n - 1] * cost(n))


def milliseconds(table: Mapping[int, float], rows: float) -> float:
    """Of a forward of so many rows, between and beyond what was measured along straight lines."""
    known = sorted(table)
    if len(known) == 1 or rows <= known[0]:
        return table[known[0]]
    low, high = next((pair for pair in pairwise(known) if rows <= pair[1]), tuple(known[-2:]))
    return table[low] + (table[high] - table[low]) * (rows - low) / (high - low)

# SPDX-License-Identifier: Apache-2.0
"""Which card holds which model: weights and keys and values, computed from the published shapes; and what was measured.

    python -m scripts.studies.memory               # write docs/memory.md
    python -m scripts.studies.memory --check       # exit 1 if it is not up to date

Nothing is allocated: networks are made on torch's meta device, and the bytes of their tensors are added up. What was
measured stands in docs/memory.json, whose field `command` says how.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdllm import whole
from fastdllm.arguments import Parser
from fastdllm.kernels.experts.reference import CHUNK
from fastdllm.models.spec import ModelSpec
from fastdllm.models.transformer import Transformer
from fastdllm.shell import one_line
from scripts.benchmarks.decode import SHAPES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
GIB = 2**30
MEASURED = PAGE.with_suffix(".json")
VERSIONS = ("0.1", "0.2")
NAMES = {"llada": "LLaDA-8B", "dream": "Dream-7B", "v2": "Fast-dLLM-v2-7B"}
NAMES |= {"llada_moe": "LLaDA-MoE-7B-A1B", "llada2_moe": "LLaDA2.1-mini"}
KINDS = ("bf16", "fp8", "int4")
CARDS = (12, 16, 24, 40, 80, 141)  # GiB, as the cards are sold
RESERVE = 1.5  # GiB left for the driver and captured graphs
BF16 = 2  # bytes
ROW = 1280  # positions of the request that the table counts in: a prompt of 1,000 tokens and 256 new ones, rounded up


@dataclass(frozen=True)
class Need:
    """What a model takes, in bytes: all weights; for a position, its keys and values, and a forward's tensors; and what a
    forward takes besides, however many positions it has."""

    weights: int
    position: int
    forward: int
    once: int

    def rows(self, card: float) -> int:
        """How many requests of ROW positions a card of so many GiB holds; negative if not even the weights."""
        return int((card - RESERVE) * GIB - self.weights - self.once) // ((self.position + self.forward) * ROW)


def linear_bytes(rows: int, columns: int, kind: str) -> int:
    """Of a projection's weight and scales, as `fastdllm.kernels.quantize_weight` lays them out."""
    if kind == "bf16":
        return rows * columns * BF16
    if kind == "int4":
        return rows * (-(-columns // 256) * 128 + -(-columns // 128) * 2 * BF16)
    return rows * (columns + 4)


def need(spec: ModelSpec, kind: str) -> Need:
    network = Transformer(spec, torch.bfloat16, "meta")  # takes no memory
    weights, inside = 0, 0
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            of_head = "fp8" if kind == "int4" else kind  # a head takes 8 bits then
            rows, columns = module.weight.shape
            weights += linear_bytes(rows, columns, of_head if name == "head" else kind)
            inside += module.weight.numel()
    weights += sum(p.nbytes for p in network.parameters()) - inside * BF16
    # Twice what goes in and out of a layer's projections: so much a batch of 32 was measured to take beyond its store.
    # Experts get a copy of each position for every one of them that works for it, and give one back.
    copies = 2 * spec.experts.active if spec.experts else 0
    inner = max(spec.working(i) for i in range(spec.layers))
    forward = 2 * (2 * inner + (4 + copies) * spec.width) * BF16
    position = 2 * spec.layers * spec.kv_heads * spec.head_dim * BF16
    once = 0
    if spec.experts and kind != "bf16":  # all experts compute, and a weight that is not in 8 bits of a float is widened
        whole = max(spec.inner(i) for i in range(spec.layers))
        once = (3 * CHUNK * whole + (0 if kind == "fp8" else 2 * whole * spec.width)) * BF16
    return Need(weights, position, forward, once)


def measured() -> str:
    """The rows of docs/memory.json as a table, a column for each version of this package."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["peak"]
    lines = [["weights", "batch", "prompt", *(f"version {version}" for version in VERSIONS)], ["---"] * (3 + len(VERSIONS))]
    for row in rows:
        peaks = [f"{row[version]} GiB" if version in row else "" for version in VERSIONS]
        lines.append([row["weights"], str(row["batch"]), f"{row['prompt']:,}", *peaks])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page() -> str:
    needs = {(name, kind): need(SHAPES[name][0].spec(SHAPES[name][1], {}), kind) for name in NAMES for kind in KINDS}
    weights = "\n".join(
        f"| {title} | {' | '.join(f'{needs[name, kind].weights / GIB:.1f} GiB' for kind in KINDS)}"
        f" | {1000 * needs[name, 'bf16'].position / 2**20:.0f} MiB | {ROW * needs[name, 'bf16'].position / 2**20:.0f} MiB"
        f" | {ROW * needs[name, 'bf16'].forward / 2**20:.0f} MiB |"
        for name, title in NAMES.items()
    )
    cards = "\n".join(
        f"| {title} | {kind} | {' | '.join(str(max(0, needs[name, kind].rows(card))) for card in CARDS)} |"
        for name, title in NAMES.items()
        for kind in KINDS
    )
    return f"""<!-- Written by `python -m scripts.studies.memory`. -->
# Memory

This page is computed from the published shapes. Only its last section was measured.

## Weights, and what a request adds

Keys and values are kept in bf16 for every position of a request, prompt and answer. A request of the table has {ROW:,}
positions: a prompt and its answer. The last column is what a forward over all of them needs for its tensors.

| model | {" | ".join(f"weights, {kind}" for kind in KINDS)} | per 1,000 positions | per request | forward |
|---|{"---|" * (len(KINDS) + 3)}
{weights}

int8 takes the room of fp8. LLaDA keeps keys and values for every head; in Dream and v2 seven heads share them, in
LLaDA2.1 four. A mixture of experts keeps all of them in memory, although few work for a token.

## Which card holds which model

The table says how many such requests fit together (`batch_size`), by the GiB of the card; 0 means that not even one does.
{RESERVE} GiB are left for the driver and captured graphs. A batch may refresh all of its rows in one forward, so each
request also needs room for a forward's tensors.

| model | weights | {" | ".join(f"{card} GiB" for card in CARDS)} |
|---|---|{"---|" * len(CARDS)}
{cards}

fp8 needs Hopper or later; on other cards read its rows as int8.

## Measured

This is the peak of the allocator for LLaDA-8B's shape with random weights on one H200 (`docs/memory.json`):

{measured()}

What is not weights, keys or values belongs to the opening pass of a batch, whose activations grow with the positions that
it recomputes.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    args = parser.parse_args(arguments)
    if args.check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    whole.write_text(PAGE, page())
    return 0


if __name__ == "__main__":
    with one_line("memory"):
        sys.exit(main())

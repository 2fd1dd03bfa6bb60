# SPDX-License-Identifier: Apache-2.0
"""What a run cost and what it gave, counted the same way everywhere.

Tokens are generated ids before the first stop token. The prompt, the stop token and text that was tokenised again do not
count. A stop string ends decoding with its block, whose ids were generated and count. Forwards are counted per sample, as a
run of only that sample would count them. Under guidance one forward runs each sample twice, with and without its prompt: it
is one forward, and its positions count twice. Seconds end after a host read, so the device is done.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastdllm.engine import Result, Step


@dataclass
class Stats:
    """The figures of a run.

    forwards: model calls of the whole batch.
    seconds: of decoding only, by the clock.
    row_forwards: model calls of each sample.
    row_positions: positions that they recomputed.
    row_layer_tokens: those positions times the layers that ran for them.
    row_cached: positions of each prompt that were not recomputed, because an earlier one began alike.
    row_tokens: tokens of each answer.
    peak_memory: the most bytes that were allocated on the CUDA device; None elsewhere.
    """

    forwards: int = 0
    seconds: float = 0.0
    row_forwards: list[int] = field(default_factory=list)
    row_positions: list[int] = field(default_factory=list)
    row_layer_tokens: list[int] = field(default_factory=list)
    row_cached: list[int] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)
    peak_memory: int | None = None

    @property
    def samples(self) -> int:
        return len(self.row_tokens)

    @property
    def tokens(self) -> int:
        return sum(self.row_tokens)

    @property
    def nfe(self) -> float:
        """Forwards per sample."""
        return sum(self.row_forwards) / max(1, self.samples)

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(1, sum(self.row_forwards))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def take(self, step: Step) -> None:
        """Count a forward."""
        self.forwards += 1
        self.seconds += step.seconds

    def finish(self, result: Result, tokens: int) -> None:
        """Take in a finished sample of so many tokens."""
        self.row_tokens.append(tokens)
        self.row_forwards.append(result.forwards)
        self.row_positions.append(result.positions)
        self.row_layer_tokens.append(result.layer_tokens)
        self.row_cached.append(result.cached)

    def add(self, other: Stats) -> None:
        """Take in another run's figures."""
        self.forwards += other.forwards
        self.seconds += other.seconds
        self.row_forwards += other.row_forwards
        self.row_positions += other.row_positions
        self.row_layer_tokens += other.row_layer_tokens
        self.row_cached += other.row_cached
        self.row_tokens += other.row_tokens
        peaks = [p for p in (self.peak_memory, other.peak_memory) if p is not None]
        self.peak_memory = max(peaks) if peaks else None

    def summary(self) -> dict[str, Any]:
        """The figures that reports print."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "forwards": self.forwards,
            "nfe": self.nfe,
            "tokens_per_forward": self.tokens_per_forward,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "positions": sum(self.row_positions),
            "layer_tokens": sum(self.row_layer_tokens),
            "cached_positions": sum(self.row_cached),
            "peak_memory": self.peak_memory,
        }

    def line(self) -> str:
        """The figures in one line, for logs."""
        return (
            f"{self.samples} answers, {self.tokens} tokens in {self.seconds:.1f} s: {self.tokens_per_second:.1f} tokens/s, "
            f"{self.nfe:.1f} forwards per sample, {self.tokens_per_forward:.2f} tokens per forward"
        )

    def to_json(self) -> str:
        return json.dumps({**asdict(self), **self.summary()})


def peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

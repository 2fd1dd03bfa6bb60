# SPDX-License-Identifier: Apache-2.0
"""Threshold that falls as the block fills (Streaming-dLLM, arXiv 2601.17917): more context asks less of a token."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from fastdllm import kernels
from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """Fewer forwards than `threshold` at 0.9, for some accuracy."""

    threshold: Annotated[float, "Probability that is asked for when all is masked."] = 0.9
    alpha: Annotated[float, "Share of it that is gone when nothing is masked (paper: 0.3 to 0.6)."] = 0.3

    per_request = ("threshold", "alpha")

    def __post_init__(self) -> None:
        for name in ("threshold", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")

    def step(self, view: View) -> Tensor:
        left = view.masked.sum(1) / view.initial.clamp(min=1)
        value = view.rows(self.threshold) * (1 - view.rows(self.alpha) * (1 - left))
        return kernels.accept(view.ids, view.top, view.conf, view.masked, "threshold", value)

# SPDX-License-Identifier: Apache-2.0
"""Draft and verify (FreeDave, arXiv 2510.00294): the tokens of one-token-per-step decoding, in fewer forwards.

The logits that commit one token also suggest the next ones. One forward runs several drafts together with the block,
and each draft that one token per step would write gives one more step. It is the option `lossless` over one token per step.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fastdllm import kernels
from fastdllm.decoders.base import DecoderRule
from fastdllm.drafts import Graph, graph_of
from fastdllm.fields import Bounds
from fastdllm.lossless import Lossless
from fastdllm.view import View


@dataclass(frozen=True)
class Single(DecoderRule):
    """One token per step."""

    probability = False

    def step(self, view: View) -> Tensor:
        return kernels.accept(view.ids, view.top, view.conf, view.masked, "quota", torch.ones_like(view.conf[:, 0]))


@dataclass(frozen=True)
class Decoder(Lossless):
    """The tokens of one token per step in fewer forwards, where a forward is bound by memory (preset exact)."""

    depth: Annotated[
        int, "Branches per row; 1 is one token per step, 0 as many as pay.", Bounds(0, at_most="block_length")
    ] = 4

    inner = Single()

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"depth={self.depth} must be at least 0")

    @property
    def branches(self) -> int:  # type: ignore[override]
        return self.depth

    @property
    def graph(self) -> Graph:  # type: ignore[override]
        return graph_of(self.depth)

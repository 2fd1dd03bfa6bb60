# SPDX-License-Identifier: Apache-2.0
"""Credit (CreditDecoding, arXiv 2510.06133): a token that keeps being the most likely one gains and is committed sooner.

Each masked position keeps a credit per token, which fades from step to step and grows for the most likely one. Its logarithm
is added to the logits, and another rule decides on the sum; confidences are those of the sum.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fastdllm.decoders import factor, frechet, threshold
from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View

RULES = {"threshold": threshold.Decoder, "factor": factor.Decoder, "frechet": frechet.Decoder}


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """In place of a threshold: a token that stays the likeliest is committed sooner."""

    level: Annotated[float, "First option of the rule that decides."] = 0.9
    rule: Annotated[str, "Rule that decides: threshold, factor or frechet."] = "threshold"
    alpha: Annotated[float, "Weight of the credit."] = 0.7
    gamma: Annotated[float, "Exponent of the confidence that is credited."] = 0.2
    beta: Annotated[float, "Share of the credit kept from step to step."] = 0.8

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r} is unknown; allowed are {', '.join(RULES)}")
        if self.alpha < 0 or self.gamma < 0:
            raise ValueError(f"alpha={self.alpha} and gamma={self.gamma} must be at least 0")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} must lie in [0, 1]")
        RULES[self.rule](self.level)

    def state(self, width: int, vocab: int, device: torch.device, rows: int) -> dict[str, Tensor]:
        return {"credit": torch.zeros(rows, width, vocab, device=device)}

    def adjust(self, view: View, logits: Tensor) -> Tensor:
        kept = view.state["credit"][view.row] * self.beta
        kept = kept.masked_fill((view.step == 0)[:, None, None], 0)
        gain = (view.conf**self.gamma).masked_fill(~view.masked, 0)
        credit = kept.scatter_add(2, view.top[..., None], gain[..., None])
        view.state["credit"][view.row] = credit
        return logits + self.alpha * credit.log1p()

    def step(self, view: View) -> Tensor:
        return RULES[self.rule](self.level).step(view)

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
from fastdllm.fields import shown
from fastdllm.view import View

RULES = {"threshold": threshold.Decoder, "factor": factor.Decoder, "frechet": frechet.Decoder}


def decider(rule: str, level: float | Tensor) -> DecoderRule:
    """The rule of that name with `level`, a number or the rows' own [R, 1], as its first option."""
    chosen = RULES[rule]()
    return chosen._with({chosen.per_request[0]: level})


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """In place of a threshold: a token that stays the likeliest is committed sooner."""

    level: Annotated[float, "First option of the rule that decides."] = 0.9
    rule: Annotated[str, "Rule that decides: threshold, factor or frechet."] = "threshold"
    alpha: Annotated[float, "Weight of the credit."] = 0.7
    gamma: Annotated[float, "Exponent of the confidence that is credited."] = 0.2
    beta: Annotated[float, "Share of the credit kept from step to step."] = 0.8

    per_request = ("level", "alpha", "gamma", "beta")

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule={shown(self.rule)} is unknown; allowed are {', '.join(RULES)}")
        if self.alpha < 0 or self.gamma < 0:
            raise ValueError(f"alpha={self.alpha} and gamma={self.gamma} must be at least 0")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} must lie in [0, 1]")
        RULES[self.rule](self.level)

    def state(self, width: int, vocab: int, device: torch.device, rows: int) -> dict[str, Tensor]:
        return {"credit": torch.zeros(rows, width, vocab, device=device)}

    def adjust(self, view: View, logits: Tensor) -> Tensor:
        alpha, gamma, beta = (view.rows(number)[:, None] for number in (self.alpha, self.gamma, self.beta))
        kept = view.state["credit"][view.slot] * beta[..., None]
        kept = kept.masked_fill((view.step == 0)[:, None, None], 0)
        gain = (view.conf**gamma).masked_fill(~view.masked, 0)
        credit = kept.scatter_add(2, view.top[..., None], gain[..., None])
        view.state["credit"][view.slot] = credit
        return logits + alpha[..., None] * credit.log1p()

    def step(self, view: View) -> Tensor:
        return decider(self.rule, self.level).step(view)

# SPDX-License-Identifier: Apache-2.0
"""Factor rule (Fast-dLLM, arXiv 2505.22618): commit the n most confident, n the largest with (n + 1)(1 - c_n) < factor.

The published code differs from the paper: it also commits the last masked position when only that one fails, and accepts
equality. `factor_rule="published"` does the same, for results that must equal the published ones.
"""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from fastdllm import kernels
from fastdllm.decoders.base import DecoderRule
from fastdllm.fields import shown
from fastdllm.view import View

RULES = {"paper": "factor", "published": "factor_published"}


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """In place of a threshold: the more tokens at once, the surer each must be."""

    factor: Annotated[float, "Bound on the expected number of wrong commits, above 0."] = 1.0
    factor_rule: Annotated[str, "The rule of the paper or of the published code: paper, published."] = "paper"

    per_request = ("factor",)

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"factor={self.factor} must be above 0")
        if self.factor_rule not in RULES:
            raise ValueError(f"factor_rule={shown(self.factor_rule)} is unknown; allowed are {', '.join(RULES)}")

    def step(self, view: View) -> Tensor:
        rule = RULES[self.factor_rule]
        return kernels.accept(view.ids, view.top, view.conf, view.masked, rule, view.rows(self.factor))

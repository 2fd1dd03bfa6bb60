# SPDX-License-Identifier: Apache-2.0
"""Adaptive block ends (AdaBlock, arXiv 2509.26432): finish a line before going on to the next one.

Within the block of fixed size, only the positions up to the next likely delimiter may be committed; when they are, the next
end is chosen. Another rule decides among them. The paper also refreshes the cache at each such end; here that stays with the
blocks of the cache, so that every shape is static.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from fastdllm.decoders.base import DecoderRule
from fastdllm.decoders.credit import RULES, decider
from fastdllm.fields import shown
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """Answers in lines: a line is finished before the next one is begun.

    delimiters: token ids that end a part (`build.py` fills in the newline).
    """

    delimiters: tuple[int, ...]
    level: Annotated[float, "First option of the rule that decides."] = 0.9
    rule: Annotated[str, "Rule that decides: threshold, factor or frechet."] = "threshold"
    ahead: Annotated[float, "Share of the block in which an end is looked for."] = 0.25
    delimiter_probability: Annotated[float, "From which a delimiter counts (paper: 0.3 for LLaDA, 0.5 for Dream)."] = 0.3

    per_request = ("level", "delimiter_probability")

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule={shown(self.rule)} is unknown; allowed are {', '.join(RULES)}")
        if not 0 < self.ahead <= 1:
            raise ValueError(f"ahead={self.ahead} must lie in (0, 1]")
        if self.delimiter_probability < 0:
            raise ValueError(f"delimiter_probability={self.delimiter_probability} must be at least 0")
        RULES[self.rule](self.level)

    def state(self, width: int, vocab: int, device: torch.device, rows: int) -> dict[str, Tensor]:
        return {"end": torch.full((rows,), width, device=device)}

    def step(self, view: View) -> Tensor:
        width = view.ids.shape[1]
        slot = torch.arange(width, device=view.ids.device)
        end = view.state["end"][view.slot]
        done = (view.step == 0) | ~(view.masked & (slot < end[:, None])).any(1)
        first = view.masked.long().argmax(1)[:, None]
        ends = view.masked & (slot < first + max(1, int(self.ahead * width)))
        ends = ends & torch.stack([view.top == i for i in self.delimiters or (-1,)]).any(0)
        likely, at = view.conf.masked_fill(~ends, -1).max(1)
        end = torch.where(done, torch.where(likely >= view.rows(self.delimiter_probability), at + 1, width), end)
        # Where an opening pass gives only the block's first token, it says nothing of the block's end: one step later.
        blind = (view.step == 0) & (view.masked.sum(1) < view.initial)
        view.state["end"][view.slot] = torch.where(blind, 0, end)
        return decider(self.rule, self.level).step(replace(view, masked=view.masked & (slot < end[:, None])))

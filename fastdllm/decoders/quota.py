# SPDX-License-Identifier: Apache-2.0
"""A fixed number of tokens per step, the most confident first (LLaDA's low-confidence remasking, arXiv 2502.09992).

Dream decodes so as well. One token per step is the reference for all other decoders.

Every block takes an even share of `steps`, and what a division leaves is left out. Passes that open a block come on top
where they commit nothing, as in families that read in blocks. So does Dream's first token of a block that has one step.
"""

from dataclasses import dataclass

from torch import Tensor

from fastdllm import kernels
from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """A fixed number of forwards; one token per step is the reference for all others.

    counts: [masks + 1, steps] float; counts[n, i] tokens are committed in step i of a block that opened with n masks (see
    `schedules.py`; `build.py` fills it in).
    """

    counts: Tensor

    probability = False

    def step(self, view: View) -> Tensor:
        count = self.counts[view.initial, view.step.clamp(max=self.counts.shape[1] - 1)]
        return kernels.accept(view.ids, view.top, view.conf, view.masked, "quota", count)

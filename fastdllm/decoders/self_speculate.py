# SPDX-License-Identifier: Apache-2.0
"""Linear self-speculation (Nemotron-Labs-Diffusion, arXiv 2607.05722): the tokens of autoregressive decoding, in fewer
forwards.

A pass in both directions drafts all tokens of a block at once. A pass over the same tokens from left to right says what the
model takes after each of them. The drafts stay up to the first that it does not take. There its own token stands, and the
next block begins after it. Each pair of passes gains a token at least and a whole block at best. With blocks of one token
nothing can be drafted, and this is autoregressive decoding. Where tokens are drawn they come from the distribution that
autoregressive decoding draws from, whatever was drafted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View


@dataclass(frozen=True)
class Decoder(DecoderRule):
    """Nemotron: the tokens of autoregressive decoding with the same weights, in fewer forwards."""

    drafts = True
    probability = False

    def step(self, view: View) -> Tensor:
        drafted = torch.where(view.masked, view.top, view.ids)
        if view.causal is None:
            return drafted
        refused = (view.masked & (view.ids != view.top)).long()
        after_one = refused.cumsum(1) > refused
        return drafted.masked_fill(view.causal[:, None] & view.masked & after_one, view.mask_id)

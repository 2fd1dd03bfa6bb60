# SPDX-License-Identifier: Apache-2.0
"""A decoding rule of your own, without touching the package: python examples/custom_decoder.py

A rule sees the scores of a block's masks and says which tokens are committed. This one commits what is nearly as sure as the
surest token, where a threshold asks for a fixed probability.
"""

from dataclasses import dataclass

from torch import Tensor

import fastdllm
from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View


@dataclass(frozen=True)
class Relative(DecoderRule):
    """Commit every token whose probability reaches `ratio` times the best one of the block."""

    ratio: float = 0.95

    def step(self, view: View) -> Tensor:
        scores = view.scores()
        return view.commit(scores >= self.ratio * scores.amax(1, keepdim=True))


model = fastdllm.load("tiny-llada")
question = "A student has 23 pencils. His sister has 7 fewer pencils than he has. How many pencils do they have together?"
conversation = [{"role": "user", "content": question}]

for ratio in (0.9, 0.99):
    out = fastdllm.generate(model, conversation, decoder=Relative(ratio), gen_length=64)
    print(f"ratio {ratio}: {out.stats.forwards} forwards, ends with {out.texts[0][-7:]!r}")

fastdllm.register("decoders", Relative)  # from here on a name like any other, also for the chat and the evaluation
out = fastdllm.generate(model, conversation, decoder="relative", ratio=0.95, gen_length=64)
print(f"by name: {out.stats.forwards} forwards, ends with {out.texts[0][-7:]!r}")

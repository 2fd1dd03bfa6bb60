# SPDX-License-Identifier: Apache-2.0
"""The loops of Nemotron-Labs-Diffusion (arXiv 2607.05722), one prompt at a time, greedy.

Prompt and finished blocks are read causally, and the last row of such a pass gives the next token. Sources: the published
`generate_with_prefix_cache_block_diff` with its causal context, `ar_generate` and `linear_spec_generate`. What those leave
out of their counts is counted here (the prompt's pass), and what they waste is left out (the last block's pass, drafts
beyond the answer's end).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.network import PlainNetwork, append_to

Past = dict[int, tuple[Tensor, Tensor]]


class Reader:
    """Reads tokens causally, keeps their keys and values, and says what follows each of them."""

    def __init__(self, net: PlainNetwork) -> None:
        self.net = net
        self.past: Past = {}
        self.length = 0

    def read(self, ids: Tensor) -> Tensor:
        """Logits [W, V] of what follows each of ids [W]."""
        new: Past = {}
        logits = self.net(ids, self.length, append_to(self.past, new), causal=True)
        self.past, self.length = new, self.length + len(ids)
        return logits

    def look(self, ids: Tensor) -> Tensor:
        """Logits [W, V] of a block in both directions after what was read, which is not kept."""
        return self.net(ids, self.length, append_to(self.past))

    def crop(self, length: int) -> None:
        self.past, self.length = {i: (k[:length], v[:length]) for i, (k, v) in self.past.items()}, length


def generate(
    net: PlainNetwork, prompt: Tensor, *, length: int, block_size: int, steps: int | None = None, threshold: float = 0.9
) -> tuple[list[int], int]:
    """Block diffusion. steps: a block's steps, which divide its masks evenly, the first ones taking one more; without, all
    tokens from `threshold` on and always the best. Returns the sequence and the forwards."""
    before, reader = net.forwards, Reader(net)
    x, new = prompt, prompt
    while len(x) < len(prompt) + length:
        size = min(block_size, len(prompt) + length - len(x))
        block = torch.full((size,), net.spec.mask_id)
        block[0] = reader.read(new)[-1].argmax()
        masked = torch.arange(size) > 0
        count = size - 1
        quotas = None if steps is None else [count // steps + (i < count % steps) for i in range(steps)]
        while masked.any():
            prob, token = reader.look(block).softmax(-1).max(-1)
            order = sorted((i for i in range(size) if masked[i]), key=lambda i: -float(prob[i]))
            chosen = order[: quotas.pop(0)] if quotas else [i for i in order if prob[i] >= threshold] or order[:1]
            for i in chosen:
                block[i], masked[i] = token[i], False
        x, new = torch.cat([x, block]), block
    return x.tolist(), net.forwards - before


def autoregressive(net: PlainNetwork, prompt: Tensor, *, length: int) -> tuple[list[int], int]:
    before, reader, x, new = net.forwards, Reader(net), prompt, prompt
    for _ in range(length):
        new = reader.read(new)[-1:].argmax(-1)
        x = torch.cat([x, new])
    return x.tolist(), net.forwards - before


def self_speculate(net: PlainNetwork, prompt: Tensor, *, length: int, block_size: int) -> tuple[list[int], int, int]:
    """Linear self-speculation. Returns the sequence, the forwards, and how many prefixes were accepted."""
    before, reader, accepted = net.forwards, Reader(net), 0
    total = len(prompt) + length
    x = torch.cat([prompt, reader.read(prompt)[-1:].argmax(-1)])
    while len(x) < total:
        size = min(block_size, total - len(x))
        block = torch.full((size,), net.spec.mask_id)
        block[0] = x[-1]
        if size > 1:
            block[1:] = reader.look(block).argmax(-1)[1:]
        taken = reader.read(block).argmax(-1)
        agree = int((block[1:] == taken[:-1]).long().cumprod(0).sum())
        x = torch.cat([x, taken[: agree + 1]])
        reader.crop(len(x) - 1)
        accepted += 1
    return x.tolist(), net.forwards - before, accepted

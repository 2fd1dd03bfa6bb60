# SPDX-License-Identifier: Apache-2.0
"""Parallel speculative decoding (arXiv 2605.15609) as a plain loop over a model without a shift, one prompt at a time.

Every draft gets a forward of its own; only the first of a round is counted, since the engine runs all of them in one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.network import PlainNetwork, keep, replace_in

Past = dict[int, tuple[Tensor, Tensor]]


def predict(net: PlainNetwork, x: Tensor, start: int, block: Tensor, past: Past | None) -> tuple[Tensor, Tensor, list[int]]:
    """Confidence and top token of each position of the block, and its masks in falling confidence. past: keys and values of
    the canvas x, which the block's first forward fills; None without a cache."""
    stop = start + len(block)
    if past:
        logits = net(block, start, replace_in({layer: (k.clone(), v.clone()) for layer, (k, v) in past.items()}, start))
    else:
        whole = torch.cat([x[:start], block, x[stop:]])
        logits = (net(whole) if past is None else net(whole, 0, keep(past)))[start:stop]
    prob, top = logits.softmax(-1).max(-1)
    return prob, top, sorted((block == net.spec.mask_id).nonzero()[:, 0].tolist(), key=prob.neg().tolist().__getitem__)


def generate(
    net: PlainNetwork, prompt: Tensor, *, cache: str, level: float, branches: int, gen_length: int, block_length: int
) -> tuple[list[int], int, list[float]]:
    """cache: "none" or "dual". Returns the sequence, the rounds and the answer's log-probabilities."""
    mask = net.spec.mask_id
    x = torch.cat([prompt, torch.full((gen_length,), mask)])
    logprob, rounds = torch.zeros(len(x)), 0
    for start in range(len(prompt), len(x), block_length):
        stop = min(start + block_length, len(x))
        drafts: list[Tensor] = []
        past: Past | None = {} if cache == "dual" else None
        while (x[start:stop] == mask).any():
            rounds += 1
            block = x[start:stop].clone()
            prob, top, order = predict(net, x, start, block, past)
            for draft in drafts:
                new = [i for i in order if draft[i] != mask]
                if not new or any(draft[i] != top[i] for i in new):
                    break
                logprob[[start + i for i in new]] = prob[new].log()
                block = draft
                prob, top, order = predict(net, x, start, block, past)
            sure = order[: max(1, sum(float(prob[i]) >= level for i in order))]
            for i in sure:
                block[i], logprob[start + i] = top[i], prob[i].log()
            drafts = [block.clone() for _ in range(1, branches)]
            for depth, draft in enumerate(drafts, 1):
                for i in order[len(sure) : len(sure) + depth]:
                    draft[i] = top[i]
            x[start:stop] = block
    return x.tolist(), rounds, logprob[len(prompt) :].tolist()

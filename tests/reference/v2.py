# SPDX-License-Identifier: Apache-2.0
"""The loop of Fast-dLLM v2 (arXiv 2509.26328), one prompt at a time, greedy.

Whole blocks of the prompt are committed first; each block is decoded sub-block by sub-block and committed when it is full,
and the commit's last logit gives the next block's first token. Decoding ends once a stop token has no mask before it.
Left out of the published behaviour are its defects: a prompt of exactly one block without context, and predicted masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.network import PlainNetwork, append_to, replace_in


def shifted(logits: Tensor) -> Tensor:
    return torch.cat([logits[:1], logits[:-1]])


def generate(
    net: PlainNetwork,
    prompt: Tensor,
    *,
    mode: str = "none",
    blocks: int = 1,
    block_size: int = 32,
    small_block_size: int = 8,
    threshold: float = 0.9,
    stop: int = -1,
) -> tuple[list[int], int]:
    """mode: "none" recomputes all, "prefix" keeps finished blocks, "dual" adds the sub-block cache. `blocks` is how many
    blocks are completed. Returns the sequence up to the stop token and the forwards."""
    mask, before, past = net.spec.mask_id, net.forwards, {}
    x = prompt.clone()

    def answer_ended() -> bool:
        answer = x[len(prompt) :].tolist()
        return stop in answer and mask not in answer[: answer.index(stop)]

    def finished() -> tuple[list[int], int]:
        ids = x.tolist()
        if answer_ended():
            ids = ids[: len(prompt) + ids[len(prompt) :].index(stop) + 1]
        return ids, net.forwards - before

    def commit(start: int, end: int) -> Tensor:
        """The next token's logits, after the blocks of [start, end) became clean."""
        if mode == "none":
            return net(x[:end])[-1]
        new: dict = {}
        logits = net(x[start:end], start, append_to(past, new))
        past.update(new)
        return logits[-1]

    whole = len(x) // block_size * block_size
    if whole:
        logits = commit(0, whole)
        if len(x) == whole:
            x = torch.cat([x, logits.argmax()[None]])
            if answer_ended():
                return finished()
    for done in range(blocks):
        start = whole + done * block_size
        end = start + block_size
        x = torch.cat([x, torch.full((end - len(x),), mask)])
        block_past: dict = {}
        for a in range(start, end, small_block_size):
            b = a + small_block_size
            # A mask id inside the prompt is text, so the answer alone is looked at.
            open_from = max(a, len(prompt))
            while open_from < b and (x[open_from:b] == mask).any():
                if mode == "dual" and block_past and not (a >= len(prompt) and x[a] == mask):
                    logits = shifted(net(x[a:b], a, replace_in(block_past, a)))
                elif mode == "none":
                    logits = shifted(net(x[:end]))[a:b]
                else:
                    block_past = {}
                    logits = shifted(net(x[start:end], start, append_to(past, block_past)))[a - start : b - start]
                prob, token = logits.softmax(-1).max(-1)
                order = [i - a for i in range(open_from, b) if x[i] == mask]
                best = max(order, key=lambda i: float(prob[i]))
                for i in order:
                    if prob[i] > threshold or i == best:
                        x[a + i] = token[i]
                if answer_ended():
                    return finished()
        if done + 1 < blocks:
            x = torch.cat([x, commit(start, end).argmax()[None]])
            if answer_ended():
                return finished()
    return finished()

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


class Blocks:
    """A sequence whose finished blocks are read in both directions and kept, and after them from left to right."""

    def __init__(self, net: PlainNetwork, prompt: Tensor, size: int) -> None:
        self.net, self.x, self.size = net, prompt.clone(), size
        self.past: dict = {}
        self.start = 0
        self.last = None
        self.commit()

    def commit(self) -> None:
        """Read all blocks that are full; the last logit gives the next block's first token."""
        end = len(self.x) // self.size * self.size
        if end > self.start:
            new: dict = {}
            self.last = self.net(self.x[self.start : end], self.start, append_to(self.past, new))[-1]
            self.past, self.start = new, end
            if len(self.x) == end:
                self.take(self.last.argmax())

    def take(self, token: Tensor) -> None:
        self.x = torch.cat([self.x, token[None]])

    def read(self, ids: Tensor, causal: bool) -> Tensor:
        """What follows each of ids, the tokens after the finished blocks."""
        return self.net(ids, self.start, append_to(self.past), causal=causal)


def left_to_right(net: PlainNetwork, prompt: Tensor, *, length: int, block_size: int) -> list[int]:
    """One token after the other: within a block from left to right, finished blocks in both directions."""
    seq = Blocks(net, prompt, block_size)
    while len(seq.x) < len(prompt) + length:
        seq.take(seq.read(seq.x[seq.start :], causal=True)[-1].argmax())
        if len(seq.x) < len(prompt) + length:
            seq.commit()
    return seq.x[: len(prompt) + length].tolist()


def self_verify(
    net: PlainNetwork, prompt: Tensor, *, length: int, block_size: int, small_block_size: int
) -> tuple[list[int], int]:
    """Drafts of a sub-block's masks, each verified (S2D2, arXiv 2603.25702, greedy): tokens, and forwards."""
    before, total = net.forwards, len(prompt) + length
    seq = Blocks(net, prompt, block_size)
    while len(seq.x) < total:
        known = len(seq.x)
        end = min(known // small_block_size * small_block_size + small_block_size, total)
        masks = torch.full((seq.start + block_size - known,), net.spec.mask_id)
        content = torch.cat([seq.x[seq.start :], masks])
        at, stop = known - seq.start, end - seq.start
        if stop - at > 1:
            content[at:stop] = shifted(seq.read(content, causal=False))[at:stop].argmax(-1)
        taken = shifted(seq.read(content[:stop], causal=True)).argmax(-1)
        for i in range(at, stop):
            seq.take(taken[i])
            if content[i] != taken[i]:
                break
        if len(seq.x) < total:
            seq.commit()
    return seq.x[:total].tolist(), net.forwards - before

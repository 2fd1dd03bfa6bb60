# SPDX-License-Identifier: Apache-2.0
"""The loop of SDAR and TraDo (arXiv 2510.06303), of Stable-DiffCoder, of LLaDA2.0 and of A2D's bd3lm, one prompt at a
time, greedy.

Blocks lie on the grid from position 0, or with `at_prompt` from the prompt's end (dllm's `BD3LMSampler`, which pads prompts
on the left up to whole blocks and hides the padding). The prompt's whole blocks are read first; each further block, with
what the prompt left of it, is denoised against the blocks before it, and read once more when it is full. There is no token
shift. Sources: SDAR's generate.py (dynamic low-confidence remasking), Stable-DiffCoder's `generate_block`, dllm, and
`generate` of LLaDA2.0's modeling_llada2_moe.py at its 32 steps a block, which reads all blocks anew in each forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.network import PlainNetwork, append_to


def generate(
    net: PlainNetwork,
    prompt: Tensor,
    *,
    length: int,
    block_size: int,
    steps: int | None = None,
    threshold: float | None = None,
    strict: bool = True,
    at_prompt: bool = False,
) -> tuple[list[int], int]:
    """`length`: tokens to write; prompt and answer together end on the grid, unless it lies `at_prompt`. steps: a block's
    steps, which divide its masks evenly, the first ones taking one more; threshold: all tokens above it instead (at it too,
    unless `strict`), and always the best. Returns the sequence and the forwards."""
    before, past = net.forwards, {}
    x = torch.cat([prompt, torch.full((length,), net.spec.mask_id)])
    masked = torch.arange(len(x)) >= len(prompt)  # a mask id inside the prompt is text

    def read(start: int, end: int) -> None:
        new: dict = {}
        net(x[start:end], start, append_to(past, new))
        past.update(new)

    whole = len(prompt) if at_prompt else len(prompt) // block_size * block_size
    if whole:
        read(0, whole)
    for start in range(whole, len(x), block_size):
        block = slice(start, start + block_size)
        count = int(masked[block].sum())
        quotas = None if steps is None else [count // steps + (i < count % steps) for i in range(steps)]
        while masked[block].any():
            prob, token = net(x[block], start, append_to(past)).softmax(-1).max(-1)
            order = sorted((i for i in range(len(prob)) if masked[start + i]), key=lambda i: -float(prob[i]))
            if quotas is not None:
                chosen = order[: quotas.pop(0)]
            else:
                chosen = [i for i in order if prob[i] > threshold or (not strict and prob[i] == threshold)] or order[:1]
            for i in chosen:
                x[start + i], masked[start + i] = token[i], False
        if start + block_size < len(x):
            read(start, start + block_size)
    return x.tolist(), net.forwards - before

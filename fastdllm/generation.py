# SPDX-License-Identifier: Apache-2.0
"""`generate` and `stream`: from prompts to texts, around the one loop of `engine/loop.py`."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdllm.build import assemble, runner
from fastdllm.config import DecodeConfig
from fastdllm.engine import Request, Step, decode
from fastdllm.models import Model
from fastdllm.prompts import Prompts, encode
from fastdllm.stats import Stats, peak_memory


@dataclass
class Output:
    """What `generate` returns, on the CPU.

    sequences: 1-D LongTensors, prompt included, cut after the first stop token.
    texts: the answers without special tokens; None without a tokenizer.
    stats: what the run cost.
    trace: the steps, only with trace=True.
    logprobs: of each answer's tokens, the stop token included, when they were committed, fp32; NaN for fixed tokens. They
        are natural logarithms of the untempered probability in the forward that committed the token.
    committed_at: the forward of its answer, from 1, that committed each of these tokens; 0 for fixed tokens.
    """

    sequences: list[Tensor] = field(default_factory=list)
    texts: list[str] | None = None
    stats: Stats = field(default_factory=Stats)
    trace: list[Step] | None = None
    logprobs: list[Tensor] = field(default_factory=list)
    committed_at: list[Tensor] = field(default_factory=list)


def _requests(
    model: Model,
    prompts: Prompts,
    config: DecodeConfig,
    constraints: Sequence[dict[int, int]] | dict[int, int] | None,
) -> list[Request]:
    ids = encode(model, prompts)
    fixed = [constraints or {}] * len(ids) if constraints is None or isinstance(constraints, dict) else list(constraints)
    if len(fixed) != len(ids):
        raise ValueError(f"constraints has {len(fixed)} entries for {len(ids)} prompts")
    room = model.spec.max_length - config.gen_length
    for i, p in enumerate(ids):
        if len(p) > room:
            raise ValueError(
                f"prompt {i} has {len(p)} tokens; with gen_length={config.gen_length} at most {max(room, 0)} fit the "
                f"model's context of {model.spec.max_length}"
            )
    # A stop token may be written before a fixed one, so a row with fixed tokens decodes to its end.
    return [
        Request(p, config.gen_length, config.seed + i, tokens, () if tokens else None)
        for i, (p, tokens) in enumerate(zip(ids, fixed, strict=True))
    ]


def _configure(config: DecodeConfig | None, options: dict[str, Any]) -> DecodeConfig:
    return config.replace(**options) if config is not None else DecodeConfig(**options)


def stream(
    model: Model,
    prompts: Prompts,
    config: DecodeConfig | None = None,
    *,
    constraints: Sequence[dict[int, int]] | dict[int, int] | None = None,
    **options: Any,
) -> Generator[Step, None, None]:
    """The decoding loop a step at a time, with each step's block content (see `engine.Step`).

    Arguments as `generate`. Closing the iterator stops the computation.
    """
    config = _configure(config, options)
    requests = _requests(model, prompts, config, constraints)
    run, executor = assemble(model, config), runner(model, config)
    yield from decode(model, requests, run, executor, rows=config.batch_size, trace=True)


def generate(
    model: Model,
    prompts: Prompts,
    config: DecodeConfig | None = None,
    *,
    constraints: Sequence[dict[int, int]] | dict[int, int] | None = None,
    trace: bool = False,
    **options: Any,
) -> Output:
    """Answer every prompt.

    prompts: a text, texts, lists of messages, 1-D id tensors, or a [B, P] tensor; lengths may differ. config and options:
    see `DecodeConfig` (options override the config). constraints: tokens to fix by position of the answer, one dict for all
    prompts or one per prompt. trace: keep every step. Raises ValueError for bad input, naming option, value and limit.
    """
    config = _configure(config, options)
    requests = _requests(model, prompts, config, constraints)
    run, executor = assemble(model, config), runner(model, config)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    results, steps, stats = {}, [], Stats()
    for step in decode(model, requests, run, executor, rows=config.batch_size, trace=trace):
        stats.take(step)
        results.update(step.done)
        if trace:
            steps.append(step)
    out = Output(stats=stats, trace=steps if trace else None)
    for i, request in enumerate(requests):
        result, prompt = results[i], len(request.prompt)
        ids = result.ids.cpu()
        length = answer_length(ids[prompt:], run.stop_ids, request.fixed)
        out.sequences.append(ids[: prompt + length + 1])
        out.logprobs.append(result.logprobs[: length + 1].cpu())
        out.committed_at.append(result.committed_at[: length + 1].cpu())
        stats.finish(result, length)
    stats.peak_memory = peak_memory(model.device)
    if model.tokenizer is not None:
        out.texts = [
            model.tokenizer.decode(s[len(r.prompt) :], skip_special_tokens=True)
            for s, r in zip(out.sequences, requests, strict=True)
        ]
    return out


def answer_length(answer: Tensor, stop_ids: Sequence[int], fixed: Iterable[int] = ()) -> int:
    """Tokens before the first stop token of an answer [N] on the CPU; N when there is none.

    fixed: positions of constraints; a stop token before one of them does not end the answer.
    """
    after = max(fixed, default=-1) + 1
    stops = torch.isin(answer[after:], torch.tensor(stop_ids, dtype=torch.long)).nonzero()  # sync: already on the CPU
    return after + int(stops[0]) if len(stops) else len(answer)

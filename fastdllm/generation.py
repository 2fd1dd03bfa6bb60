# SPDX-License-Identifier: Apache-2.0
"""`generate` and `stream`: from prompts to texts, around the one loop of `engine.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdllm.build import assemble
from fastdllm.config import DecodeConfig
from fastdllm.engine import Request, Step, decode
from fastdllm.models import Model
from fastdllm.prompts import Prompts, encode
from fastdllm.stats import Stats, peak_memory


@dataclass
class Output:
    """sequences: 1-D LongTensors on the CPU, prompt included, cut after the first stop token. texts: the answers without
    special tokens, None without a tokenizer. trace: the steps, only with trace=True."""

    sequences: list[Tensor] = field(default_factory=list)
    texts: list[str] | None = None
    stats: Stats = field(default_factory=Stats)
    trace: list[Step] | None = None


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
    for i, (p, tokens) in enumerate(zip(ids, fixed, strict=True)):
        if len(p) > room:
            raise ValueError(
                f"prompt {i} has {len(p)} tokens; with gen_length={config.gen_length} at most {max(room, 0)} fit the "
                f"model's context of {model.spec.max_length}"
            )
        for at, token in tokens.items():
            if not 0 <= at < config.gen_length:
                raise ValueError(f"constraint at position {at} lies outside the answer, 0..{config.gen_length - 1}")
            if not 0 <= token < model.spec.vocab or token == model.spec.mask_id:
                raise ValueError(f"constraint token {token} at position {at} is not a token that may be written")
    return [
        Request(p.to(model.device), config.gen_length, config.seed + i, tokens)
        for i, (p, tokens) in enumerate(zip(ids, fixed, strict=True))
    ]


def _configure(config: DecodeConfig | None, options: dict[str, Any]) -> DecodeConfig:
    return config.replace(**options) if config is not None else DecodeConfig(**options)


def _reaching(config: DecodeConfig, requests: list[Request]) -> DecodeConfig:
    """The config without an early stop where tokens are fixed: a stop token may be written before a constraint."""
    return config.replace(stop_ids=()) if any(r.fixed for r in requests) else config


def stream(
    model: Model,
    prompts: Prompts,
    config: DecodeConfig | None = None,
    *,
    constraints: Sequence[dict[int, int]] | dict[int, int] | None = None,
    **options: Any,
) -> Iterator[Step]:
    """The decoding loop a step at a time, with each step's block content (see `engine.Step`).

    Arguments as `generate`. Closing the iterator stops the computation.
    """
    config = _configure(config, options)
    requests = _requests(model, prompts, config, constraints)
    yield from decode(model, requests, **assemble(model, _reaching(config, requests)), trace=True)


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
    stop_ids = model.spec.stop_ids if config.stop_ids is None else config.stop_ids
    plan = assemble(model, _reaching(config, requests))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    results, steps, stats = {}, [], Stats()
    for step in decode(model, requests, **plan, trace=trace):
        stats.forwards += 1
        stats.seconds += step.seconds
        results.update(step.done)
        if trace:
            steps.append(step)
    out = Output(stats=stats, trace=steps if trace else None)
    for i, request in enumerate(requests):
        ids, prompt = results[i].ids.cpu(), len(request.prompt)
        after = max(request.fixed, default=-1) + 1  # a stop token before a constraint does not end the answer
        length = after + answer_length(ids[prompt + after :], stop_ids)
        out.sequences.append(ids[: prompt + length + 1])
        stats.row_tokens.append(length)
        stats.row_forwards.append(results[i].forwards)
        stats.row_positions.append(results[i].positions)
        stats.row_layer_tokens.append(results[i].layer_tokens)
    stats.peak_memory = peak_memory(model.device)
    if model.tokenizer is not None:
        out.texts = [
            model.tokenizer.decode(s[len(r.prompt) :], skip_special_tokens=True)
            for s, r in zip(out.sequences, requests, strict=True)
        ]
    return out


def answer_length(answer: Tensor, stop_ids: Sequence[int]) -> int:
    """Tokens before the first stop token of an answer [N] on the CPU; N when there is none."""
    stops = torch.isin(answer, torch.tensor(stop_ids, dtype=torch.long)).nonzero()  # sync: already on the CPU
    return int(stops[0]) if len(stops) else len(answer)

# SPDX-License-Identifier: Apache-2.0
"""Small random models of each convention, whose confidences spread over all of (0, 1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

import fastdllm
from fastdllm import registry
from fastdllm.build import assemble
from fastdllm.models import Model
from fastdllm.models.spec import ModelSpec
from fastdllm.models.transformer import Transformer
from fastdllm.runners import eager
from fastdllm.store import Canvas

FAMILIES = ("llada", "dream", "v2")
VOCAB, MASK, STOP = 40, 38, 37


def random_model(family: str = "llada", seed: int = 0) -> Model:
    """llada: no shift; dream: shift 1; v2: shift 1 and block-causal with blocks of 8."""
    shift, block = int(family != "llada"), 8 if family == "v2" else 0
    cache = "block" if block else "dual"
    spec = ModelSpec(
        family=family,
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn=48,
        vocab=VOCAB,
        max_length=256,
        rms_eps=1e-6,
        rope_theta=1e4,
        qkv_bias=True,
        tied_head=False,
        shift=shift,
        block_causal=block,
        mask_id=MASK,
        stop_ids=(STOP,),
        pad_id=0,
        defaults={"cache": cache, "schedule": "even", "block_length": 8},
    )
    torch.manual_seed(seed)
    network = Transformer(spec)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.3 if "head" not in name else 0.5)
    return Model(network, spec, None, f"random-{family}-{seed}")


class WatchedRunner(eager.Runner):
    """An eager runner whose canvases can be looked at."""

    def __init__(self) -> None:
        self.canvases: list[Canvas] = []

    @contextmanager
    def canvas(self, *given: Any) -> Iterator[Canvas]:
        with super().canvas(*given) as canvas:
            self.canvases.append(canvas)
            yield canvas


@cache
def accepted(family: str, cache: str, decoder: str) -> bool:
    """Whether this cache and this decoder go together for this family (`test_invariants.py` lists those that do not)."""
    try:
        assemble(random_model(family), fastdllm.DecodeConfig(cache=cache, decoder=decoder, gen_length=8))
    except ValueError:
        return False
    return True


@cache
def triples() -> tuple[tuple[str, str, str], ...]:
    """Every (family, cache, decoder) that goes together."""
    every = itertools.product(FAMILIES, registry.names("caches"), registry.names("decoders"))
    return tuple(triple for triple in every if accepted(*triple))


def prompts(*lengths: int) -> list[torch.Tensor]:
    """Random prompts; the first token of each is the mask id, which is text like any other there."""
    out = [torch.randint(0, STOP, (n,)) for n in lengths]
    for prompt in out:
        prompt[0] = MASK
    return out

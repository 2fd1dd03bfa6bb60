# SPDX-License-Identifier: Apache-2.0
"""Whole answers on the kernels and on their references: the engine passes the kernels nothing that they do not take."""

from __future__ import annotations

import copy

import pytest
import torch

import fastdllm
from fastdllm import kernels
from fastdllm.models import Model
from fastdllm.runners import cuda_graph
from tests.random_models import prompts, random_model
from tests.runners.test_bucketing import emulated

PACKED = {"runner": "cuda_graph"}  # which lets passes of 8 and of 4 positions share a forward
SETTINGS = [
    ("llada", {"cache": "dual", "decoder": "draft_verify"}),  # branches, which open a block as one
    ("llada", {"cache": "suffix_window", "suffix": 4, "decoder": "threshold", "threshold": 0.3}),  # hidden slots
    ("v2", {"cache": "block", "reuse_k": 9, "layer_subset": "first", "trim_ratio": 0.3, "block_length": 8} | PACKED),  # TRIM
    ("llada2_moe", {"cache": "block", "block_length": 8} | PACKED),  # experts, groups; heads that turn in part
    ("v2", {"cache": "sub_block", "decoder": "entropy_bound", "small_block_size": 4, "block_length": 8} | PACKED),
]
MORE = [
    ("llada", {"cache": "top_rho", "decoder": "quota"}),  # reused layers
    ("v2", {"cache": "block", "reuse_k": 2, "layer_subset": "first", "block_length": 8}),  # reused layers that none runs
    ("llada_moe", {"cache": "dual", "decoder": "quota"}),
    ("dream", {"cache": "vicinity", "decoder": "lopa", "gen_length": 4}),
    ("dream", {"cache": "dual", "decoder": "wino"}),  # shadows
    ("dream", {"cfg_scale": 0.5, "decoder": "factor"}),
    ("dream", {"cache": "suffix_window", "suffix": 4, "threshold": 0.3, "attention_discount": 20}),  # between positions
]


@pytest.mark.parametrize(
    "family, options", [*SETTINGS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)], ids=str
)
def test_answers(device: torch.device, family: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    given, length = prompts(4, 4, 3), {"gen_length": 8, "block_length": 4}
    if device.type == "cpu":  # the interpreter takes seconds a forward
        given, length = prompts(3, 2), {"gen_length": 4, "block_length": 2}
    base, found = random_model(family, 2), []
    for choice in ("reference", "triton" if device.type == "cpu" else "auto"):
        monkeypatch.setattr(kernels, "_CHOICE", choice)
        model = Model(copy.deepcopy(base.network).to(device), base.spec, None, base.name)
        arguments = {**length, "stop_ids": (), "runner": "eager", **options}
        out = fastdllm.generate(model, given, **arguments)
        found.append(([s.tolist() for s in out.sequences], out.stats.row_forwards))
    assert found[0] == found[1]

# SPDX-License-Identifier: Apache-2.0
"""Captured graphs give exactly the eager runner's tokens and read the host once a step (sharing: test_bucketing.py)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import kernels
from fastdllm.models import Model
from fastdllm.models.spec import ModelSpec
from fastdllm.models.transformer import Transformer

pytestmark = pytest.mark.gpu

SHAPES = {"layers": 3, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96, "vocab": 131, "max_length": 4096}
FAMILIES: dict[str, dict[str, Any]] = {
    "llada": {"shift": 0, "block_causal": 0, "qkv_bias": False, "defaults": {"cache": "dual", "schedule": "even"}},
    "dream": {"shift": 1, "block_causal": 0, "qkv_bias": True, "defaults": {"cache": "dual", "schedule": "timesteps"}},
    "v2": {
        "shift": 1,
        "block_causal": 16,
        "qkv_bias": True,
        "defaults": {"cache": "block", "schedule": "even", "block_length": 16, "strict": True},
    },
}
CASES = [
    ("llada", {"cache": "none"}),
    ("llada", {"cache": "prefix"}),
    ("llada", {"cache": "dual"}),
    ("llada", {"cache": "dual", "factor": 1.0}),
    ("llada", {"cache": "dual", "decoder": "quota", "temperature": 0.7}),
    ("llada", {"decoder": "frechet"}),
    ("llada", {"decoder": "entropy_bound", "cache": "lazy"}),
    ("llada", {"decoder": "hierarchical", "cache": "suffix_window", "suffix": 4}),
    ("llada", {"decoder": "local_leap", "cache": "vicinity"}),
    ("llada", {"decoder": "credit"}),
    ("llada", {"decoder": "progress_threshold"}),
    ("dream", {"decoder": "adablock"}),
    ("llada", {"decoder": "draft_verify"}),
    ("llada", {"decoder": "lopa", "cache": "none"}),
    ("dream", {"decoder": "draft_verify", "first_token": "rule"}),
    ("v2", {"decoder": "draft_verify", "depth": 3}),
    ("llada", {"cache": "top_rho"}),
    ("dream", {"cache": "top_rho", "ratio": 0.5, "refresh": 99, "first_token": "rule"}),
    ("llada", {"decoder": "wino"}),
    ("llada", {"decoder": "wino", "cache": "none", "keep": 1.0, "threshold": 0.2}),
    ("dream", {"decoder": "wino", "keep": 1.0, "threshold": 0.2}),
    ("v2", {"decoder": "wino", "cache": "sub_block", "keep": 1.0, "threshold": 0.2}),
    ("dream", {"cache": "prefix"}),
    ("dream", {"cache": "dual", "decoder": "quota", "confidence": "entropy"}),
    ("v2", {"cache": "block"}),
    ("v2", {"cache": "sub_block"}),
    ("v2", {"cache": "block", "reuse_k": 2, "layer_subset": "middle"}),
    ("v2", {"cache": "block", "reuse_k": 4, "layer_subset": "1+2", "trim_ratio": 0.4}),
]


@pytest.fixture(autouse=True)
def every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention too, which the library does for fp32 otherwise; narrower types round too coarsely to compare tokens."""
    monkeypatch.setattr(kernels, "_CHOICE", "triton")


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Model:
    spec = ModelSpec(
        family=family, **SHAPES, rms_eps=1e-6, rope_theta=1e4, tied_head=False, mask_id=130, stop_ids=(129,), pad_id=128,
        **FAMILIES[family],
    )  # fmt: skip
    network = Transformer(spec, dtype, "cuda")
    for name, p in network.named_parameters():
        if "norm" not in name:
            p.data.normal_(0, 0.3)
    return Model(network.requires_grad_(False), spec)


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, 128, (n,)) for n in lengths]


@pytest.mark.parametrize("family, options", CASES, ids=lambda v: str(v))
def test_captured_equals_eager(family: str, options: dict[str, Any]) -> None:
    model = tiny(family)
    options = {"gen_length": 40, "block_length": 16, "threshold": 0.6, **options}
    if "factor" in options or "decoder" in options:
        options.pop("threshold")
    for batch in (prompts(7), prompts(19, 3, 133), prompts(5, 40, 16, 31, 1)):
        eager = fastdllm.generate(model, batch, runner="eager", **options)
        graph = fastdllm.generate(model, batch, runner="cuda_graph", **options)
        assert [s.tolist() for s in graph.sequences] == [s.tolist() for s in eager.sequences]
        assert graph.stats.row_forwards == eager.stats.row_forwards


def test_one_host_read_per_step() -> None:
    model = tiny("llada")
    batch, options = prompts(20, 50), {"gen_length": 32, "block_length": 16, "threshold": 0.6, "stop_ids": ()}
    fastdllm.generate(model, batch, **options)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = fastdllm.generate(model, batch, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reads = sum("synchroniz" in str(w.message) for w in caught)
    outside = 2 * len(batch) + 2  # the prompts go up and the answers come down once each, and the stop ids once
    assert reads <= out.stats.forwards + outside

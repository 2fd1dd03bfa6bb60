# SPDX-License-Identifier: Apache-2.0
"""Captured graphs give exactly the eager runner's tokens and read the host once a step (sharing: test_bucketing.py)."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import build, kernels
from fastdllm.engine import Request, decode
from fastdllm.models import Model
from fastdllm.models.spec import Experts, ModelSpec
from fastdllm.models.transformer import Transformer
from fastdllm.runners import cuda_graph, eager

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
    "nemotron": {
        "shift": 0,
        "block_causal": 0,
        "causal_context": True,
        "qkv_bias": False,
        "defaults": {"cache": "causal", "schedule": "even"},
    },
    "llada_moe": {
        "shift": 0,
        "block_causal": 0,
        "qkv_bias": False,
        "experts": Experts(count=16, active=4, inner=24),
        "defaults": {"cache": "dual", "schedule": "even"},
    },
    "llada2_moe": {
        "shift": 0,
        "block_causal": 16,
        "qkv_bias": False,
        "rotary": 8,
        "experts": Experts(16, 4, 24, shared=24, dense=1, score="sigmoid", groups=4, active_groups=2, scale=2.5),
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
    ("llada", {"cache": "top_rho", "suffix": 4, "keep_last": False, "refresh_blocks": 2}),
    ("dream", {"cache": "top_rho", "ratio": 0.5, "refresh": 99, "first_token": "rule"}),
    ("llada", {"decoder": "wino"}),
    ("llada", {"decoder": "joint_threshold", "threshold": 0.2, "editing_threshold": 0.0}),
    ("llada", {"decoder": "wino", "cache": "none", "keep": 1.0, "threshold": 0.2}),
    ("dream", {"decoder": "wino", "keep": 1.0, "threshold": 0.2}),
    ("dream", {"decoder": "joint_threshold", "threshold": 0.2, "editing_threshold": 0.0}),
    ("v2", {"decoder": "wino", "cache": "sub_block", "keep": 1.0, "threshold": 0.2}),
    ("dream", {"cache": "prefix"}),
    ("dream", {"cache": "dual", "decoder": "quota", "confidence": "entropy"}),
    ("v2", {"cache": "block"}),
    ("v2", {"cache": "sub_block"}),
    ("v2", {"cache": "fused", "small_block_size": 4}),
    ("v2", {"cache": "block", "reuse_k": 2, "layer_subset": "middle"}),
    ("nemotron", {"cache": "causal"}),
    ("nemotron", {"cache": "none", "decoder": "quota", "temperature": 0.7}),
    ("nemotron", {"decoder": "draft_verify"}),
    ("nemotron", {"decoder": "wino", "keep": 1.0, "threshold": 0.2}),
    ("nemotron", {"decoder": "self_speculate"}),
    ("nemotron", {"decoder": "self_speculate", "cache": "none", "temperature": 0.7}),
    ("v2", {"cache": "block", "reuse_k": 4, "layer_subset": "1+2", "trim_ratio": 0.4}),
    ("v2", {"decoder": "self_verify"}),
    ("llada_moe", {"cache": "dual"}),
    ("llada_moe", {"cache": "top_rho", "decoder": "quota"}),
    ("llada2_moe", {"cache": "block"}),
    ("llada2_moe", {"cache": "block", "reuse_k": 4, "layer_subset": "1+2", "trim_ratio": 0.4}),
    ("llada", {"decoder": "threshold", "threshold": 0.6, "attention_discount": 5.0}),
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


@pytest.mark.parametrize("seed", range(8))
def test_runs_that_take_turns_give_what_each_gives_alone(seed: int) -> None:
    """Streams of random settings on one model, a step of one after a step of another, some closed early."""
    rng = random.Random(seed)
    family = rng.choice(list(FAMILIES))
    model = tiny(family)
    settings = [options for name, options in CASES if name == family]
    runs, alone = [], []
    for options in rng.sample(settings, min(4, len(settings))):
        batch, options = prompts(*(rng.randint(1, 90) for _ in range(rng.randint(1, 9)))), {"gen_length": 40, **options}
        alone.append([s.tolist() for s in fastdllm.generate(model, batch, runner="eager", stop_ids=(), **options).sequences])
        runs.append(fastdllm.stream(model, batch, runner="cuda_graph", stop_ids=(), **options))
    done: list[dict[int, list[int]]] = [{} for _ in runs]
    left = list(range(len(runs)))
    closed = rng.choice(left)
    while left:
        i = rng.choice(left)
        step = next(runs[i], None)
        if step is None or (i == closed and rng.random() < 0.1):
            runs[i].close()
            left.remove(i)
        if step is not None:
            done[i] |= {n: result.ids.tolist() for n, result in step.done.items()}
    for i, results in enumerate(done):
        assert i == closed or len(results) == len(alone[i])
        assert all(alone[i][n] == ids for n, ids in results.items())


def test_requests_with_numbers_of_their_own_share_graphs() -> None:
    """Greedy and drawn rows, thresholds, stops and lengths in one batch: each gives what it gives alone."""
    model, rng = tiny("llada"), random.Random(0)
    run = build.assemble(model, fastdllm.DecodeConfig(gen_length=40, block_length=16, threshold=0.6))
    asked = [
        Request(prompt, rng.randint(1, 60), seed, stop_ids=rng.choice([None, (), (5, 6)]), numbers=numbers)
        for seed, prompt in enumerate(prompts(*(rng.randint(1, 200) for _ in range(24))))
        for numbers in [rng.choice([{}, {"threshold": 0.3}, {"temperature": 0.8, "top_p": 0.9, "threshold": 0.5}])]
    ]
    runner = cuda_graph.Runner()
    together = {n: r for step in decode(model, asked, run, runner, rows=10, positions=1500) for n, r in step.done.items()}
    for number, request in enumerate(asked):
        (alone,) = (r for step in decode(model, [request], run, eager.Runner()) for r in step.done.values())
        assert torch.equal(together[number].ids, alone.ids)
        assert torch.equal(together[number].committed_at, alone.committed_at)
        torch.testing.assert_close(together[number].logprobs, alone.logprobs, atol=1e-3, rtol=1e-3, equal_nan=True)


def test_a_shape_s_first_pass_prepares_its_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an eager pass a capture runs the step once; without one it warms up first. Both give the eager tokens."""
    model, batch, options = tiny("llada"), prompts(20, 50), {"gen_length": 32, "block_length": 16, "stop_ids": ()}
    run = build.assemble(model, fastdllm.DecodeConfig(**options))
    requests = [Request(prompt, 32) for prompt in batch]
    alone = {n: r.ids for step in decode(model, requests, run, eager.Runner()) for n, r in step.done.items()}
    for eager_first in (0, 1, 2):
        runner, ran = cuda_graph.Runner(eager_first), Counter()
        capture = runner._capture

        def counting(canvas: Any, step: Any, name: Any, *rest: Any, capture: Any = capture, ran: Any = ran) -> Any:
            def counted(*given: Any) -> Any:
                ran[name] += 1
                return step(*given)

            return capture(canvas, counted, name, *rest)

        monkeypatch.setattr(runner, "_capture", counting)
        for _ in range(3):
            for step in decode(model, requests, run, runner):
                assert all(torch.equal(alone[n], r.ids) for n, r in step.done.items())
        assert ran and set(ran.values()) == {1 if eager_first else 2}


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
    outside = (
        4 * len(batch) + 1
    )  # an answer is checked, and its ids, log-probabilities and forwards come down; the stop ids go up
    assert reads <= out.stats.forwards + outside

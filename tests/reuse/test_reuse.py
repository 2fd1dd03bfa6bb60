# SPDX-License-Identifier: Apache-2.0
"""Layer reuse and TRIM: what they may change, what they must not, and that they really skip work.

The fork that first tried this had eight bugs (a "skipped" layer that ran, a k=1 baseline that was slower, caches of another
block, another sub-block, another row, a reuse test that never fired, ...); each invariant below would have caught one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdllm
from fastdllm.engine import decode
from fastdllm.engine.batch import parts
from fastdllm.forward import Plan, Shape, Window
from fastdllm.models import Model
from fastdllm.models.quantize import quantize
from fastdllm.models.spec import ModelSpec
from fastdllm.models.transformer import Layer, Transformer
from fastdllm.reuse import LayerReuse, subset_layers
from fastdllm.reuse.base import Work
from fastdllm.runners import eager
from tests.random_models import WatchedRunner

LAYERS, SIZE = 6, 8
OPTIONS: dict[str, Any] = {"gen_length": 29, "block_length": SIZE, "small_block_size": 4, "threshold": 0.5, "stop_ids": ()}


@pytest.fixture
def model() -> Model:
    defaults = {"cache": "block", "block_length": SIZE, "strict": True, "schedule": "even"}
    spec = ModelSpec(
        "fast_dllm_v2", LAYERS, 32, 4, 2, 8, 64, 64, 512, 1e-6, 1e4, True, True, 1, SIZE, 60, (61,), 62, defaults
    )
    network = Transformer(spec)
    for name, p in network.named_parameters():
        if "norm" not in name:
            p.data.normal_(0, 0.25)
    return Model(network.requires_grad_(False), spec)


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, 60, (n,)) for n in lengths]


def tokens(out: fastdllm.Output) -> list[list[int]]:
    return [s.tolist() for s in out.sequences]


REUSE = [
    {"reuse_k": 2, "layer_subset": "middle"},
    {"reuse_k": 3, "layer_subset": "first"},
    {"reuse_k": 99, "layer_subset": "2+3+4", "trim_ratio": 0.3},
    {"reuse_k": 2, "layer_subset": "last", "trim_ratio": 0.0},
    {"reuse_k": 99, "layer_subset": "2+3+4", "trim_drift": 0.1},
    {"reuse_k": 2, "layer_subset": "middle", "reuse_mode": "output"},
]
CACHES = ["block", "sub_block"]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "reuse", [{"reuse_k": 1, "layer_subset": "middle"}, {"reuse_k": 3, "layer_subset": "first", "trim_ratio": 1.0}]
)
@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
def test_neutral_settings_change_nothing(model: Model, cache: str, reuse: dict[str, Any], fp8: bool) -> None:
    if fp8:
        quantize(model.network, "fp8")
    batch = prompts(5, 8, 13)
    plain = fastdllm.generate(model, batch, cache=cache, trace=True, **OPTIONS)
    neutral = fastdllm.generate(model, batch, cache=cache, trace=True, **OPTIONS, **reuse)
    assert tokens(neutral) == tokens(plain)
    assert neutral.stats.row_forwards == plain.stats.row_forwards
    assert neutral.stats.row_layer_tokens == plain.stats.row_layer_tokens
    for a, b in zip(plain.trace, neutral.trace, strict=True):
        torch.testing.assert_close(a.confidence, b.confidence, rtol=0, atol=0, equal_nan=True)


@pytest.mark.each_choice
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("reuse", REUSE, ids=str)
def test_a_row_of_a_batch_equals_the_row_alone(model: Model, cache: str, reuse: dict[str, Any]) -> None:
    batch = prompts(5, 8, 11, 16, 3)
    together = fastdllm.generate(model, batch, cache=cache, batch_size=3, **OPTIONS, **reuse)
    for i, prompt in enumerate(batch):
        alone = fastdllm.generate(model, [prompt], cache=cache, **OPTIONS, **reuse)
        assert tokens(alone)[0] == tokens(together)[i]
        assert alone.stats.row_forwards[0] == together.stats.row_forwards[i]
        assert alone.stats.row_layer_tokens[0] == together.stats.row_layer_tokens[i]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("reuse", REUSE, ids=str)
def test_counted_layer_tokens_are_those_that_ran(
    model: Model, cache: str, reuse: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = 0
    forward = Layer.forward

    def counted(self: Layer, h: torch.Tensor, *args: Any) -> Any:
        nonlocal ran
        ran += h.shape[0] * h.shape[1]
        return forward(self, h, *args)

    monkeypatch.setattr(Layer, "forward", counted)
    out = fastdllm.generate(model, prompts(11), cache=cache, **OPTIONS, **reuse)
    assert ran == sum(out.stats.row_layer_tokens)
    assert ran < sum(out.stats.row_positions) * LAYERS


@pytest.mark.parametrize("reuse", REUSE, ids=str)
def test_committed_blocks_stay_exact(model: Model, reuse: dict[str, Any]) -> None:
    """Keys and values of finished blocks equal those of one plain block-causal pass over the final tokens."""
    from fastdllm.build import assemble
    from fastdllm.engine import Request

    prompt = prompts(11)[0]
    config = fastdllm.DecodeConfig(cache="block", **OPTIONS, **reuse)
    run = assemble(model, config)
    watched = WatchedRunner()
    for step in decode(model, [Request(prompt, OPTIONS["gen_length"])], run, watched):
        result = step.done
    ids, store = result[0].ids, watched.canvases[0].store
    committed = (len(ids) - 1) // SIZE * SIZE  # the last block is never committed: nothing follows it
    pos = torch.arange(committed)[None]
    plain = model.network.new_store(1, committed)
    window = Window(torch.zeros(1, dtype=torch.long), pos, (pos // SIZE + 1) * SIZE, committed)
    model.network(ids[None, :committed], window, plain)
    torch.testing.assert_close(store.k[:, :1, :, :committed], plain.k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(store.v[:, :1, :, :committed], plain.v, atol=1e-5, rtol=1e-4)


def test_a_new_token_is_seen_on_a_reuse_pass_with_deltas_but_not_with_outputs(model: Model) -> None:
    """Reused outputs of the layers up to the last one give the logits of the last whole pass, bit for bit: the stale logits
    that made the fork's k=2 and k=3 lose 25 points. Deltas let the new token through."""
    every = {"reuse_k": 99, "layer_subset": "+".join(map(str, range(1, LAYERS))), "threshold": 1.0}
    options = {**OPTIONS, **every, "gen_length": SIZE, "small_block_size": SIZE, "cache": "block"}
    prompt = prompts(SIZE)
    for mode, stale in (("output", True), ("delta", False)):
        out = fastdllm.generate(model, prompt, trace=True, reuse_mode=mode, **options)
        first, second = out.trace[1], out.trace[2]  # trace[0] is the prefill, trace[1] recomputes everything
        both = ~(first.confidence.isnan() | second.confidence.isnan())
        assert both.sum() >= SIZE - 3
        assert torch.equal(first.confidence[both], second.confidence[both]) is stale


def test_trim_always_recomputes_what_changed_and_what_predicts() -> None:
    reuse = LayerReuse(4, (1,), "delta", 0.25, None, SIZE, False)
    h = torch.randn(1, SIZE, 4)

    class State:
        entry, ids = h.clone(), torch.arange(SIZE)[None].clone()

    ids = torch.arange(SIZE)[None].clone()
    ids[0, 6] = 99
    needed = torch.zeros(1, SIZE, dtype=torch.bool)
    needed[0, 2] = True
    h[0, 4] = -h[0, 4]
    at = torch.arange(SIZE)[None]
    window = Window(torch.zeros(1, dtype=torch.long), at, torch.full_like(at, SIZE), SIZE)
    work = Work(window.row, window, ids, needed, torch.tensor([3]), torch.tensor([SIZE]), 3, 1)
    chosen = reuse._score(State, work, at, h).argsort(descending=True)[0, :3].tolist()
    assert set(chosen) == {2, 4, 6}
    assert set(chosen[:2]) == {2, 6}


def test_runs_of_layers() -> None:
    """Neighbours are one run; a gap starts another."""
    for layers, want in (((1, 2, 3), [(1, 4)]), ((2, 4, 5, 9), [(2, 3), (4, 6), (9, 10)]), ((1,), [(1, 2)])):
        reuse = LayerReuse(4, layers, "delta", 0.25, None, SIZE, False)
        assert [(run.start, run.stop) for run in reuse.runs] == want


@pytest.mark.parametrize("packs", [False, True])
def test_pieces_hold_every_fresh_position(packs: bool) -> None:
    """One row alone runs exactly its own positions where nothing is captured; rows that run whole need no piece."""
    assert parts([8, 8], [8, 8], packs) == parts([5, 8], [5, 8], packs) == (0, 0)
    assert parts([0, 0], [8, 8], packs)[1] == 0
    for n in range(1, 8):
        assert parts([n], [8], packs) == ((1 << (n - 1).bit_length() if packs else n), 1)
    for fresh in ([8, 0, 0], [8, 2, 3, 0], [1, 1, 1, 7], [5, 8]):
        size, count = parts(fresh, [8] * len(fresh), packs)
        assert 1 <= size <= 8 and count == sum(-(-n // size) for n in fresh)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("reuse", REUSE, ids=str)
def test_rows_that_recompute_all_and_rows_that_reuse_share_a_forward(
    model: Model, reuse: dict[str, Any], packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So do passes that open a block, where the runner packs; neither changes a row's answer or its cost."""
    mixed, opening, call = 0, 0, eager.Runner.__call__

    def watched(self: Any, canvas: Any, step: Any, key: Any, plans: list[Plan], noise: Any, shape: Shape) -> Any:
        nonlocal mixed, opening
        opening += shape.fresh is not None and any(plan.first >= plan.stop for plan in plans)
        whole = [plan.fresh == plan.stop - plan.start for plan in plans]
        mixed += shape.fresh is not None and any(whole) and not all(whole)
        return call(self, canvas, step, key, plans, noise, shape)

    monkeypatch.setattr(eager.Runner, "__call__", watched)
    monkeypatch.setattr(eager.Runner, "packs", packs)
    batch = prompts(5, 6, 7, 12)
    together = fastdllm.generate(model, batch, cache="block", batch_size=4, **OPTIONS, **reuse)
    assert mixed and bool(opening) == packs
    alone = [fastdllm.generate(model, [p], cache="block", **OPTIONS, **reuse) for p in batch]
    assert tokens(together) == [tokens(out)[0] for out in alone]
    assert together.stats.row_layer_tokens == [out.stats.row_layer_tokens[0] for out in alone]


def test_a_drift_threshold_recomputes_more_the_lower_it_is(model: Model) -> None:
    """From 2, which no drift exceeds, to 0, which every position reaches one pass later."""
    prompt, ran = prompts(11), []
    for drift in (2.0, 0.2, 0.02, 0.0):
        options = {**OPTIONS, "reuse_k": 99, "layer_subset": "2+3+4", "trim_drift": drift, "threshold": 1.0}
        out = fastdllm.generate(model, prompt, cache="block", **options)
        ran.append(sum(out.stats.row_layer_tokens) / sum(out.stats.row_positions))
    assert ran == sorted(ran)
    assert ran[0] < ran[-1] - 0.5


@pytest.mark.parametrize("period", [2, 3, 5])
def test_at_most_period_minus_one_reuse_passes_in_a_row(period: int) -> None:
    reuse = LayerReuse(period, (1, 2), "delta", None, None, SIZE, False)
    since, run, longest = -1, 0, 0
    for _ in range(40):
        active = reuse.fresh(SIZE, since, 1, 3)
        since = 0 if active == SIZE else since + 1
        run = 0 if active == SIZE else run + 1
        longest = max(longest, run)
    assert longest == period - 1


def test_a_whole_pass_of_the_sub_block_cache_recomputes_everything() -> None:
    reuse = LayerReuse(9, (1, 2), "delta", None, None, SIZE, True)
    assert reuse.fresh(SIZE, 3, 1, 3) == SIZE
    assert reuse.fresh(4, 3, 1, 3) == 0


def test_subsets_leave_layer_0_out_and_fit_the_depth() -> None:
    for layers in (2, 3, 8, 28):
        for name in ("first", "middle", "last"):
            chosen = subset_layers(name, layers)
            assert chosen
            assert min(chosen) >= 1
            assert max(chosen) < layers
    assert subset_layers("last", 28)[-1] == 27
    assert subset_layers([3, 1, 3], 6) == (1, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reuse_k": 2}, "layer_subset"),
        ({"reuse_k": 2, "layer_subset": "upper"}, "first, middle, last"),
        ({"reuse_k": 2, "layer_subset": "0+1"}, "1..5"),
        ({"reuse_k": 2, "layer_subset": "2+6"}, "1..5"),
        ({"reuse_k": 0, "layer_subset": "first"}, "reuse_k=0"),
        ({"reuse_k": 2, "layer_subset": "first", "trim_ratio": 1.5}, "trim_ratio=1.5"),
        ({"reuse_k": 2, "layer_subset": "first", "trim_drift": 3.0}, "trim_drift=3.0"),
        ({"reuse_k": 2, "layer_subset": "first", "trim_drift": 0.1, "trim_ratio": 0.5}, "exclude each other"),
        ({"reuse_k": 2, "layer_subset": "first", "reuse_mode": "states"}, "delta, output"),
        ({"reuse_k": 2, "layer_subset": "first", "cache": "none"}, "cache='block' or 'sub_block'"),
    ],
)
def test_bad_settings_say_what_is_allowed(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+").replace(".", r"\.")):
        fastdllm.generate(model, prompts(5), **{**OPTIONS, **options})

# SPDX-License-Identifier: Apache-2.0
"""What the graph runner does around a graph, without a GPU: widths, rows and keys are rounded up, idle rows fill the rest,
one canvas serves every run. Where a graph would be replayed, the step runs on the graph's own inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import build
from fastdllm.forward import Plan
from fastdllm.runners import cuda_graph
from fastdllm.store import Canvas
from tests.random_models import prompts, random_model

CASES = [
    ("llada", {"cache": "none"}),
    ("llada", {"cache": "prefix"}),
    ("llada", {"cache": "dual", "decoder": "quota", "temperature": 0.7}),
    ("llada", {"cache": "suffix_window", "suffix": 4, "decoder": "frechet"}),
    ("llada", {"cache": "top_rho", "threshold": 0.3}),
    ("llada", {"decoder": "draft_verify"}),
    ("llada", {"cache": "prefix", "threshold": 0.3, "attention_discount": 20}),
    ("llada", {"decoder": "lopa", "cache": "vicinity"}),
    ("llada", {"decoder": "progress_threshold", "cache": "lazy"}),
    ("dream", {"decoder": "adablock"}),
    ("dream", {"decoder": "wino", "keep": 1.0, "threshold": 0.2}),
    ("dream", {"decoder": "joint_threshold", "threshold": 0.2, "editing_threshold": 0.0}),
    ("dream", {"cache": "prefix", "first_token": "rule"}),
    ("v2", {"cache": "block", "reuse_k": 3, "layer_subset": "1", "trim_ratio": 0.4}),
    ("v2", {"cache": "sub_block", "small_block_size": 4}),
    ("v2", {"cache": "fused", "small_block_size": 4}),
    ("v2", {"cache": "block", "threshold": 0.3, "attention_discount": 20, "lossless": 3}),
]


def emulated(self: cuda_graph.Runner, canvas: Canvas, step: Any, name: Any, idle: Plan, noise: Any) -> Any:
    _, rows, shape, _ = name
    host = torch.tensor([idle] * rows)
    noise = None if noise is None else noise.new_full((rows, *noise.shape[1:]), 0.5)
    step(host.clone(), noise, shape)  # the warm-up writes to the idle row only

    def replay() -> None:
        graph.out = step(host.clone(), noise, shape)

    graph = cuda_graph.Graph(SimpleNamespace(replay=replay), host, host, noise, None, name)
    return graph


def graphs(model: fastdllm.Model) -> dict[Any, cuda_graph.Graph]:
    """All that the model's graph runner keeps."""
    return {key: kept for canvas in build.RUNNERS[model]["cuda_graph"].free for key, kept in canvas.graphs.items()}


@pytest.mark.parametrize("family, options", CASES, ids=str)
def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]) -> None:
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    model = random_model(family)
    options = {"gen_length": 29, "stop_ids": (), **options}
    for batch in (prompts(90, 3, 70), prompts(5, 40, 16, 31, 3, 8, 9, 2, 66)):
        eager = fastdllm.generate(model, batch, runner="eager", **options)
        graph = fastdllm.generate(model, batch, runner="cuda_graph", **options)
        assert [s.tolist() for s in graph.sequences] == [s.tolist() for s in eager.sequences]
        assert graph.stats.row_forwards == eager.stats.row_forwards
        assert graph.stats.row_layer_tokens == eager.stats.row_layer_tokens
    assert graphs(model)


def test_a_first_pass_that_fails_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has compiled nothing, so that the next pass of the shape runs eagerly again; so does its capture otherwise."""
    monkeypatch.setattr(cuda_graph, "EAGER_FIRST", 1)
    captures = []

    def capture(self: cuda_graph.Runner, canvas: Canvas, step: Any, name: Any, idle: Plan, noise: Any) -> Any:
        captures.append(canvas.met[name])
        return emulated(self, canvas, step, name, idle, noise)

    monkeypatch.setattr(cuda_graph.Runner, "_capture", capture)
    model, options = random_model(), {"gen_length": 9, "block_length": 9, "steps": 1, "decoder": "quota", "stop_ids": ()}
    batch = prompts(9)
    eager = fastdllm.generate(model, batch, runner="eager", **options)
    network, forward = model.network, model.network.forward
    monkeypatch.setattr(network, "forward", lambda *given: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fastdllm.generate(model, batch, runner="cuda_graph", **options)
    monkeypatch.setattr(network, "forward", forward)
    for _ in range(3):
        answers = fastdllm.generate(model, batch, runner="cuda_graph", **options)
        assert answers.sequences[0].tolist() == eager.sequences[0].tolist()
    assert captures and set(captures) == {1}


@pytest.mark.parametrize("family, options", CASES, ids=str)
def test_eager_passes_and_captured_ones_take_turns(
    monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]
) -> None:
    """A shape's first pass eager, the next ones captured, within one answer and from answer to answer."""
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    monkeypatch.setattr(cuda_graph, "EAGER_FIRST", 1)
    model, batch = random_model(family), prompts(5, 40, 16, 31)
    options = {"gen_length": 29, "stop_ids": (), **options}
    eager = fastdllm.generate(model, batch, runner="eager", **options)
    for _ in range(2):
        graph = fastdllm.generate(model, batch, runner="cuda_graph", **options)
        assert [s.tolist() for s in graph.sequences] == [s.tolist() for s in eager.sequences]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}], ids=str)
def test_the_first_passes_of_a_shape_run_eagerly(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """On the padded shape, so that a step gives the same whether it is captured yet or not; the third is captured."""
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    monkeypatch.setattr(cuda_graph, "EAGER_FIRST", 2)
    model, options = random_model(), {"gen_length": 9, "block_length": 9, "steps": 1, "decoder": "quota", **options}
    batch = prompts(9, 40, 3)
    eager = fastdllm.generate(model, batch, runner="eager", stop_ids=(), **options)
    for times in range(1, 5):
        answers = fastdllm.generate(model, batch, runner="cuda_graph", stop_ids=(), **options)
        assert [s.tolist() for s in answers.sequences] == [s.tolist() for s in eager.sequences]
        assert bool(graphs(model)) == (times > 2)


def test_large_passes_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    monkeypatch.setattr(cuda_graph, "CAPTURED_POSITIONS", 128)
    model = random_model()
    fastdllm.generate(model, prompts(90, 95), cache="dual", gen_length=24, runner="cuda_graph", stop_ids=())
    sizes = {key[2].positions(key[1]) for key in graphs(model)}
    assert sizes and max(sizes) <= 128


def test_prompts_of_other_lengths_share_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    model = random_model()
    for n in range(1, 200, 3):
        fastdllm.generate(model, prompts(n), gen_length=8, runner="cuda_graph", stop_ids=())
    assert len(graphs(model)) <= 1 + 8 + 3  # block steps; openings up to 64 positions; up to 208


def test_rows_are_padded_by_little() -> None:
    for rows in range(1, 300):
        assert rows <= cuda_graph.bucket(rows) <= max(1.5 * rows, rows + 3)
        assert cuda_graph.bucket(rows) <= 1.25 * rows or rows <= 13
    assert len({cuda_graph.bucket(rows) for rows in range(1, 65)}) <= 16


@pytest.mark.parametrize("family, options", CASES, ids=str)
def test_idle_rows_write_to_their_own_unit_only(
    monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]
) -> None:
    """A forward of idle rows alone, as in a warm-up, leaves every place that a request may get as it is."""
    seen = 0

    def capture(self: cuda_graph.Runner, canvas: Canvas, step: Any, name: Any, idle: Plan, noise: Any) -> Any:
        nonlocal seen
        _, rows, shape, _ = name
        noise = None if noise is None else noise.new_full((rows, *noise.shape[1:]), 0.5)
        tensors = [canvas.x, canvas.masked, canvas.logprobs, canvas.committed_at]
        before = [t[cuda_graph.IDLE :].clone() for t in tensors] + [
            t[:, cuda_graph.IDLE :].clone() for t in (canvas.store.k, canvas.store.v)
        ]
        step(torch.tensor([idle] * rows), noise, shape)
        after = [t[cuda_graph.IDLE :] for t in tensors] + [t[:, cuda_graph.IDLE :] for t in (canvas.store.k, canvas.store.v)]
        assert all(same(a, b) for a, b in zip(before, after, strict=True)), shape
        seen += 1
        return emulated(self, canvas, step, name, idle, noise)

    monkeypatch.setattr(cuda_graph.Runner, "_capture", capture)
    options = {"gen_length": 70, "block_length": 32 if family == "v2" else 40, "stop_ids": (), **options}
    fastdllm.generate(random_model(family), prompts(9, 40, 3), runner="cuda_graph", **options)
    assert seen


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(7), b.nan_to_num(7))

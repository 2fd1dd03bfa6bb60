# SPDX-License-Identifier: Apache-2.0
"""The autoregressive baseline decodes what greedy decoding of a causal network is, and the study counts what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm.models import Model
from fastdllm.runners import cuda_graph, eager
from scripts.benchmarks.decode import random_prompts
from scripts.studies import diffusion_pays
from scripts.studies.autoregression import autoregress
from tests.reference.network import PlainNetwork
from tests.runners.test_bucketing import emulated

LENGTH = 12


@pytest.fixture(scope="module")
def model() -> Model:
    return fastdllm.load("tiny-fast-dllm-v2", device="cpu")


def some(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 400, (n,), generator=generator) for n in lengths]


def recomputed(model: Model, prompt: Tensor) -> list[int]:
    """Greedy decoding in which every token costs a forward over all that stands before it, under a causal mask."""
    net, x = PlainNetwork(model), prompt
    for _ in range(LENGTH):
        x = torch.cat([x, net(x, causal=True)[-1:].argmax(-1)])
    return x.tolist()


@pytest.mark.parametrize("lengths", [(1,), (40,), (7, 33, 21)], ids=str)
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_the_baseline_is_greedy_decoding_under_a_causal_mask(
    model: Model, lengths: tuple[int, ...], captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    runner = cuda_graph.Runner() if captured else eager.Runner()
    expected = [recomputed(model, prompt) for prompt in some(*lengths)]
    for _ in range(2):  # a canvas that was used before gives the same
        out = autoregress(model, some(*lengths), LENGTH, runner)
        assert [s.tolist() for s in out.sequences] == expected
    assert out.stats.row_positions == [n + LENGTH - 1 for n in lengths]
    assert out.stats.tokens == LENGTH * len(lengths) and out.stats.tokens_per_forward == 1
    if captured:  # three rows share a graph of four; a step is one position wide, whatever else is rounded up
        assert {(rows, shape.width) for (_, rows, shape, _) in runner.free[0].graphs if shape.width == 1} == {
            (cuda_graph.bucket(len(lengths)), 1)
        }


FEW = {diffusion_pays.SUB: (8 / 3, 8), diffusion_pays.WHOLE: (8 / 3, 32)}


@pytest.fixture
def small(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a small study, which writes to the last of them and loads nothing."""
    monkeypatch.setattr(fastdllm, "load", lambda *_, **__: model)
    monkeypatch.setattr(diffusion_pays, "STEPS", FEW)
    return ["--cpu", "--batches", "2", "1", "--prompt", "20", "--gen", "32", "--output", str(tmp_path / "new" / "pays.json")]


def written(arguments: list[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(Path(arguments[-1]).read_text())
    return report


@pytest.mark.slow
def test_the_study_measures_every_point_and_counts_positions(
    model: Model, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert diffusion_pays.main(small) == 0
    report = written(small)
    rows = {(row["way"], row["batch"], row["per_step"]): row for row in report["rows"]}
    assert not report["missing"] and not report["notes"] and len(rows) == 2 * (1 + sum(map(len, FEW.values())))
    for (way, batch, _), row in rows.items():
        assert row["seconds"] > 0 and row["tokens_per_second"] == pytest.approx(32 * batch / row["seconds"], rel=0.05)
        lengths = [len(prompt) for prompt in random_prompts(model, batch, 20)]
        if way == diffusion_pays.AR:
            assert (row["tokens_per_forward"], row["forwards"]) == (1, 32)
            assert row["positions_per_token"] == pytest.approx(sum(n + 31 for n in lengths) / 32 / batch, abs=1e-3)
        if way == diffusion_pays.WHOLE:  # prompts end in the first block of 32, and every pass computes a whole block
            assert row["positions_per_token"] == pytest.approx(32 / row["tokens_per_forward"], rel=1e-3)
    assert capsys.readouterr().out.count("positions per token") == len(rows)


class Stopped(BaseException):
    """What ends a process, and no point may catch."""


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    """Points cost nothing, and the run is stopped at the next one after so many."""
    done: list[str] = []

    def measure(study: diffusion_pays.Study, way: str, per_step: float, batch: int) -> diffusion_pays.Row:
        if len(done) == stop_after:
            raise Stopped
        done.append(way)
        return diffusion_pays.Row(study.weights, way, round(per_step, 3), batch, 9.0, 2.0, 4.0, 16, 0.5)

    monkeypatch.setattr(diffusion_pays.Study, "measure", measure)


def test_a_run_that_is_stopped_keeps_what_it_measured(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch, stop_after=99)
    assert diffusion_pays.main(small) == 0
    whole = written(small)
    for stop_after in (1, 4):
        counted(monkeypatch, stop_after)
        with pytest.raises(Stopped):
            diffusion_pays.main(["--quantize", "int8", *small])
        report = written(small)
        mine = {name: [row for row in report[name] if row["weights"] == "int8"] for name in ("rows", "missing")}
        assert len(mine["rows"]) == stop_after
        points = [(row["way"], row["per_step"], row["batch"]) for row in mine["rows"] + mine["missing"]]
        assert points == [(row["way"], row["per_step"], row["batch"]) for row in whole["rows"]], "none is left out"
        assert {row["why"] for row in mine["missing"]} == {diffusion_pays.NOT_REACHED}
        assert report["notes"] == {"int8": f"The run was stopped after {stop_after} of its 10 points."}
        assert [row for row in report["rows"] if row["weights"] == "fp32"] == whole["rows"], "other weights' rows are kept"
    counted(monkeypatch, stop_after=99)
    diffusion_pays.main(small)  # of other weights: the note of the stopped ones stays
    assert list(written(small)["notes"]) == ["int8"]
    diffusion_pays.main(["--quantize", "int8", *small])
    assert not written(small)["notes"] and not written(small)["missing"]
    assert [path.name for path in Path(small[-1]).parent.iterdir()] == ["pays.json"]


def test_a_point_that_fails_is_named_and_the_others_go_on(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise torch.OutOfMemoryError("too large\nand more")

    monkeypatch.setattr(diffusion_pays, "autoregress", broken)
    given = ["--cpu", "--batches", "1", "--prompt", "9", "--gen", "8", *small[-2:]]
    assert diffusion_pays.main(given) == 0
    report = written(given)
    assert report["rows"] and "OutOfMemoryError: too large" in capsys.readouterr().out
    assert {(m["way"], m["why"]) for m in report["missing"]} == {(diffusion_pays.AR, "OutOfMemoryError: too large")}
    assert diffusion_pays.main([*given, "--budget", "0"]) == 1, "nothing was measured"
    assert {m["why"] for m in written(given)["missing"]} == {"no time left"}


@pytest.mark.parametrize(
    "rates, found",
    [
        ([(1.5, 50.0), (3.0, 200.0)], (2.1213, "=")),  # halfway between the logarithms
        ([(3.0, 200.0), (1.5, 100.0)], (1.5, "<")),
        ([(1.5, 50.0), (3.0, 99.0)], (3.0, ">")),
        ([], None),
    ],
)
def test_the_crossing_lies_where_the_rates_are_equal(
    rates: list[tuple[float, float]], found: tuple[float, str] | None
) -> None:
    def row(way: str, pace: float, rate: float, weights: str = "bf16") -> dict[str, Any]:
        return {"weights": weights, "batch": 8, "way": way, "tokens_per_forward": pace, "tokens_per_second": rate}

    rows = [row(diffusion_pays.AR, 1.0, 100.0), row(diffusion_pays.AR, 1.0, 1.0, "fp8"), row(diffusion_pays.SUB, 2.0, 1e9)]
    rows += [row(diffusion_pays.WHOLE, *rate) for rate in rates]
    got = diffusion_pays.crossing(rows, "bf16", diffusion_pays.WHOLE, 8)
    assert got == (found and (pytest.approx(found[0], rel=1e-3), found[1]))
    assert diffusion_pays.crossing(rows, "bf16", diffusion_pays.WHOLE, 16) is None


@pytest.mark.gpu
def test_a_captured_baseline_writes_what_the_eager_one_does() -> None:
    # In fp32: in bf16 the two ways round differently, and tokens that are all but equally likely change places.
    model = fastdllm.load("tiny-fast-dllm-v2", device="cuda", dtype=torch.float32)
    prompts = some(7, 33, 21, 60, 4)
    expected = [s.tolist() for s in autoregress(model, prompts, LENGTH, eager.Runner()).sequences]
    runner = diffusion_pays.Captured()
    for _ in range(2):
        assert [s.tolist() for s in autoregress(model, prompts, LENGTH, runner).sequences] == expected
    assert runner.capturing > 0

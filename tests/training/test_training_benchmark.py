# SPDX-License-Identifier: Apache-2.0
"""The training benchmark runs, and counts what a step computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks import training
from scripts.studies.speed_tables import TRAINING, training_cells


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_the_counted_products_are_those_of_a_step(objective: str) -> None:
    """torch counts every pair of a dense mask, so attention is left out of both by a width that makes it small."""
    shape = training.Shape(2, 128, 512, 4, 2, 512, True, rows=2, tokens=32)
    model = training.build(shape, objective, torch.device("cpu"))
    model.gradient_checkpointing_disable()
    with FlopCounterMode(display=False) as counter:
        model(**training.inputs(shape, objective, torch.device("cpu"))).loss.backward()
    assert shape.flops(objective) == pytest.approx(counter.get_total_flops(), rel=0.06)


@pytest.mark.slow
def test_the_kept_cases_are_those_that_were_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, tiny = tmp_path / "training.json", ["--tiny", "--devices", "1", "--tokens", "32", "--output"]
    training.main(["--device", "cpu", "--steps", "1", "--warm_up", "1", *tiny, str(kept)])
    cases = json.loads(kept.read_text())["cases"]
    assert [case["objective"] for case in cases] == list(training.OBJECTIVES)
    for case, line in zip(cases, capsys.readouterr().out.splitlines()[-2:], strict=True):
        assert case["tokens_per_second"] == pytest.approx(32e3 * case["rows"] / case["step_ms"], rel=0.02)
        assert line == f"| {' | '.join(training_cells(case))} |" and case["share_of_matrix_rate"] > 0


def test_a_case_that_fails_says_why_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(shape: training.Shape, objective: str, *_: object) -> tuple[float, float, float]:
        if objective == "causal":
            return 0.5, 1e12, 2.0**30
        raise ProcessRaisedException("torch.OutOfMemoryError: tried to allocate", 0, 0)

    monkeypatch.setattr(training, "run", run)
    kept = tmp_path / "training.json"
    training.main(["--device", "cpu", "--devices", "1", "--shapes", "7B", "--output", str(kept)])
    failed, fine = json.loads(kept.read_text())["cases"]
    assert failed["why"] == "out of memory" and "step_ms" not in failed
    assert fine["step_ms"] == 500 and fine["tokens_per_second"] == 8192 and fine["peak_gib"] == 1
    for line in capsys.readouterr().out.splitlines()[-2:]:
        assert line.count("|") == len(TRAINING) + 1


@pytest.mark.parametrize("argv", [["--tokens", "33"], ["--devices", "0"], ["--shapes", "70B"]])
def test_bad_options_are_named(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        training.main(["--device", "cpu", *argv])
    assert stopped.value.code == 2
    assert argv[1] in capsys.readouterr().err

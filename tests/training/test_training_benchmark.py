# SPDX-License-Identifier: Apache-2.0
"""The training benchmark runs, and counts what a step computes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks import training


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
def test_it_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    training.main(["--device", "cpu", "--tiny", "--devices", "1", "--steps", "1", "--warm_up", "1", "--tokens", "32"])
    table = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" | ")[1] for line in table[-2:]] == list(training.OBJECTIVES)
    assert all(float(line.split(" | ")[5].rstrip(" |")) > 0 for line in table[-2:])


@pytest.mark.parametrize("argv", [["--tokens", "33"], ["--devices", "0"], ["--shapes", "70B"]])
def test_bad_options_are_named(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        training.main(["--device", "cpu", *argv])
    assert stopped.value.code == 2
    assert argv[1] in capsys.readouterr().err

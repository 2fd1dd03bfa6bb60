# SPDX-License-Identifier: Apache-2.0
"""The figure of a trace: drawn from a file or from a question, and an error for anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib")

from fastdllm.trace import Change, Trace, TraceStep
from scripts.studies.plot_trace import draw, main


def test_a_question_becomes_a_trace_and_a_figure(tmp_path: Path) -> None:
    saved, figure = tmp_path / "trace.json", tmp_path / "trace.png"
    options = ["--set", "gen_length=32", "--set", "cache=none"]
    assert main(["--prompt", "3 + 4 =", *options, "--save", str(saved), "-o", str(figure)]) == 0
    first = figure.read_bytes()
    assert first.startswith(b"\x89PNG")
    figure.unlink()
    assert main([str(saved), "-o", str(figure)]) == 0
    assert figure.read_bytes() == first


def test_the_figure_shows_every_token_once() -> None:
    steps = [
        TraceStep(0, 2, 0.1, (Change(1, 7, 0.9),)),
        TraceStep(0, 2, 0.1, (Change(0, 8, None), Change(1, 9, 0.6))),
        TraceStep(2, 4, 0.1, (Change(2, 2, 0.99), Change(3, 2, 0.99))),
    ]
    trace = Trace("m", {}, 3, 6, mask_id=1, stop_ids=(2,), fixed={5: 4}, steps=steps, finished=True)
    order, counts, confidence, _ = draw(trace).axes
    dots = [tuple(point) for drawn in order.collections for point in drawn.get_offsets()]
    assert sorted(dots) == [(0, 2), (1, 2), (2, 3), (3, 3), (5, 0)]
    assert [bar.get_width() for bar in counts.patches] == [1, 1, 2]
    assert len(confidence.collections[0].get_offsets()) == 3


@pytest.mark.parametrize("arguments", [[], ["nowhere.json"], ["x.json", "--prompt", "a"], ["--prompt", "a", "--set", "x=1"]])
def test_anything_else_is_an_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2

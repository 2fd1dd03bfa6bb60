# SPDX-License-Identifier: Apache-2.0
"""The figure of a trace: drawn from a file or from a question, and an error for anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib")

from matplotlib.colors import to_hex

from fastdllm.trace import Change, Trace, TraceStep
from scripts.studies.plot_trace import DOUBT, NOW, draw, main, title


def test_a_question_becomes_a_trace_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved, figure = tmp_path / "trace.json", tmp_path / "trace.png"
    assert main(["--set", "gen_length=64", "--set", "cache=none", "--save", str(saved), "-o", str(figure)]) == 0
    assert "39 tokens in" in capsys.readouterr().out, "the question it asks by itself is one that the model answers"
    assert Trace.load(saved).finish_reason == "stop"
    first = figure.read_bytes()
    assert first.startswith(b"\x89PNG")
    figure.unlink()
    assert main([str(saved), "-o", str(figure)]) == 0
    assert figure.read_bytes() == first


def test_the_figure_shows_every_token_of_the_answer_in_its_forward() -> None:
    steps = [
        TraceStep(0, 2, 0.1, (Change(1, 7, 0.9),)),
        TraceStep(0, 2, 0.1, (Change(0, 8, None), Change(1, 9, 0.4))),
        TraceStep(2, 4, 0.1, (Change(2, 6, 0.99), Change(3, 2, 0.99), Change(4, 2, 0.99))),
    ]
    texts = {6: "$6", 8: "a", 9: "\n", 4: " the"}
    trace = Trace("m", {}, 3, 5, mask_id=1, stop_ids=(2,), fixed={2: 6}, steps=steps, texts=texts, finished=True)
    axis = draw(trace).axes[0]
    boxes = [patch for patch in axis.patches if patch.get_height() == 1 and patch.get_linewidth()]
    drawn = {int(box.get_x()): (box.get_y() + 0.5, to_hex(box.get_facecolor())) for box in boxes}
    assert drawn == {0: (2, NOW), 1: (2, DOUBT), 2: (3, NOW)}, "the end and what follows it are no part of the answer"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "\u21b5", r"\$6"]
    assert len(axis.lines) == 1, "a line where a block begins"


def test_titles_say_what_happened() -> None:
    one = [TraceStep(0, 2, 0.1, (Change(1, 7, 0.9),)), TraceStep(0, 2, 0.1, (Change(0, 8, 0.9),))]
    assert title(Trace("m", {}, 1, 2, 1, (2,), steps=one)) == "m: 2 tokens in 2 forwards, not left to right"
    both = [TraceStep(0, 2, 0.1, (Change(0, 7, 0.9), Change(1, 8, 0.9)))]
    assert title(Trace("m", {}, 1, 2, 1, (2,), steps=both)) == "m: 2 tokens in 1 forwards, 2.0 a forward, left to right"
    ended = [TraceStep(0, 2, 0.1, (Change(0, 2, 0.9), Change(1, 2, 0.9)))]
    assert "an empty answer" in title(Trace("m", {}, 1, 2, 1, (2,), steps=ended))
    draw(Trace("m", {}, 1, 2, 1, (2,), steps=ended))


@pytest.mark.parametrize(
    "arguments", [["--model", "nowhere"], ["nowhere.json"], ["x.json", "--prompt", "a"], ["--prompt", "a", "--set", "x=1"]]
)
def test_anything_else_is_an_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2

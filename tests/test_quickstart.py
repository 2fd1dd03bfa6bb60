# SPDX-License-Identifier: Apache-2.0
"""How the quick start runs its evaluations: some at a time, in the order of its rows, and none left when one fails."""

from __future__ import annotations

import json
import sys

import pytest

from scripts import quickstart

# What stands in for an evaluation: it leaves results, or says what is wrong and fails, or takes for ever.
EVALUATION = """
import json, pathlib, sys, time
folder, label = pathlib.Path(sys.argv[1]), sys.argv[2]
print("progress of", label, file=sys.stderr, flush=True)
if label == "preset paper":
    sys.exit(3)
time.sleep({"one token per step": 0.5, "preset exact": 600}.get(label, 0))
speed = {"samples": 2, "nfe": 4.0, "tokens_per_forward": 1.0, "tokens_per_second": len(label)}
(folder / "results_1.json").write_text(json.dumps({"config": {"speed": speed}}))
lines = [{"doc_id": i, "exact_match": float(i), "filter": kind} for i in (1, 0) for kind in ("strict-match", "other")]
(folder / "samples_1.jsonl").write_text("\\n".join(map(json.dumps, lines)))
"""


@pytest.fixture(autouse=True)
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[quickstart.Evaluation]:
    """Those that were begun."""
    begun: list[quickstart.Evaluation] = []

    class Noted(quickstart.Evaluation):
        def __init__(self, *args: object) -> None:
            begun.append(self)
            super().__init__(*args)

    monkeypatch.setattr(quickstart, "Evaluation", lambda *args, progress: Noted(*args, progress))
    monkeypatch.setattr(
        quickstart, "command", lambda run, limit, batch, folder: [sys.executable, "-c", EVALUATION, folder, run.label]
    )
    return begun


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_rows_come_in_their_order_whichever_ends_first(jobs: int, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["one_a_step", "fast", "balanced"]
    rows = quickstart.measure(names, 2, 16, jobs)
    assert list(rows) == names and [row["setting"] for row in rows.values()] == [quickstart.RUNS[n].label for n in names]
    assert all(row["solved"] == [0.0, 1.0] and row["tokens_per_second"] == len(row["setting"]) for row in rows.values())
    told = capfd.readouterr().err
    assert told.count(": done, ") == 3
    assert told.count("progress of") == (3 if jobs == 1 else 1), "side by side, only the first shows its progress"


def test_one_that_fails_ends_the_others_and_says_why(
    evaluations: list[quickstart.Evaluation], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"the run 'paper' failed \(exit status 3\)"):
        quickstart.measure(["exact", "paper", "fast"], 2, 16, 2)
    assert "progress of preset paper" in capfd.readouterr().err
    assert [evaluation.name for evaluation in evaluations] == ["exact", "paper"]
    assert all(evaluation.process.poll() is not None for evaluation in evaluations)


def test_two_settings_share_a_cpu_and_none_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, gpu, expected in ((1, False, 1), (2, False, 2), (64, False, 2), (None, False, 1), (64, True, 1)):
        monkeypatch.setattr(quickstart.os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(quickstart.torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert quickstart.at_once() == expected


def test_the_conditions_of_a_run_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    quickstart.main(["--only", "fast", "balanced", "fast", "--limit", "2", "--jobs", "2", "--output", str(tmp_path)])
    saved = json.loads((tmp_path / "quickstart.json").read_text())
    assert list(saved["settings"]) == ["fast", "balanced"]
    assert "2 problems, batches of 16, 2 settings at a time, " in saved["where"]
    assert saved["where"] in capsys.readouterr().out

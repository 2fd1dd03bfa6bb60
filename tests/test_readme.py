# SPDX-License-Identifier: Apache-2.0
"""The Python of README and of a page prints what stands below it; links and figures are those of the tree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = README + (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", SHOWN, re.MULTILINE | re.DOTALL)


def test_every_python_block_has_its_output() -> None:
    assert len(EXAMPLES) == SHOWN.count("```python") >= 2 and "```python" in README


@pytest.mark.parametrize(("code", "output"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_a_block_prints_what_stands_below_it(code: str, output: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == output
    assert "#### 39" in output, "the shipped model answers the question rightly"


def test_figures_of_accuracy_are_in_the_data() -> None:
    """Cells such as `94.6 %, 110.5` and the presets' rows, against docs/frontier.json."""
    studies = json.loads((ROOT / "docs" / "frontier.json").read_text(encoding="utf-8"))["studies"]
    rows = [row for study in studies if study["template"] == "chat" for row in study["settings"]]
    pairs = {(f"{100 * row['accuracy']:.1f}", f"{row['forwards']:.1f}") for row in rows}
    cells = re.findall(r"\| (\d+\.\d) %, (\d+\.\d)", README)
    assert len(cells) >= 12 and set(cells) <= pairs
    of_model = {study["model"]: study["settings"] for study in studies if study["template"] == "chat"}
    shown = re.findall(r"^\| (tiny-[\w-]+) \|.*\| (\d+\.\d) %, (\d+\.\d) \|$", README, re.MULTILINE)
    assert {name for name, *_ in shown} == of_model.keys(), "the last column is that of `balanced`"
    for name, *cell in shown:
        (row,) = (row for row in of_model[name] if row["preset"] == "balanced")
        assert cell == [f"{100 * row['accuracy']:.1f}", f"{row['forwards']:.1f}"], name
    first = {row["preset"]: row for row in studies[0]["settings"] if row["preset"]}
    for name, row in first.items():
        cell = f"| {100 * row['difference']:.1f} | {row['forwards']:.1f} | {row['positions']:,.0f} |"
        assert any(line.startswith(f"| `{name}` |") and line.endswith(cell) for line in README.splitlines()), (name, cell)


def test_figures_of_speed_are_in_the_data() -> None:
    data = json.loads((ROOT / "docs" / "speed.json").read_text(encoding="utf-8"))
    table = README.partition("| | published code |")[2].partition("\n\n")[0]
    shown = {float(number.replace(",", "")) for number in re.findall(r"(?<![a-z])\d[\d,.]*", table)}
    known = {row["prompt_1000"] for row in data["tokens_per_second"]}
    known |= {times["block of 32"] for times in data["forward_ms"].values()} | {32}
    assert shown == known
    rate = {(row["code"], row["weights"], row["batch"]): row["prompt_1000"] for row in data["tokens_per_second"]}
    times = rate["fastdllm", "bf16", 1] / rate["published", "bf16", 1]
    assert round(times) == 8 and "writes eight times as many" in README


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/*.md")]
    for page in pages:
        found = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        links = [link for link in found if "://" not in link]
        assert not [link for link in links if not (page.parent / link).exists()], page.name

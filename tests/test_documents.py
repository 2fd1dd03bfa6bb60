# SPDX-License-Identifier: Apache-2.0
"""Pages that a command writes are up to date, and figures in other pages are those of the data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fastdllm
from fastdllm.models.supported import SUPPORTED
from scripts import quickstart
from scripts.studies import figures, memory

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_tables_of_all_settings_are_up_to_date() -> None:
    assert read("docs/frontier_tables.md") == figures.tables_page(), "run: python -m scripts.studies.figures tables"


def test_the_table_of_the_quick_start_is_up_to_date() -> None:
    assert read("docs/quickstart.md") == figures.quickstart_page(), "run: python -m scripts.studies.figures quickstart"
    rows = figures.data("quickstart")["settings"]
    assert tuple(rows) == quickstart.SHOWN and all(len(row["solved"]) == 100 for row in rows.values())


def test_the_page_on_memory_is_up_to_date() -> None:
    assert memory.main(["--check"]) == 0, "run: python -m scripts.studies.memory"


@pytest.mark.parametrize("part", ["speed", "frontier", "sudoku", "reuse"])
def test_a_picture_is_drawn(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    monkeypatch.setattr(figures, "save", lambda figure, name: figure.savefig(tmp_path / f"{name}.png", dpi=40))
    figures.main([part])
    assert (tmp_path / f"{part}.png").stat().st_size > 1000


def test_figures_of_the_presets_are_in_the_data() -> None:
    """The first table of docs/frontier.md, row by row."""
    page = (
        (ROOT / "docs" / "frontier.md").read_text(encoding="utf-8").partition("| model | preset |")[2].partition("\n\n")[0]
    )
    known = set()
    for study in figures.data("frontier")["studies"]:
        for row in study["settings"]:
            end = f"| {row['forwards']:.1f} | {row['positions']:,.0f} | {row['tokens_per_second']:,.0f} |"
            known.add((f"{100 * row['accuracy']:.1f} %", end))
    rows = [line for line in page.splitlines() if " % |" in line]
    assert len(rows) == 12
    for line in rows:
        accuracy = line.split("|")[3].strip()
        assert any(accuracy == right and line.endswith(end) for right, end in known), line


def test_the_page_on_models_lists_the_supported_ones() -> None:
    listed = re.findall(
        r"^\| \[([^\]]+)\]\(https://huggingface.co/\1\) \| `(\w+)`", (ROOT / "docs" / "models.md").read_text(), re.M
    )
    assert listed == [(model.id, model.family) for model in SUPPORTED]


def test_figures_of_layer_reuse_are_in_the_data() -> None:
    table = re.findall(
        r"^\| (k=[^|]+) \| ([\d.]+) % \|.*\| ([\d.]+) % \| ([\d.]+) \|$", (ROOT / "v2" / "README.md").read_text(), re.M
    )
    data = json.loads(read("docs/reuse.json"))["settings"]
    listed = [(name.removesuffix(" (ablation)"), *map(float, rest)) for name, *rest in table]
    assert listed == [(row["setting"], row["accuracy"], row["share"], row["forwards"]) for row in data]


def test_the_quick_start_compares_on_the_same_problems() -> None:
    def row(setting: str, solved: list[float], speed: float) -> quickstart.Row:
        return {"setting": setting, "solved": solved, "samples": 4, "nfe": 2.0, "tokens_per_second": speed}

    rows = {"one_a_step": row("one", [1.0, 1.0, 0.0, 1.0], 10.0), "fast": row("fast", [1.0, 0.0, 0.0, 1.0], 45.0)}
    quickstart.compare(rows)
    assert (rows["fast"]["accuracy"], rows["fast"]["difference"], rows["fast"]["speedup"]) == (0.5, -25.0, 4.5)
    assert rows["fast"]["low"] <= -25.0 <= rows["fast"]["high"] <= 0
    first, _, one, fast = quickstart.table(rows).splitlines()
    assert "difference" in first and "75.0%" in one and "-25.0 (" in fast and "4.5" in fast
    assert not re.search(r"\(.*\)", one), "the reference has no difference from itself"


def test_every_row_of_the_quick_start_is_a_setting() -> None:
    import fastdllm

    for run in quickstart.RUNS.values():
        fastdllm.DecodeConfig(**dict(option.split("=") for option in run.options.split(",")))
        assert quickstart.RUNS[run.reference].model == run.model


def test_the_page_on_the_api_has_every_public_name() -> None:
    listed = re.findall(r"^::: fastdllm\.(?:\w+\.)?(\w+)$", read("docs/api.md"), re.M)
    assert sorted(listed) == sorted(fastdllm.__all__)


def test_lines_that_explain_arguments_become_a_list() -> None:
    pytest.importorskip("griffe", reason="the documentation needs mkdocstrings")
    from scripts.docstrings import as_list

    text = "What it does.\n\nfirst, second: two of them,\n    on two lines.\nthird: one.\nother: no argument."
    text += "\n\nRaises: nothing."
    shown = as_list(text, {"first", "second", "third", "unused"})
    assert shown.splitlines() == [
        "What it does.",
        "",
        "* `first`, `second`: two of them,",
        "    on two lines.",
        "* `third`: one.",
        "other: no argument.",
        "",
        "Raises: nothing.",
    ]
    assert as_list("One line.\nfirst: of them.", {"first"}) == "One line.\n\n* `first`: of them."

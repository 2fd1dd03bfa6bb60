# SPDX-License-Identifier: Apache-2.0
"""Pages that a command writes are up to date, and figures in other pages are those of the data."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import fastdllm
from fastdllm.cli import COMMANDS
from fastdllm.models.supported import SUPPORTED
from scripts import quickstart
from scripts.studies import figures, memory, tables
from scripts.studies.accuracy_tables import all_settings
from scripts.studies.diffusion_pays import AR, STEPS

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*tables.PAGES, "docs/frontier_tables.md"])
def test_the_tables_of_a_page_are_those_of_the_data(page: str) -> None:
    assert read(page) == tables.pages()[page], "run: python -m scripts.studies.tables"


@pytest.mark.parametrize("page", tables.PAGES)
def test_no_measured_table_is_kept_by_hand(page: str) -> None:
    """A column of percents, milliseconds, intervals or rates outside the marks would be one."""
    rest = tables.BLOCK.sub("", read(page))
    rows = [line for line in rest.splitlines() if re.search(r"\|[^|]*\d(\.\d+)? (%|ms|us|x|GB|points)\b.*\|", line)]
    assert not rows
    assert not [line for line in rest.splitlines() if re.search(r"\([-+]\d+\.\d, [-+]\d+\.\d\) *\|", line)]


def test_every_table_of_the_data_is_shown_on_one_page() -> None:
    shown = [found["name"] for page in tables.PAGES for found in tables.BLOCK.finditer(read(page))]
    prose = {"two_gpus", "rebuilt_engine"}  # a single figure each, in a sentence of docs/performance.md
    assert sorted(shown) == sorted(tables.TABLES.keys() - prose)


def test_an_unknown_table_and_an_old_page_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", ("page.md",))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "frontier_tables.md").write_text(all_settings(), encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("<!-- table sudoku: from docs/sudoku.json -->\nstale\n<!-- end -->\n", encoding="utf-8")
    assert tables.main(["--check"]) == 1 and "stale" in page.read_text()
    assert tables.main([]) == 0 and "| threshold 0.9 |" in page.read_text() and "stale" not in page.read_text()
    assert tables.main(["--check"]) == 0
    page.write_text("<!-- table speeed: x -->\n\n<!-- end -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md: unknown table 'speeed'; allowed are presets"):
        tables.main(["--check"])


def test_every_part_of_the_recorded_data_names_its_command() -> None:
    for name, section in figures.data("measured")["sections"].items():
        assert re.match(r"(python -m (scripts|fastdllm)\.|accelerate launch )", section["command"]), name
        assert re.search(r"20\d\d-\d\d", section["measured"]), name


def test_the_table_of_the_quick_start_has_a_hundred_problems_in_each_row() -> None:
    rows = figures.data("quickstart")["settings"]
    assert tuple(rows) == quickstart.SHOWN and all(len(row["solved"]) == 100 for row in rows.values())


PROSE = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("v2/*/*.md")})


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_name_what_is_there(page: Path) -> None:
    """Modules, scripts, subcommands and data of a checkout; a path may also start at the page's own folder."""
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:scripts|fastdllm|llada|dream|v2)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for script in re.findall(r"(?:python|bash|source) ((?!-)[\w./]+\.(?:py|sh))\b", text):
        assert (ROOT / script).is_file() or (page.parent / script).is_file(), script
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        assert set(re.findall(r"^(?:\w+=\S+ )*fastdllm (\w+)", block, re.M)) <= COMMANDS.keys()
    for data in re.findall(r"\b(?:DATA|--data|--held_out)[= ](fastdllm/\S+)", text):
        assert (ROOT / data).is_file(), data


def test_the_page_on_memory_is_up_to_date() -> None:
    assert memory.main(["--check"]) == 0, "run: python -m scripts.studies.memory"


def test_every_point_of_when_diffusion_pays_is_measured_or_missing() -> None:
    report = figures.data("when_diffusion_pays")
    listed = [(row["weights"], row["way"], row["per_step"], row["batch"]) for row in report["rows"] + report["missing"]]
    batches, weights = {row["batch"] for row in report["rows"]}, {row["weights"] for row in report["rows"]}
    paces = [(AR, 1.0), *((way, round(pace, 3)) for way, paces in STEPS.items() for pace in paces)]
    assert sorted(listed) == sorted((kind, *pace, batch) for kind in weights for pace in paces for batch in batches)


@pytest.mark.parametrize(
    "part, picture", [*((part, part) for part in ("speed", "frontier", "sudoku", "reuse")), ("pays", "when_diffusion_pays")]
)
def test_a_picture_is_drawn(part: str, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    monkeypatch.setattr(figures, "save", lambda figure, name: figure.savefig(tmp_path / f"{name}.png", dpi=40))
    figures.main([part])
    assert (tmp_path / f"{picture}.png").stat().st_size > 1000


def test_no_line_is_drawn_over_a_batch_that_was_not_measured() -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    _, (rates, ratios) = figures.new(6, 3, 2)
    found = {batch: {"tokens_per_second": 300.0 * batch, "tokens_per_forward": 3.0} for batch in (1, 32)}
    baseline = {1: 100.0, 8: 700.0, 32: 10000.0}
    figures.rates_of(rates, [1, 8, 32], baseline, [found])
    assert [list(line.get_ydata()) for line in rates.lines] == [
        pytest.approx([300.0, math.nan, 9600.0], nan_ok=True),
        [100.0, 700.0, 10000.0],
    ]
    figures.ratios_of(ratios, [1, 8, 32], baseline, [found])
    assert [text.get_text() for text in ratios.texts] == ["3.0 x", "not\nmeasured", "0.96 x"]


def test_the_page_on_models_lists_the_supported_ones() -> None:
    listed = re.findall(
        r"^\| \[([^\]]+)\]\(https://huggingface.co/\1\) \| `(\w+)`", (ROOT / "docs" / "models.md").read_text(), re.M
    )
    assert listed == [(model.id, model.family) for model in SUPPORTED]


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

# SPDX-License-Identifier: Apache-2.0
"""The notebooks of examples/ run from top to bottom and keep their outputs; the programs run and answer rightly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PROGRAMS = sorted(set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "serve_client.py"})  # tests/serving


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_its_outputs(path: Path) -> None:
    """They are what a reader of the repository sees; an error or a warning is none of them."""
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    shown = [output for cell in cells for output in cell["outputs"]]
    assert len(shown) >= 3 and all(cell["execution_count"] for cell in cells)
    assert not [o for o in shown if o["output_type"] == "error" or o.get("name") == "stderr"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_runs(path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "#### 39" in done.stdout or "#### 478" in done.stdout, "the shipped model answers the question rightly"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_keeps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run from top to bottom it prints, cell by cell, what readers of the repository see."""
    nbformat = pytest.importorskip("nbformat", reason="running notebooks needs nbclient")
    nbclient = pytest.importorskip("nbclient", reason="running notebooks needs nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(path, as_version=4)
    kept = shown(notebook)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": path.parent}}).execute()
    assert shown(notebook) == kept


def shown(notebook: Any) -> list[tuple[str, int]]:
    """Of each cell the text that it printed, and how many figures it drew."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(output.get("text", "") for output in outputs) for outputs in cells]
    return list(zip(texts, [sum(o.output_type == "display_data" for o in outputs) for outputs in cells], strict=True))

# SPDX-License-Identifier: Apache-2.0
"""docs/add_a_decoder.md, followed literally: write its files, run its test commands, use what was added."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastdllm import registry

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "add_a_decoder.md"


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_notebook_runs_from_top_to_bottom(capsys: pytest.CaptureFixture) -> None:
    cells = [block for block in code("python") if not block.startswith("# fastdllm/")]
    notebook = types.ModuleType("notebook")
    sys.modules["notebook"] = notebook  # where dataclasses look up the types of fields
    try:
        for cell in cells:
            exec(cell, vars(notebook))
    finally:
        registry.unregister("decoders", "relative")
        del sys.modules["notebook"]
    assert "= 39 pencils" in capsys.readouterr().out
    assert len(cells) == 3 and sum("--import my_rules" in line for line in "".join(code("bash")).splitlines()) == 5


@pytest.mark.slow
def test_the_page_works_as_it_stands(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("__pycache__", "tiny", "*.jsonl")
    for folder in ("fastdllm", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    written = []
    for block in (block for block in code("python") if block.startswith("# fastdllm/")):
        path, text = block.split("\n", 1)
        written.append(tmp_path / path.removeprefix("# "))
        assert not written[-1].exists(), f"{path} exists already; the page needs another example"
        written[-1].write_text(text, encoding="utf-8")
    assert [p.parent.name for p in written] == ["decoders", "caches"]

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    commands = [shlex.split(line) for line in "\n".join(code("bash")).splitlines() if "pytest" in line]
    assert len(commands) == 2
    for command in commands:
        command = [sys.executable, *command[1:], "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert " passed" in done.stdout

# SPDX-License-Identifier: Apache-2.0
"""docs/add_a_model.md, followed literally: write its files, add its line, run its command. A family is a short file."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdllm.models import FAMILIES
from tests.published_checkpoints import ADDED, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "add_a_model.md"
LONGEST = 80  # lines of a family's file


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_page_works_as_it_stands(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("__pycache__", "tiny", "*.jsonl")
    for folder in ("fastdllm", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    files = [block.split("\n", 1) for block in code("python") if block.startswith("# ")]
    (line,) = (block for block in code("python") if not block.startswith("# "))
    for first, text in files:
        path = tmp_path / first.removeprefix("# ")
        assert not path.exists(), f"{path} exists already; the page needs another example"
        path.write_text(text, encoding="utf-8")
    assert [first.split("/")[0] for first, _ in files] == ["# fastdllm", "# tests"]
    assert len(files[0][1].splitlines()) <= LONGEST

    register = tmp_path / "fastdllm" / "models" / "__init__.py"
    head = "FAMILIES = {\n"
    assert register.read_text(encoding="utf-8").count(head) == 1
    register.write_text(register.read_text(encoding="utf-8").replace(head, head + line), encoding="utf-8")

    (command,) = (shlex.split(line) for block in code("bash") for line in block.splitlines())
    command = [sys.executable, *command[1:], "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "2 passed" in done.stdout


@pytest.mark.parametrize("family", sorted(ADDED))
def test_a_new_family_may_have_the_network_of_any_other(tmp_path: Path, family: str) -> None:
    """The page's helper writes that network's tensors, whatever the new family is called."""
    own = {"model_type": "brook", "architectures": ["BrookForCausalLM"]}
    invented = write_checkpoint(tmp_path / "invented", family, tokenizer=False, **own)
    assert list(invented) == list(write_checkpoint(tmp_path / "known", family, tokenizer=False))
    assert json.loads((tmp_path / "invented" / "config.json").read_text()).items() >= own.items()


@pytest.mark.parametrize("file", sorted(set(FAMILIES.values())))
def test_a_family_is_a_short_file(file: str) -> None:
    lines = (ROOT / "fastdllm" / "models" / f"{file}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST

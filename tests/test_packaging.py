# SPDX-License-Identifier: Apache-2.0
"""What `pip install` puts on somebody's machine: the core with its data, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastdllm

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")

ROOT = Path(__file__).resolve().parents[1]


def _tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.slow
def test_the_wheel_holds_the_core_with_its_data_and_nothing_else(tmp_path: Path) -> None:
    # From a copy: setuptools leaves a build folder in the tree it builds, and reuses what it finds there.
    for name in _tracked():
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    done = subprocess.run(build, cwd=tmp_path / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        described = archive.read(metadata).decode()
    assert packed == {name for name in _tracked() if name.startswith("fastdllm/")}
    assert "Requires-Python: >=3.10" in described and "License-Expression: Apache-2.0" in described


def test_the_lock_pins_what_the_project_declares() -> None:
    """One exact version of each package an interpreter can choose, and a pin for every dependency of every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in declared} - {"fastdllm"}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    assert not [str(pin) for pin in pins if len(pin.specifier) != 1 or next(iter(pin.specifier)).operator != "=="]
    for python in ("3.10", "3.11", "3.13"):
        machine = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
        chosen = [pin.name.lower() for pin in pins if pin.marker is None or pin.marker.evaluate(machine)]
        assert len(chosen) == len(set(chosen))
        assert not names - set(chosen)


def test_the_version_stands_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and "version" in project["dynamic"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is None or cited[1] == fastdllm.__version__
    assert f"## {fastdllm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_pre_commit_runs_the_pinned_ruff() -> None:
    hook = re.search(r"ruff-pre-commit\n +rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hook and f"\nruff=={hook[1]}\n" in (ROOT / "requirements.txt").read_text()


PROGRAM = """#!/bin/sh
echo "$(basename "$0") $* links=$UV_FIND_LINKS" >> "$LOG"
case "$(basename "$0") $*" in
    *"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/bin/activate" ;;
    "python "*" uv") cp "$0" "$(dirname "$0")/uv" ;;
    "uv "*) exit "$UV_STATUS" ;;
esac
"""


@pytest.mark.parametrize(
    ("found", "status", "installers"),
    [
        (False, 0, ["python torch", "python uv", "uv rest"]),  # pip brings uv
        (True, 0, ["uv torch", "uv rest"]),
        (False, 1, ["python torch", "python uv", "uv rest", "python rest"]),
        (True, 1, ["uv torch", "python torch", "uv rest", "python rest"]),
    ],
)
def test_the_environment_gets_torch_first_with_every_pin_of_it(
    found: bool, status: int, installers: list[str], tmp_path: Path
) -> None:
    """A lock for several interpreters pins torch in several lines, of which pip and uv pick one by its marker."""
    tree, programs, log = tmp_path / "tree", tmp_path / "bin", tmp_path / "log"
    (tree / "scripts").mkdir(parents=True)
    programs.mkdir()
    for name in ("scripts/setup_env.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    pins = ["torch==2.14.1 ; python_full_version < '3.11'", "torch==2.15.0 ; python_full_version >= '3.11'"]
    (tree / "requirements.txt").write_text("\n".join(["numpy==2.0.0", *pins]) + "\n")
    for name in ("python3", *(["uv"] if found else [])):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}:/usr/bin:/bin", "LOG": str(log), "UV_STATUS": str(status), "PIP_FIND_LINKS": "/wheels"}
    done = subprocess.run(
        ["bash", "-c", "source scripts/setup_env.sh studies"], cwd=tree, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pinned = f"--constraint {tree}/requirements.txt"
    ends = {"torch": " ".join(pins), "uv": f"{pinned} uv", "rest": f"{pinned} --editable {tree}[studies]"}
    installs = [line for line in log.read_text().splitlines() if " install " in line]
    for line, (tool, what) in zip(installs, map(str.split, installers), strict=True):
        links = "/wheels" if tool == "uv" else ""  # pip reads its variable itself
        assert line.startswith(f"{tool} ") and line.endswith(f"{ends[what]} links={links}")
        # In the tree uv would read [tool.uv] of pyproject.toml, by which torch comes without its CUDA libraries.
        assert tool == "python" or "--directory / " in line
    assert done.stderr.count("going on with pip") == status * sum(line.startswith("uv") for line in installers)

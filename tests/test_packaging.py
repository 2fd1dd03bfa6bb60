# SPDX-License-Identifier: Apache-2.0
"""What `pip install` puts on somebody's machine: the core with its data, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_pinned_requirements_name_torch_first_and_every_version_exactly() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split(";")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    assert lines[0] == pins[0] == "torch==2.13.0"
    assert [pin for pin in pins if pin.count("==") != 1] == []
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(names) == len(set(names))

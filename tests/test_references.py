# SPDX-License-Identifier: Apache-2.0
"""What documents, docstrings and comments name exists: modules and their members, files and folders, commands."""

from __future__ import annotations

import importlib
import re
import subprocess
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = ("fastdllm", "llada", "dream", "v2", "scripts", "tests", "docs", "examples")
PATH = r"[\w.-]+(?:/[\w.-]+)*"
# A file of transformers; a name that is not to be used; a module that the reader writes.
ELSEWHERE = {"tokenization_qwen2.py", "utils.py", "my_rules.py"}


@cache
def tracked() -> frozenset[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    return frozenset(name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file())


@cache
def places() -> frozenset[str]:
    """Every tracked file and folder, and each of their endings: `decoders/wino.py` for fastdllm/decoders/wino.py."""
    whole = {str(p) for name in tracked() for p in (PurePosixPath(name), *PurePosixPath(name).parents)}
    return frozenset("/".join(p.split("/")[i:]) for p in whole for i in range(p.count("/") + 1))


def texts() -> list[str]:
    return sorted(name for name in tracked() if name.endswith((".md", ".py", ".sh", ".css", ".toml")))


def resolves(dotted: str) -> bool:
    """Whether `a.b.C.d` is a module, or a member of one."""
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError as error:
            if error.name and not dotted.startswith(error.name):
                return True  # a library that is not installed here
            continue
        for part in parts[i:]:
            fields = getattr(found, "__dataclass_fields__", {})
            annotations = getattr(found, "__annotations__", {})
            if not hasattr(found, part):
                return part in fields or part in annotations
            found = getattr(found, part)
        return True
    return False


def exists(path: str, folder: Path) -> bool:
    path = path.rstrip("/")
    return path in places() or path in ELSEWHERE or (folder / path).exists()


def missing(text: str, folder: Path = ROOT) -> list[str]:
    """What the text of a file in `folder` refers to and is not there."""
    quoted = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    dotted = {word for word in quoted if re.fullmatch(r"fastdllm(\.\w+)+(\(\))?", word)}
    files = {word for word in quoted if re.fullmatch(rf"{PATH}\.(py|sh|md|ipynb)", word)}
    files |= {word for word in quoted if re.fullmatch(rf"({'|'.join(TOP)})/[\w./-]*", word)}
    modules = set(re.findall(rf"\bpython -m ((?:{'|'.join(TOP)})(?:\.\w+)*)", text))
    files |= set(re.findall(rf"\b(?:python|bash|launch) ((?:{'|'.join(TOP)})/{PATH}\.(?:py|sh))", text))
    found = [word for word in sorted(dotted | modules) if not resolves(word.removesuffix("()"))]
    return found + [word for word in sorted(files) if not exists(word, folder)]


@pytest.mark.parametrize("name", [name for name in texts() if name != "CHANGELOG.md"])  # which names what is gone
def test_what_a_file_names_is_there(name: str) -> None:
    path = ROOT / name
    if path != Path(__file__):
        assert not missing(path.read_text(encoding="utf-8"), path.parent)


def test_a_name_that_is_gone_is_found() -> None:
    gone = ["fastdllm.DecodeConfig.gone", "fastdllm.gone", "gone.py", "scripts.gone", "scripts/gone.sh", "tests/gone.py"]
    text = "`fastdllm.DecodeConfig.gone` `fastdllm.gone` `gone.py` `tests/gone.py` "
    text += "python -m scripts.gone, bash scripts/gone.sh:"
    there = "`fastdllm.load()` `fastdllm.Output.texts` `tests/` `wino.py` python -m scripts.quickstart. bash scripts/test.sh"
    assert sorted(missing(f"{text} {there}")) == gone

# SPDX-License-Identifier: Apache-2.0
"""The layout and import directions of the project, read off the tree itself.

A rule that only a document states is broken within a month; these fail on the commit that breaks them.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest

from tests.processes import python, without

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "fastdllm"
PACKAGES = ("llada", "dream", "v2")
SIBLINGS = ("engine", "models", "decoders", "caches", "sampling", "runners")
EXTRAS = [
    "triton",
    "transformers",
    "lm_eval",
    "datasets",
    "accelerate",
    "peft",
    "rich",
    "matplotlib",
    "tqdm",
    "fastapi",
    "uvicorn",
    "pydantic",
    "prometheus_client",
    "ray",
]
ABOVE = {("engine", "sampling")}  # the engine takes the sampler apart; nothing imports the engine
SYNC_CALLS = ("item", "tolist", "cpu", "nonzero")
SYNC_FREE = ("engine", "models", "caches", "kernels", "decoders")


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    # A file deleted in the working tree but not yet in a commit is still listed.
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, except what stands under `if TYPE_CHECKING:` and is never executed."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from runtime_nodes(child)


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of everything the file imports when run, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names: set[str] = set()
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from fastdllm import engine` imports a module, `from fastdllm.engine import run` a name of it.
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return frozenset(names)


def imports_any(path: Path, *modules: str) -> set[str]:
    return {name for name in imports(path) for module in modules if f"{name}.".startswith(f"{module}.")}


def part_of_core(path: Path) -> str:
    return path.relative_to(CORE).with_suffix("").parts[0]


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("part", SIBLINGS)
def test_siblings_do_not_import_one_another(part: str) -> None:
    others = [f"fastdllm.{other}" for other in SIBLINGS if other != part and (part, other) not in ABOVE]
    files = [path for path in python_files(CORE) if part_of_core(path) == part]
    assert files, f"fastdllm/{part} is gone; the rule about it needs a new home"
    assert not {str(path): names for path in files if (names := imports_any(path, *others))}


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in python_files(CORE / "kernels"):
        foreign = {name for name in imports(path) if name.split(".")[0] not in allowed}
        assert not {name for name in foreign if not name.startswith("fastdllm.kernels")}, path


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("lm_eval", ("fastdllm/evaluation/",)),
        ("transformers", ("fastdllm/models/tokenizer.py", "fastdllm/training/")),
        ("triton", ("fastdllm/kernels/",)),
        ("peft", ("fastdllm/training/",)),
        ("rich", ("fastdllm/ui/screen.py",)),
        ("fastapi", ("fastdllm/serving/app.py",)),
        ("uvicorn", ("fastdllm/serving/command.py",)),
        ("pydantic", ("fastdllm/serving/",)),
        ("prometheus_client", ("fastdllm/serving/",)),
        ("ray", ("fastdllm/serving/ray_app.py",)),
    ],
)
def test_heavy_libraries_stay_in_their_place(library: str, homes: tuple[str, ...]) -> None:
    users = relative([path for path in python_files(CORE) if imports_any(path, library)])
    assert not [user for user in users if not user.startswith(homes)]


def test_packages_use_lm_eval_only_in_their_evaluation_entry() -> None:
    for package in PACKAGES:
        users = [path.name for path in python_files(ROOT / package) if imports_any(path, "lm_eval")]
        assert not [name for name in users if not name.startswith("eval")]


def test_the_core_imports_no_leaf() -> None:
    for path in python_files(CORE):
        assert not imports_any(path, "scripts", "tests", *PACKAGES), path


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_do_not_import_each_other(package: str) -> None:
    others = [other for other in PACKAGES if other != package]
    for path in python_files(ROOT / package):
        assert not imports_any(path, *others, "scripts", "tests"), path


def test_import_fastdllm_needs_torch_and_safetensors_alone() -> None:
    code = without(*EXTRAS) + "import fastdllm\nassert all(getattr(fastdllm, name) for name in fastdllm.__all__)\n"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_every_source_file_names_its_licence() -> None:
    sources = [path for path in tracked() if path.suffix in {".py", ".sh", ".cu", ".cpp", ".css", ".js"}]
    sources += [path for path in tracked() if path.parent.name == ".ci"]
    licence = "SPDX-License-Identifier: Apache-2.0"
    bare = [path for path in sources if licence not in "".join(path.open().readlines()[:2])]
    assert not relative(bare)


def test_python_files_say_why_they_exist() -> None:
    silent = [path for path in tracked() if path.suffix == ".py" and path.stat().st_size > 200]
    assert not relative([path for path in silent if not ast.get_docstring(ast.parse(path.read_text()))])


def test_no_file_knows_one_machine_or_registry() -> None:
    folder = r"(?<![\w./~-])/(?:work|opt|root|mnt|home/\w+|Users/\w+)/\w"
    # In two pieces each, so that this file does not name them either.
    registry = "|".join(
        re.escape(a + b)
        for a, b in [
            ("python", "hosted.org"),
            ("pypi", ".org"),
            ("registry.npm", "js"),
            ("deb.debian", ".org"),
            ("download.pytorch", ".org"),
        ]
    )
    forbidden = re.compile(f"{folder}|{registry}")
    found = []
    for path in tracked():
        if path == Path(__file__).resolve() or path.suffix in {".safetensors", ".png", ".gif", ".jpg", ".gz"}:
            continue
        found += [f"{path.name}: {hit[0]}" for hit in forbidden.finditer(path.read_text(encoding="utf-8"))]
    assert not found


def test_every_device_read_says_why() -> None:
    """Reads that wait for the device are few, visible and explained wherever decoding can reach them."""
    bare = []
    for path in [file for part in SYNC_FREE for file in (python_files(CORE / part) or [CORE / part])]:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in SYNC_CALLS:
                span = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if not re.search(r"# sync: \S", span):
                    bare.append(f"{path.relative_to(ROOT)}:{node.lineno} .{called.attr}()")
    assert not bare


def test_a_side_stream_waits_and_is_waited_for() -> None:
    """Work on another stream reads what the current one is still writing, and the other way round, unless each waits."""
    entered, loose = 0, []
    for path in tracked():
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.suffix == ".py" else ast.Module([], [])
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            for block in (node for node in ast.walk(function) if isinstance(node, ast.With)):
                opened = block.items[0].context_expr
                if not (isinstance(opened, ast.Call) and ast.unparse(opened.func) == "torch.cuda.stream"):
                    continue
                entered, stream = entered + 1, ast.unparse(opened.args[0])
                waits = [(call.lineno, ast.unparse(call)) for call in calls if "wait_stream" in ast.unparse(call.func)]
                before = any(line < block.lineno and text.startswith(f"{stream}.wait_stream(") for line, text in waits)
                after = any(line > block.lineno and text.endswith(f".wait_stream({stream})") for line, text in waits)
                if not (before and after):
                    loose.append(f"{path.relative_to(ROOT)}:{block.lineno}")
    assert entered and not loose


def test_file_names_say_what_is_inside() -> None:
    vague = re.compile(r"^(utils?|common|helpers?|misc)\.py$|_(old|new|backup|copy|v\d+)\.(py|sh)$")
    known = {"fast_dllm_v2.py"}  # a model's published name
    assert not [path.name for path in tracked() if vague.search(path.name) and path.name not in known]


def test_the_repository_stays_light() -> None:
    """Three checkpoints within 13 MB; a fourth, and every other file, within 1 MB."""
    weights = [path for path in tracked() if path.suffix == ".safetensors"]
    large = [path for path in tracked() if path.stat().st_size > 1_000_000]
    assert len(weights) <= 4 and len(large) <= 3
    assert not relative([path for path in large if path not in weights or path.stat().st_size > 13_000_000])


def listed_tree() -> list[tuple[str, ...]]:
    """Paths named by the tree of CONTRIBUTING.md, an indented listing: names first on a line, then a note in words."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    tree = next((block for block in blocks if re.search(r"^fastdllm/", block, re.MULTILINE)), "")
    paths: list[tuple[str, ...]] = []
    folders: list[tuple[int, str]] = []
    for line in filter(str.strip, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        names = list(takewhile(re.compile(r"\S+/|\S*\.\w+|LICENSE|Dockerfile").fullmatch, line.split()))
        paths += [(*(folder for _, folder in folders), name.rstrip("/")) for name in names]
        if names and names[-1].endswith("/"):
            folders.append((indent, names[-1].rstrip("/")))
    return paths


def test_the_tree_of_contributing_equals_the_disk() -> None:
    named = listed_tree()
    assert named, "CONTRIBUTING.md shows no tree with a line that starts with fastdllm/"
    assert not [path for path in named if not ROOT.joinpath(*path).exists()], "named but absent"
    parts = [path.relative_to(ROOT).parts for path in tracked()]
    on_disk = {part[:1] for part in parts if not part[0].startswith(".")}
    on_disk |= {part[:2] for part in parts if part[0] == "fastdllm"}
    assert not sorted(on_disk - set(named)), "on disk but not named"

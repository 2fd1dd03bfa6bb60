# SPDX-License-Identifier: Apache-2.0
"""Files are whole or not there, whenever a process ends; everything that is written at once is written so."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import pytest

from fastdllm import whole
from tests.test_architecture import ROOT, tracked

# File and target of what is written by other means, and why that does no harm.
ELSEWHERE = {
    ("fastdllm/shell.py", "number"): "a stream that is open already",
    ("fastdllm/scoring/kernel.py", "f'/proc/self/{name}'"): "the kernel's",
    ("fastdllm/scoring/cgroup.py", "f'{self.folder}/{name}'"): "the kernel's",
    ("fastdllm/training/checkpoint.py", "folder"): "its callers have the folder from whole.filling",
    ("scripts/benchmarks/loading.py", "path"): "a temporary folder",
    ("scripts/quickstart.py", "self._said"): "what a process says, in a temporary folder",
    (
        "scripts/recipes/tiny/tiny_formats.py",
        "partial / 'model.safetensors'",
    ): "a folder that is put in place when it is whole",
    ("scripts/recipes/tiny/tiny_formats.py", "folder / name"): "a temporary folder",
    ("scripts/recipes/tiny/train_sudoku.py", "folder / 'chat_template.jinja'"): "a temporary folder",
    ("scripts/recipes/tiny/train_sudoku.py", "folder / 'tokenizer_config.json'"): "a temporary folder",
    ("v2/train_scripts/ablation.py", "folder"): "a temporary folder",
    ("v2/train_scripts/ablation.py", "os.devnull"): "nothing",
}
# Functions and methods that write a whole file, and which of their arguments says where; None is the object itself.
WRITERS = {"write_text": None, "write_bytes": None, "savefig": 0, "save_file": 1, "save_pretrained": 0, "copyfile": 1}


def target(call: ast.Call) -> ast.expr | None:
    """Where a call writes a whole file; None for all other calls, those that append lines among them."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    above = call.func.value if isinstance(call.func, ast.Attribute) else None
    if above is not None and ast.unparse(above) in ("whole", "super()"):
        return None
    if name in ("open", "fdopen"):
        given = [*call.args, *(one.value for one in call.keywords if one.arg == "mode")]
        modes = [one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if not any(mode[:1] in ("w", "x") and len(mode) <= 3 for mode in modes):
            return None
        return above if above is not None and ast.unparse(above) not in ("os", "io", "gzip") else call.args[0]
    if name not in WRITERS:
        return None
    return above if WRITERS[name] is None else call.args[WRITERS[name]]


def placed(tree: ast.AST) -> set[str]:
    """Names that `with whole.replacing(...) as NAME` and its like bind."""
    items = [item for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items]
    ways = ("whole.replacing(", "whole.filling(")
    return {ast.unparse(i.optional_vars) for i in items if i.optional_vars and ast.unparse(i.context_expr).startswith(ways)}


def test_everything_written_at_once_goes_through_one_place() -> None:
    files = [path for path in tracked() if path.suffix == ".py" and "tests" not in path.parts]
    found = set()
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        places = placed(tree)
        for node in ast.walk(tree):
            where = target(node) if isinstance(node, ast.Call) else None
            if where is not None and not {one.id for one in ast.walk(where) if isinstance(one, ast.Name)} & places:
                found.add((str(path.relative_to(ROOT)), ast.unparse(where)))
    found = {(name, text) for name, text in found if name != "fastdllm/whole.py"}
    assert len(files) > 100 and found == ELSEWHERE.keys()


def killed_while(folder: Path, work: str) -> None:
    """Run `work` in a process that is killed by SIGKILL at the end of it."""
    pid = os.fork()
    if pid == 0:
        try:
            exec(work, {"whole": whole, "folder": folder, "end": lambda: os.kill(os.getpid(), 9)})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9


@pytest.mark.parametrize("before", [None, "before"])
@pytest.mark.parametrize(
    "work",
    [
        "with whole.replacing(folder / 'a.json') as place: place.write_text('{\"to'); end()",
        "with whole.filling(folder) as place: (place / 'a.json').write_text('{\"to'); end()",
    ],
)
def test_a_process_that_is_killed_leaves_what_was_there(work: str, before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if before:
        path.write_text(before)
    killed_while(tmp_path, work)
    assert (path.read_text() if path.exists() else None) == before
    whole.write_text(path, "after")
    assert path.read_text() == "after"


@pytest.mark.parametrize("way", [whole.replacing, lambda path: whole.filling(path.parent)])
def test_an_exception_leaves_what_was_there_and_nothing_else(way, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")

    def interrupted() -> None:
        with way(path) as place:
            (place if place.is_file() else place / "a.json").write_text("torn")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


def test_a_file_keeps_its_rights_and_its_links(tmp_path: Path) -> None:
    path, link = tmp_path / "a.json", tmp_path / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path)
    whole.write_text(link, "after")
    assert link.is_symlink() and path.read_text() == "after" and stat.S_IMODE(path.stat().st_mode) == 0o640
    whole.write_text(tmp_path / ("x" * 255), "a name as long as names may be")
    before = os.umask(0o027)
    try:
        whole.write_text(tmp_path / "new", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_devices_are_written_to_and_bad_places_are_named(tmp_path: Path) -> None:
    whole.write_text("/dev/null", "gone")
    assert not Path("/dev/null").is_file()
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "x", tmp_path / "absent" / "x", tmp_path / ("x" * 256)):
        with pytest.raises(OSError) as error, whole.replacing(place):
            raise AssertionError("something was written")
        assert error.value.filename == str(place)


def test_a_file_that_is_open_is_not_written_to_twice(tmp_path: Path) -> None:
    """What is printed afterwards would go into the file that was replaced, or over the results."""
    path = tmp_path / "said"
    with path.open("w") as file, pytest.raises(OSError, match="give its own name"):
        whole.write_text(f"/dev/fd/{file.fileno()}", "results")
    read, write = os.pipe()
    whole.write_text(f"/dev/fd/{write}", "results")
    assert os.read(read, 99) == b"results" and path.read_text() == ""
    os.close(read)
    os.close(write)


def test_filling_puts_each_file_over_the_one_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    (tmp_path / "kept").write_text("kept")
    with whole.filling(tmp_path) as place:
        (place / "a").write_text("after")
        (place / "below").mkdir()
        (place / "below" / "b").write_text("new")
    assert {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {
        "a": "after",
        "kept": "kept",
        "below/b": "new",
    }

# SPDX-License-Identifier: Apache-2.0
"""Command lines of the scripts: a wrong value of any option is one line on stderr and exit code 2, before any work."""

from __future__ import annotations

import argparse
import ast
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm.arguments import AMOUNT, COUNT, SEED, SHARE, SIZE, Parser, number, output_file, output_folder
from fastdllm.shell import one_line
from scripts.benchmarks import decode
from scripts.results import read_json, read_lines
from scripts.studies import pareto

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [path for path in (ROOT / "scripts").rglob("*.py") if '"__main__"' in path.read_text(encoding="utf-8")]
SCRIPTS = sorted(path for path in PROGRAMS if path.stem not in ("kernels", "tiles"))  # which need triton
OTHERS = [path for path in SCRIPTS if path.stem != "parallel"]  # which reads its options first, and then does the rest so
NEEDED = {  # options without which a script does not begin
    "parallel": ["--model", "tiny-llada", "--data", "nowhere.jsonl", "--out", "out", "--max_steps", "1"],
    "published": ["--checkout", "nowhere"],
    "train_tiny": ["--family", "llada", "--text", "nowhere", "--out", "out"],
    "pareto": ["run"],
}


PATHS = (Path, output_file, output_folder)


class Began(BaseException):
    """The command line was accepted."""


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> list[argparse.ArgumentParser]:
    """The parsers that a script makes; it ends with `Began` once it has read its arguments."""
    made: list[argparse.ArgumentParser] = []
    parse = argparse.ArgumentParser.parse_args

    def read(self: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
        made.append(self)
        parse(self, *given)
        raise Began

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read)
    return made


def run(path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", [path.name, *NEEDED.get(path.stem, []), *arguments])
    runpy.run_module(name, run_name="__main__")


@pytest.mark.parametrize("path", [*OTHERS, ROOT / "v2" / "train_scripts" / "ablation.py"], ids=lambda path: path.stem)
def test_a_file_that_is_not_there_is_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever in a script it is missed: four of them ended in a traceback."""

    def miss(*args: object) -> None:
        raise FileNotFoundError("nowhere.json: no such file")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", miss)
    monkeypatch.syspath_prepend(str(ROOT / "v2" / "train_scripts"))
    with pytest.raises(SystemExit) as stopped:
        run(path, [], monkeypatch)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{path.stem}: nowhere.json: no such file\n"


@pytest.mark.parametrize(
    ("given", "hint"),
    [("--prot=1", "; did you mean --port?"), ("--prot 1", "; did you mean --port?"), ("--zz", ""), ("x", "")],
)
def test_an_option_that_is_near_a_known_one_is_told(capsys: pytest.CaptureFixture[str], given: str, hint: str) -> None:
    parser = Parser(prog="program")
    parser.add_argument("--port")
    with pytest.raises(SystemExit):
        parser.parse_args(given.split())
    assert capsys.readouterr().err == f"program: unrecognized arguments: {given}{hint}\n"


BAD = ["-1", "0", "nan", "inf", "1e400", "x", "", "1.5", "9" * 30, "none"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_numbers_out_of_range_are_refused(
    path: Path, parsers: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option that takes a number, with values that no count, share or amount has."""
    with pytest.raises(Began):
        run(path, [], monkeypatch)
    (parser,) = parsers
    assert isinstance(parser, Parser)
    numbers = [action for action in parser._actions if action.type not in (None, str, *PATHS)]
    assert not [action.dest for action in numbers if action.type in (int, float)], "a number without a range"
    for action in numbers:
        for text in BAD:
            try:
                value = action.type(text)
            except argparse.ArgumentTypeError:
                with pytest.raises(SystemExit) as stopped:
                    parser.parse_known_args([f"{action.option_strings[0]}={text}"])
                said = capsys.readouterr().err
                assert stopped.value.code == 2 and len(said.splitlines()) == 1 and action.option_strings[0] in said
            else:
                assert text in ("0", "1.5") and float(text) == value


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("arguments", [["--wibble"], ["--wibble=3", "x y\nz"]])
def test_an_unknown_option_is_one_line(
    path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(path, arguments, monkeypatch)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and len(said.err.splitlines()) == 1 and "wibble" in said.err and not said.out


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (COUNT, ["1", "500"], ["0", "-1", "1.0", "nan", "x"]),
        (SIZE, ["0", "7"], ["-1", "0.5"]),
        (SEED, ["0", str(2**32 - 1)], ["-1", str(2**32)]),
        (SHARE, ["0", "1", "0.5", "1e-3"], ["-0.1", "1.1", "nan", "inf"]),
        (AMOUNT, ["0", "3.5"], ["-1", "inf", "nan", "1e400"]),
        (number(float, 1), ["1"], ["inf", "0.99"]),
    ],
)
def test_a_number_lies_in_its_range(kind: Callable[[str], Any], good: list[str], bad: list[str]) -> None:
    assert [float(kind(text)) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be an? .*, not '{text}'"):
            kind(text)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("quota", "must read decoder"),
        ("quota+dual+none", "must read decoder"),
        ("quota=3+dual", "no option that '3' could be"),
        ("threshold=0.9+dual:x", "'x' must read option=value"),
        ("threshold=0.9:+dual", "'' must read option=value"),
        ("threshold=+dual", "'threshold=' has no value"),
        ("threshold=0.9:threshold=0.5+dual", "threshold is given twice"),
        ("threshold:cache=none+dual", "cache is given twice"),
        ("quota+dual=1", "no option that '1' could be"),
        ("nothing+dual", "nothing"),
        ("quota+nothing", "nothing"),
        ("threshold=x+dual", "threshold='x'"),
        ("threshold=0.9:wibble=1+dual", "wibble"),
    ],
)
def test_settings_that_are_none_are_named(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        fastdllm.DecodeConfig(**pareto.parse(setting))
    assert len(str(raised.value).splitlines()) == 1


LINE = {"setting": "quota+dual", "problem": 3, "correct": 1}
KINDS = {"setting": str, "problem": int, "correct": int}


def damaged() -> Iterator[tuple[bytes, str | None]]:
    """What a file of lines may hold, and what is said of it: None where it is read."""
    good = json.dumps(LINE).encode()
    yield b"", None
    yield good + b"\n", None
    yield good, None  # somebody's editor left out the last line's end
    yield from ((good + b"\n" + good[:length], None) for length in range(1, len(good)))
    yield good + b"\n\n" + good + b"\n", ":2 is not JSON"
    yield good[:-3] + b"\n" + good + b"\n", ":1 is not JSON"
    yield b"[1]\n", ":1 is no JSON object"
    yield good + b"\n" + b"a text of somebody's", ":2 is not JSON"
    yield b"\xff\xfe\n", ":1 is not JSON"
    yield b"[" * 100_000 + b"\n", ":1 is not JSON"
    yield from ((json.dumps({**LINE, name: None}).encode() + b"\n", f":1: {name} missing") for name in LINE)
    yield json.dumps({**LINE, "problem": "3"}).encode() + b"\n", ":1: problem missing, or of another type"


@pytest.mark.parametrize(("data", "message"), list(damaged()), ids=lambda x: None)
def test_lines_of_an_earlier_run_are_read_mended_or_named(tmp_path: Path, data: bytes, message: str | None) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(data)
    if message:
        with pytest.raises(ValueError, match=message):
            read_lines(path, KINDS)
        assert path.read_bytes() == data
        return
    found = read_lines(path, KINDS)
    assert found == [LINE] * len(found) and len(found) >= data.count(b"\n")
    with path.open("a") as file:  # the next run appends
        file.write(json.dumps(LINE) + "\n")
    assert read_lines(path, KINDS) == [LINE] * (len(found) + 1)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, "\x00"])
def test_a_damaged_file_of_an_earlier_run_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"earlier\.json"):
        read_json(path)


def test_no_text_is_read_or_written_in_the_machines_own_encoding() -> None:
    """Else a file that was written in one place is another text in the next."""
    for path in [path for name in ("fastdllm", "scripts", "llada", "dream", "v2") for path in (ROOT / name).rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            if not isinstance(call.func, ast.Attribute) or ast.unparse(call.func.value) == "whole":  # which writes UTF-8
                continue
            if call.func.attr in ("read_text", "write_text"):
                assert any(keyword.arg == "encoding" for keyword in call.keywords), f"{path}:{call.lineno}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_is_no_value_is_refused(
    path: Path, parsers: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty path meant the present folder, and argparse makes a list without an entry of `--name=--`."""
    with pytest.raises(Began):
        run(path, [], monkeypatch)
    for action in [action for action in parsers[0]._actions if action.option_strings and action.nargs != 0]:
        name = action.option_strings[-1]
        for given in [f"{name}=--", *([f"{name}="] if action.type in PATHS else [])]:
            with pytest.raises(SystemExit) as stopped:
                parsers[0].parse_known_args([given])
            said = capsys.readouterr().err
            assert stopped.value.code == 2 and len(said.splitlines()) == 1 and name in said


@pytest.mark.parametrize("name", ["", "x", "cuda:99", "meta", "/nowhere", "cpu,cuda", "é\udcff", "cuda"])
def test_a_device_that_is_none_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped, one_line("decode"):
        decode.usable(name)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_place_that_cannot_be_written_shows_before_any_work(tmp_path: Path) -> None:
    """Minutes or hours of work were lost, and the place was named at their end."""
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in (".", "file/x", "missing/x", "a" * 300, "pipe", "loop"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"cannot be written \(.+\)"):
            output_file(str(tmp_path / name))
    for name in ("file", "file/x/y", "a" * 300, "pipe", "loop/x"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"cannot be made \(.+\)"):
            output_folder(str(tmp_path / name))
    before = sorted(tmp_path.iterdir())
    assert output_file(str(tmp_path / "file")).read_text() == "kept"
    assert output_file(str(tmp_path / "new")) == tmp_path / "new"
    for name in (".", "new", "new/er"):
        assert output_folder(str(tmp_path / name)) == tmp_path / name
    assert sorted(tmp_path.iterdir()) == before


def test_every_script_looks_at_its_output_first(parsers: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that write after every problem look by themselves."""
    for path in SCRIPTS:
        with pytest.raises(Began):
            run(path, [], monkeypatch)
    unchecked = {(p.prog, a.dest) for p in parsers for a in p._actions if a.dest in OUTPUTS and a.type not in PATHS[1:]}
    assert unchecked == {("lossless.py", "out"), ("diffusion_pays.py", "output")}


OUTPUTS = ("out", "output", "save", "json")

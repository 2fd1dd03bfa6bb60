# SPDX-License-Identifier: Apache-2.0
"""Rules of one's own on every command line: --import of a module or a file."""

from __future__ import annotations

import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdllm import cli, registry

ROOT = Path(__file__).resolve().parents[1]

RULE = """\"\"\"A rule of one's own.\"\"\"
import dataclasses
import fastdllm
from fastdllm.decoders.base import DecoderRule

@dataclasses.dataclass(frozen=True)
class OwnRule(DecoderRule):
    own_number: float = 0.9

    def step(self, view):
        return view.commit(view.scores() >= self.own_number)

fastdllm.register("decoders", OwnRule)
"""


TAKE_IMPORTS = [name for name in cli.COMMANDS if name != "score"]  # which runs programs, no model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own folder to work in, with a rule in a file; what is imported meanwhile is forgotten at the end."""
    (tmp_path / "my_own_rules.py").write_text(RULE)
    (tmp_path / "broken_rules.py").write_text("raise RuntimeError('not\\ntoday')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(registry, "_imported", [])
    yield tmp_path
    registry.unregister("decoders", "own_rule")
    for name in ("my_own_rules", "broken_rules"):
        sys.modules.pop(name, None)


def ended(arguments: list[str]) -> int | str | None:
    """The exit code of a command, whether it returns it or raises it."""
    try:
        return cli.main(arguments)
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize("name", TAKE_IMPORTS)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--import", "broken_rules"], "--import broken_rules: RuntimeError: not today"),
        (["--import=./broken_rules.py"], "--import ./broken_rules.py: RuntimeError: not today"),
        (["--import", "no_such_rules"], "No module named 'no_such_rules'"),
        (["--import", "no_such_rules.py"], "--import no_such_rules.py: ValueError: there is no such file"),
        (["--import"], "--import needs a module or a file"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    name: str, given: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert ended([name, *given]) == 2
    told = capsys.readouterr().err
    assert expected in told and told.startswith(f"fastdllm {name}: ") and told.count("\n") == 1
    assert "broken_rules" not in sys.modules and registry.imported() == ()


@pytest.mark.parametrize("name", TAKE_IMPORTS)
def test_every_command_with_a_model_takes_rules_of_ones_own(name: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert ended([name, "--import", "my_own_rules.py", "--help"]) == 0
    page = capsys.readouterr().out
    assert "--import" in page and "own_rule" in registry.names("decoders")
    assert name not in ("chat", "app") or "--own-number" in page


@pytest.mark.parametrize(
    "script",
    [f"{name}/app.py" for name in ("llada", "dream", "v2")] + ["llada/chat.py", "dream/chat.py", "v2/run_chatbot.py"],
)
def test_so_do_the_scripts_of_a_checkout(
    script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--import", "my_own_rules", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 0 and "--own-number" in capsys.readouterr().out


def test_the_page_lists_a_rule_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="the page needs fastdllm[serve]")
    from fastdllm.serving import command

    ran: list[Any] = []
    monkeypatch.setattr(command, "run", lambda served, *_: ran.append(served) or 0)
    arguments = ["app", "--import", "my_own_rules", "--model", "tiny-sudoku", "--decoder", "own_rule", "--own-number", "0.7"]
    assert cli.main(arguments) == 0
    told = ran[0].state.page.info()
    assert "decoder own_rule (own_number 0.7)" in told["models"][0]["setting"]
    rule = next(decoder for decoder in told["decoders"] if decoder["name"] == "own_rule")
    assert [(option["name"], option["default"]) for option in rule["options"]] == [("own_number", 0.9)]
    assert rule["line"] == "", "a signature is no explanation"


def test_another_process_imports_what_its_settings_name(folder: Path) -> None:
    """As a replica does, which gets nothing but the settings."""
    pytest.importorskip("fastapi", reason="the server needs fastdllm[serve]")
    registry.import_modules(["my_own_rules.py"])
    code = (
        "from fastdllm.serving.command import Settings\n"
        f"imports = {registry.imported()!r}\n"
        "print(Settings('tiny-sudoku', decoding={'decoder': 'own_rule'}, imports=imports).service().config.decoder)\n"
    )
    other = folder / "elsewhere"
    other.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=other, env=environment, capture_output=True, text=True)
    assert done.stdout == "own_rule\n", done.stderr


def test_a_file_is_imported_once_under_its_own_name(folder: Path) -> None:
    registry.import_modules(["my_own_rules.py", str(folder / "my_own_rules.py"), "my_own_rules"])
    rule = registry.find("decoders", "own_rule")
    assert type(pickle.loads(pickle.dumps(rule()))) is rule
    (folder / "sub").mkdir()
    (folder / "sub" / "json.py").write_text("")
    with pytest.raises(ValueError, match="a module 'json' is imported already"):
        registry.import_modules(["sub/json.py"])

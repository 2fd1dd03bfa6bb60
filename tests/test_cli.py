# SPDX-License-Identifier: Apache-2.0
"""The console command: every part explains itself, and none needs another part's libraries."""

from __future__ import annotations

import errno
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from fastdllm import cli
from fastdllm.cli import one_line

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    code = cli.main(arguments)
    out = capsys.readouterr()
    assert code == (0 if arguments else 2)
    assert all(f"\n  {name} " in out.out + out.err for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "fastdllm: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "fastdllm: No space left on device\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
)
def test_an_interruption_and_output_that_nobody_takes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, error: BaseException, code: int, told: str
) -> None:
    def command(_: object) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "score", command)
    monkeypatch.setattr(cli, "_forget_output", lambda: None)
    assert cli.main(["score"]) == code
    assert capfd.readouterr().err == told


@pytest.mark.parametrize(("shell", "code", "lines"), [(">/dev/full", 2, 1), ("| true", 141, 0)])
def test_output_that_cannot_be_written_is_no_traceback(shell: str, code: int, lines: int) -> None:
    """The interpreter would complain once more when it ends."""
    late = "import sys, time; time.sleep(1); from fastdllm.cli import main; sys.exit(main(['--version']))"
    command = f'set -o pipefail; {sys.executable} -c "{late}" {shell}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, lines), done.stderr


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["chart"]) == 2
    assert "unknown command 'chart'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_each_command_has_a_help_page(name: str, capsys: pytest.CaptureFixture) -> None:
    try:
        code = cli.main([name, "--help"])
    except SystemExit as stopped:
        code = stopped.code
    page = capsys.readouterr().out
    assert code == 0
    assert page.startswith("usage: ") and len(page.splitlines()) > 10


@pytest.mark.parametrize(
    ("entry", "model"),
    [
        ("llada/chat.py", "tiny-llada"),
        ("dream/chat.py", "tiny-dream"),
        ("v2/run_chatbot.py", "tiny-fast-dllm-v2"),
        ("llada/app.py", "tiny-llada"),
        ("v2/app.py", "tiny-fast-dllm-v2"),
    ],
)
def test_the_entries_of_a_checkout_are_the_same_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, entry: str, model: str
) -> None:
    monkeypatch.setattr(sys, "argv", [entry, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / entry), run_name="__main__")
    assert stopped.value.code == 0
    assert f"(default{model})" in "".join(capsys.readouterr().out.split())


def test_the_version_is_told(capsys: pytest.CaptureFixture) -> None:
    import fastdllm

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdllm {fastdllm.__version__}\n"


def test_a_missing_library_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing(_: object) -> int:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi.responses")

    monkeypatch.setitem(cli.COMMANDS, "app", missing)
    assert cli.main(["app"]) == 1
    assert "fastdllm app needs fastapi: pip install fastapi" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["matplotlib.pyplot", "scipy", "peft"])
def test_a_script_names_its_missing_library_in_one_line(library: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped, cli.one_line("figures"):
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)
    name = library.partition(".")[0]
    assert stopped.value.code == 1 and capsys.readouterr().err == f"figures needs {name}: pip install {name}\n"
    with pytest.raises(ModuleNotFoundError), cli.one_line("figures"):  # a module of one's own: a fault to see in full
        raise ModuleNotFoundError("No module named 'fastdllm.typo'", name="fastdllm.typo")


def test_scripts_begin_without_the_libraries_that_only_a_part_of_them_needs() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('peft', 'scipy', 'matplotlib', 'tensorboard', 'tensorboardX'))\n"
        "import scripts.recipes.parallel, scripts.studies.figures, scripts.studies.pareto\n"
        "import scripts.studies.verify_published, v2.train_scripts.finetune as finetune\n"
        "assert finetune.FinetuneArguments.report_to == 'none', 'it would end with an error'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_needs_no_optional_library_to_start() -> None:
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('fastapi', 'rich', 'lm_eval', 'transformers', 'tqdm', 'torch'):\n"
        "            raise ModuleNotFoundError(name + ' is blocked', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "sys.modules['fastdllm'] = type(sys)('fastdllm')\n"
        f"sys.modules['fastdllm'].__path__ = [{str(ROOT / 'fastdllm')!r}]\n"
        "from fastdllm.cli import main\n"
        "sys.exit(main(['--help']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_core_alone_runs_the_shipped_models_on_ids_and_says_what_texts_need() -> None:
    code = (
        "import sys, warnings\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('fastapi', 'rich', 'lm_eval', 'transformers', 'tokenizers', 'tqdm'):\n"
        "            raise ModuleNotFoundError(name + ' is blocked', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import fastdllm\n"
        "from fastdllm.cli import main\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    models = [fastdllm.load(name, device='cpu') for name in fastdllm.models.tiny_names()]\n"
        "assert len(told) == len(models) and 'pip install transformers' in str(told[0].message)\n"
        "for model in models:\n"
        "    assert len(fastdllm.generate(model, [5, 6, 7], gen_length=8).sequences[0]) > 3\n"
        "try:\n"
        "    fastdllm.generate(models[0], 'text')\n"
        "except ValueError as error:\n"
        "    assert 'pip install transformers' in str(error)\n"
        "sys.exit(main(['chat']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr == "fastdllm chat needs transformers: pip install transformers\n"


def test_modules_to_import_are_imported_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "broken_rules.py").write_text('"""A module that fails."""\nraise RuntimeError("not today")\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given: list[list[str]] = []
    monkeypatch.setitem(cli.COMMANDS, "app", lambda rest: given.append(list(rest)) or 0)
    assert cli.main(["app", "--import", "json", "--port", "1", "--import=csv"]) == 0 and given == [["--port", "1"]]
    for arguments, expected in (
        (["--import", "broken_rules"], "--import broken_rules: RuntimeError: not today"),
        (["--import", "no_such_rules"], "No module named 'no_such_rules'"),
        (["--import"], "--import needs the name of a module"),
    ):
        assert cli.main(["app", *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_a_model_says_where_what_people_look_for_is() -> None:
    import copy
    import pickle

    from fastdllm.testing import random_model

    model = random_model()
    for name, expected in (
        ("generate", "fastdllm.generate"),
        ("to", "device="),
        ("config", "model.spec"),
        ("x", "no attribute 'x'$"),
    ):
        with pytest.raises(AttributeError, match=expected):
            getattr(model, name)
    assert copy.copy(model).spec == pickle.loads(pickle.dumps(model)).spec == model.spec


@pytest.mark.parametrize("error", [ValueError("a\n  b"), FileNotFoundError("a b")])
def test_a_mistake_is_one_line_and_two(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, one_line("tool"):
        raise error
    assert stopped.value.code == 2 and capsys.readouterr().err == "tool: a b\n"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "scripts").glob("*s/*.py")), ids=lambda path: path.stem)
def test_every_script_says_a_mistake_in_one_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "__main__" not in text or "with one_line(" in text

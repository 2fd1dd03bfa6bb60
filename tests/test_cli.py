# SPDX-License-Identifier: Apache-2.0
"""The console command: every part explains itself, and none needs another part's libraries."""

from __future__ import annotations

import ast
import pickle
import runpy
import sys
from pathlib import Path

import pytest

import fastdllm
from fastdllm import cli
from tests.processes import python, without

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    code = cli.main(arguments)
    out = capsys.readouterr()
    assert code == (0 if arguments else 2)
    assert all(f"\n  {name} " in out.out + out.err for name in cli.COMMANDS)


@pytest.mark.parametrize("name", ["chart", "--temperature", "x" * 9999, "two\nlines"])
def test_an_unknown_command_is_one_line(name: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main([name]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastdllm: unknown command ") and repr(name)[:50] in err and "chat, app, eval" in err
    assert err.count("\n") == 1 and len(err) < 250


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
        ("dream/app.py", "tiny-dream"),
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


def test_scripts_begin_without_the_libraries_that_only_a_part_of_them_needs() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('peft', 'scipy', 'sklearn', 'matplotlib', 'tensorboard', 'tensorboardX'))\n"
        "import scripts.recipes.parallel, scripts.studies.figures, scripts.studies.pareto\n"
        "import scripts.studies.verify_published, v2.train_scripts.finetune as finetune\n"
        "assert finetune.FinetuneArguments.report_to == 'none', 'it would end with an error'\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_the_command_needs_no_optional_library_to_start() -> None:
    code = without("fastapi", "rich", "lm_eval", "transformers", "tqdm", "torch")
    code += "from fastdllm.cli import main\nsys.exit(main(['--help']))\n"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_the_core_alone_runs_the_shipped_models_on_ids_and_says_what_texts_need() -> None:
    code = without("fastapi", "rich", "lm_eval", "transformers", "tokenizers", "tqdm") + (
        "import warnings, fastdllm\n"
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
    done = python(code)
    assert done.returncode == 1, done.stderr
    assert done.stderr == "fastdllm chat needs transformers: pip install transformers\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"], ["--version"], ["no-such-command"], ["score", "--help"]])
def test_what_needs_no_model_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from fastdllm.cli import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "finally:\n"
        "    print('torch' in sys.modules)\n"
    )
    done = python(code)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_every_public_name_is_found_whatever_was_imported_before() -> None:
    """They are imported when they are first used; a module of the same name, imported earlier, would hide one."""
    code = (
        "from importlib import import_module\n"
        "import fastdllm\n"
        "assert fastdllm.build.resolve, 'modules are found without an import of their own, too'\n"
        "homes = {name: import_module(f'fastdllm.{home}') for home, names in fastdllm._HOMES.items() for name in names}\n"
        "assert sorted(homes) == sorted(fastdllm.__all__) and not set(homes) - set(dir(fastdllm))\n"
        "for name, home in homes.items():\n"
        "    assert getattr(fastdllm, name) is getattr(home, name), name\n"
        "assert not hasattr(fastdllm, 'no_such_name')\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_what_type_checkers_see_of_the_package_is_what_it_gives() -> None:
    tree = ast.parse((ROOT / "fastdllm" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(str(node.module), alias.name) for node in block.body for alias in getattr(node, "names", [])}
    assert seen == {(f"fastdllm.{home}", name) for home, names in fastdllm._HOMES.items() for name in names}


def test_a_model_says_where_what_people_look_for_is() -> None:
    import copy

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

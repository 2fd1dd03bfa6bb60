# SPDX-License-Identifier: Apache-2.0
"""The console command: every part explains itself, and none needs another part's libraries."""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import fastdllm
from fastdllm import cli, registry
from fastdllm.cli import one_line
from tests.processes import python, without

ROOT = Path(__file__).resolve().parents[1]


FULL = "fastdllm: No space left on device\n"


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
        (OSError(errno.ENOSPC, "No space left on device"), 2, FULL),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, FULL),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 2, FULL),
        (RuntimeError("[enforce fail at inline_container.cc:595] . PytorchStreamWriter failed writing file"), 2, FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "fastdllm: Disk quota exceeded\n"),
        (OSError(errno.EFBIG, "File too large"), 2, "fastdllm: File too large\n"),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), 2, "fastdllm: Disk quota exceeded\n"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), 2, "fastdllm: [Errno 21] Is a directory: 'a'\n"),
        (SafetensorError("Is a directory (os error 21)"), 2, "fastdllm: Is a directory (os error 21)\n"),
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


TIDYING = """
import signal
from fastdllm.cli import main, COMMANDS
def command(_):
    try:
        print("begun", flush=True)
        signal.pause()
    finally:
        print("tidied up", flush=True)
COMMANDS["score"] = command
raise SystemExit(main(["score"]))
"""


@pytest.mark.parametrize(
    ("number", "processes", "code", "out", "told"),
    [
        (signal.SIGINT, "1", 130, "tidied up\n", "fastdllm: interrupted\n"),
        (signal.SIGTERM, "1", 143, "tidied up\n", "fastdllm: terminated\n"),
        (signal.SIGHUP, "1", 129, "tidied up\n", "fastdllm: hung up\n"),
        (signal.SIGTERM, "2", -signal.SIGTERM, "", ""),
    ],
)
def test_a_program_that_is_ended_tidies_up_and_says_so_in_one_line(
    number: int, processes: str, code: int, out: str, told: str
) -> None:
    """Without, the processes that it had started went on; of several processes a launcher ends each at once."""
    streams = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    env = {**os.environ, "WORLD_SIZE": processes}
    with subprocess.Popen([sys.executable, "-c", TIDYING], cwd=ROOT, env=env, text=True, **streams) as program:
        assert program.stdout.readline() == "begun\n"
        program.send_signal(number)
        assert program.communicate(timeout=60) == (out, told)
    assert program.returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_handler_of_a_signal_is_what_it_was_when_a_command_is_over(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """What `nohup` ignores stays so."""
    during = []
    monkeypatch.setitem(cli.COMMANDS, "score", lambda _: during.append(signal.getsignal(number)) or 0)
    for before in (signal.SIG_DFL, signal.SIG_IGN):
        kept = signal.signal(number, before)
        try:
            assert cli.main(["score"]) == 0
            assert signal.getsignal(number) is before
        finally:
            signal.signal(number, kept)
    assert callable(during[0]) and during[1] is signal.SIG_IGN


def test_what_was_printed_is_not_lost_where_a_file_cannot_be_written(capfd: pytest.CaptureFixture) -> None:
    def work() -> None:
        print("a result")
        raise IsADirectoryError(errno.EISDIR, "Is a directory", "a")

    with pytest.raises(cli.Ended), cli.shell("program"):
        work()
    assert capfd.readouterr() == ("a result\n", "program: [Errno 21] Is a directory: 'a'\n")


SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")]


class Dropping:
    """Python drops exceptions that a destructor raises."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def in_a_destructor(number: int) -> None:
    Dropping(number)
    for _ in range(1000):
        time.sleep(0.01)


def beside_a_line_of_progress(number: int) -> None:
    try:
        signal.raise_signal(number)
    finally:
        print("3 of 5 done", file=sys.stderr)


def with_processes_that_end_as_well(number: int) -> None:
    try:
        signal.raise_signal(number)
    finally:
        raise RuntimeError("a worker exited unexpectedly")


def in_a_library_that_goes_on(number: int) -> None:
    with contextlib.suppress(SystemExit):
        signal.raise_signal(number)


@pytest.fixture
def default_handlers() -> Iterator[None]:
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize(("number", "code", "told"), SIGNALS)
@pytest.mark.parametrize(
    "work", [in_a_destructor, beside_a_line_of_progress, with_processes_that_end_as_well, in_a_library_that_goes_on]
)
def test_a_signal_is_heard_wherever_it_comes(
    capfd: pytest.CaptureFixture, work: Callable[[int], None], number: int, code: int, told: str
) -> None:
    with pytest.raises(cli.Ended) as ended, cli.shell("program"):
        work(number)
    assert ended.value.code == code
    assert capfd.readouterr().err.splitlines()[-1] == f"program: {told}"


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_a_program_forked_ends_without_a_word(capfd: pytest.CaptureFixture, number: int) -> None:
    """Those that tokenise would each say the line of the program."""
    with cli.shell("program"):
        child = os.fork()
        if not child:
            try:
                signal.raise_signal(number)
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number
    assert capfd.readouterr().err == ""


def test_an_interruption_while_libraries_are_imported_is_one_line(capfd: pytest.CaptureFixture) -> None:
    assert sys.modules["fastdllm.cli"]._say_interrupted is cli._say_interrupted
    cli._say_interrupted(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capfd.readouterr().err.endswith(": interrupted\n")


SOURCES = [path for name in ("llada", "dream", "v2") for path in sorted((ROOT / name).rglob("*.py"))]
OWN = [path for path in SOURCES if path.stem != "ablation" and "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_programs_import_first_what_tells_an_interruption(path: Path) -> None:
    """Those of scripts/ do by their package, and the ablation by finetune."""
    imports = [
        line.split()[1] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("import ", "from "))
    ]
    assert next(name for name in imports if name.split(".")[0] not in sys.stdlib_module_names) == "fastdllm.cli"
    assert "import fastdllm.cli" in (ROOT / "scripts" / "__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(("shell", "code", "lines"), [(">/dev/full", 2, 1), ("| true", 141, 0)])
def test_output_that_cannot_be_written_is_no_traceback(shell: str, code: int, lines: int) -> None:
    """The interpreter would complain once more when it ends."""
    late = "import sys, time; time.sleep(1); from fastdllm.cli import main; sys.exit(main(['--version']))"
    command = f'set -o pipefail; {sys.executable} -c "{late}" {shell}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, lines), done.stderr


# BEGINNING stands for what is imported besides.
PROGRAM = """
import subprocess, sys
BEGINNING
from fastdllm.cli import one_line
with one_line("tool"):
    print("\\u2191 1 \\u4e2d")
    with open(sys.argv[1], "w") as file:
        subprocess.run(["echo", "noise"])
        file.write("result")
"""


@pytest.mark.parametrize(
    ("shell", "code"),
    [("", 0), (">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 2), ("2>&1 | true", 141)],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_output_of_any_kind_loses_no_result(tmp_path: Path, shell: str, code: int, encoding: str) -> None:
    """Closed, the next file would take its number, and with it whatever child processes print."""
    end_with_a_result(tmp_path, PROGRAM.replace("BEGINNING", ""), shell, code, encoding)


@pytest.mark.parametrize("shell", ["", "<&- >&- 2>&-"])
def test_nor_does_a_program_with_the_whole_package(tmp_path: Path, shell: str) -> None:
    end_with_a_result(tmp_path, PROGRAM.replace("BEGINNING", "import fastdllm.generation"), shell, 0, "ascii")


def end_with_a_result(tmp_path: Path, text: str, shell: str, code: int, encoding: str) -> None:
    program, result = tmp_path / "program.py", tmp_path / "result"
    program.write_text(text)
    late = "sleep 0.3; " if "|" in shell else ""
    command = f"set -o pipefail; {{ {late}{sys.executable} {program} {result}; }} {shell}"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=env, check=False)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    assert result.read_text() == "result"
    if not shell:
        assert "1" in done.stdout.decode(encoding).split()


@pytest.mark.parametrize(
    "entry", [p for d in ("llada", "dream", "v2") for p in (ROOT / d).glob("*.py") if "__main__" in p.read_text()]
)
def test_every_entry_of_a_checkout_is_a_program(entry: Path) -> None:
    assert "    with shell(" in entry.read_text(encoding="utf-8")


def _gone(*_: object, **__: object) -> None:
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        ("lm_eval.__main__.HarnessCLI.execute", ["eval", "ls", "tasks"]),
        ("fastdllm.ui.terminal.take_model", ["chat"]),
        ("fastdllm.serving.batch._run", ["batch", "in.jsonl", "out.jsonl"]),
        ("fastdllm.scoring.score.score_file", ["score", "{folder}/in.jsonl", "--allow-code-execution"]),
    ],
)
def test_a_reader_that_is_gone_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path, place: str, arguments: list[str]
) -> None:
    monkeypatch.setattr(place, _gone)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # pytest's own cannot be configured
    monkeypatch.setattr(cli, "_forget_output", lambda: None)
    assert cli.main([argument.format(folder=tmp_path) for argument in arguments]) == 141
    assert "Broken pipe" not in capfd.readouterr().err


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


@pytest.mark.parametrize("error", [ValueError("a\n  b"), FileNotFoundError("a b")])
def test_a_mistake_is_one_line_and_two(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, one_line("tool"):
        raise error
    assert stopped.value.code == 2 and capsys.readouterr().err == "tool: a b\n"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "scripts").glob("*s/*.py")), ids=lambda path: path.stem)
def test_every_script_says_a_mistake_in_one_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "__main__" not in text or "with one_line(" in text

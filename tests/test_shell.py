# SPDX-License-Identifier: Apache-2.0
"""What every program has around it: interruptions, signals, lost output and mistakes are one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from fastdllm import cli, shell
from tests.processes import python

ROOT = Path(__file__).resolve().parents[1]

FULL = "fastdllm: No space left on device\n"


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
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a b"), 2, "fastdllm: a b: Is a directory\n"),
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
    monkeypatch.setattr(shell, "_forget_output", lambda: None)
    assert cli.main(["score"]) == code
    assert capfd.readouterr().err == told


TIDYING = """
import signal, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that `nohup` started inherit that it is ignored
from fastdllm.cli import main, COMMANDS
def command(_):
    try:
        print("begun", flush=True)
        while True:
            time.sleep(0.05)  # a signal just before signal.pause() would be waited for in vain
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
        assert program.communicate(timeout=600) == (out, told)
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

    with pytest.raises(shell.Ended), shell.shell("program"):
        work()
    assert capfd.readouterr() == ("a result\n", "program: a: Is a directory\n")


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
    with pytest.raises(shell.Ended) as ended, shell.shell("program"):
        work(number)
    assert ended.value.code == code
    assert capfd.readouterr().err.splitlines()[-1] == f"program: {told}"


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_a_program_forked_ends_without_a_word(capfd: pytest.CaptureFixture, number: int) -> None:
    """Those that tokenise would each say the line of the program."""
    with shell.shell("program"):
        child = os.fork()
        if not child:
            try:
                signal.raise_signal(number)
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number
    assert capfd.readouterr().err == ""


def test_an_interruption_in_a_destructor_meanwhile_is_sent_again(capfd: pytest.CaptureFixture) -> None:
    """It was lost, and the program went on."""

    def wait_for_it() -> None:
        shell._send_again(SimpleNamespace(exc_value=KeyboardInterrupt()))  # a moment later
        time.sleep(600)

    with pytest.raises(KeyboardInterrupt):
        wait_for_it()
    assert not capfd.readouterr().err


def test_an_interruption_while_libraries_are_imported_is_one_line(capfd: pytest.CaptureFixture) -> None:
    done = python("import sys, fastdllm.shell as shell; assert sys.excepthook is shell._say_interrupted")
    assert done.returncode == 0, done.stderr
    shell._say_interrupted(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capfd.readouterr().err.endswith(": interrupted\n")


SOURCES = [path for name in ("llada", "dream", "v2") for path in sorted((ROOT / name).rglob("*.py"))]


OWN = [path for path in SOURCES if path.stem != "ablation" and "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_programs_import_first_what_tells_an_interruption(path: Path) -> None:
    """Those of scripts/ do by their package, and the ablation by finetune."""
    imports = [
        line.split()[1] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("import ", "from "))
    ]
    assert next(name for name in imports if name.split(".")[0] not in sys.stdlib_module_names) in (
        "fastdllm.cli",
        "fastdllm.shell",
    )
    assert "import fastdllm.shell" in (ROOT / "scripts" / "__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(("redirection", "code", "lines"), [(">/dev/full", 2, 1), ("| true", 141, 0)])
def test_output_that_cannot_be_written_is_no_traceback(redirection: str, code: int, lines: int) -> None:
    """The interpreter would complain once more when it ends."""
    late = "import sys, time; time.sleep(1); from fastdllm.cli import main; sys.exit(main(['--version']))"
    command = f'set -o pipefail; {sys.executable} -c "{late}" {redirection}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, lines), done.stderr


# BEGINNING stands for what is imported besides.
PROGRAM = """
import subprocess, sys
BEGINNING
from fastdllm.shell import one_line
with one_line("tool"):
    print("\\u2191 1 \\u4e2d")
    with open(sys.argv[1], "w") as file:
        subprocess.run(["echo", "noise"])
        file.write("result")
"""


@pytest.mark.parametrize(
    ("redirection", "code"),
    [("", 0), (">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 2), ("2>&1 | true", 141)],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_output_of_any_kind_loses_no_result(tmp_path: Path, redirection: str, code: int, encoding: str) -> None:
    """Closed, the next file would take its number, and with it whatever child processes print."""
    end_with_a_result(tmp_path, PROGRAM.replace("BEGINNING", ""), redirection, code, encoding)


@pytest.mark.parametrize("redirection", ["", "<&- >&- 2>&-"])
def test_nor_does_a_program_with_the_whole_package(tmp_path: Path, redirection: str) -> None:
    end_with_a_result(tmp_path, PROGRAM.replace("BEGINNING", "import fastdllm.generation"), redirection, 0, "ascii")


def end_with_a_result(tmp_path: Path, text: str, redirection: str, code: int, encoding: str) -> None:
    program, result = tmp_path / "program.py", tmp_path / "result"
    program.write_text(text)
    late = "sleep 0.3; " if "|" in redirection else ""
    command = f"set -o pipefail; {{ {late}{sys.executable} {program} {result}; }} {redirection}"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=env, check=False)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    assert result.read_text() == "result"
    if not redirection:
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
    monkeypatch.setattr(shell, "_forget_output", lambda: None)
    assert cli.main([argument.format(folder=tmp_path) for argument in arguments]) == 141
    assert "Broken pipe" not in capfd.readouterr().err


@pytest.mark.parametrize("library", ["matplotlib.pyplot", "scipy", "peft"])
def test_a_script_names_its_missing_library_in_one_line(library: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped, shell.one_line("figures"):
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)
    name = library.partition(".")[0]
    assert stopped.value.code == 1 and capsys.readouterr().err == f"figures needs {name}: pip install {name}\n"
    with pytest.raises(ModuleNotFoundError), shell.one_line("figures"):  # a module of one's own: a fault to see in full
        raise ModuleNotFoundError("No module named 'fastdllm.typo'", name="fastdllm.typo")


@pytest.mark.parametrize("error", [ValueError("a\n  b"), FileNotFoundError("a b")])
def test_a_mistake_is_one_line_and_two(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, shell.one_line("tool"):
        raise error
    assert stopped.value.code == 2 and capsys.readouterr().err == "tool: a b\n"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "scripts").glob("*s/*.py")), ids=lambda path: path.stem)
def test_every_script_says_a_mistake_in_one_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "__main__" not in text or "with one_line(" in text

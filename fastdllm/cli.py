# SPDX-License-Identifier: Apache-2.0
"""The console command `fastdllm`: one name for what the folders llada/, dream/, v2/ and scripts/ offer in a checkout."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Command = Callable[[Sequence[str]], int]
USAGE = """usage: fastdllm COMMAND [OPTIONS]

Fast inference and evaluation of diffusion language models (LLaDA, Dream, Fast-dLLM v2).

  chat    talk to a model in the terminal and see its answers being filled in
  app     the same in the browser: every token with its step and confidence, two settings side by side
  eval    run lm-eval tasks: accuracy, forwards and tokens per second
  serve   an OpenAI-compatible server: chat, completions, streaming, typed answers; one process or many
  batch   answer a file of requests in OpenAI's batch format
  score   run the tests of generated HumanEval and MBPP programs, confined

All but score take --import MODULE, a module or file that registers decoders and caches of your own (fastdllm.register).
fastdllm COMMAND --help explains a command, fastdllm --version tells the version. Start with:  fastdllm chat
"""


def chat(arguments: Sequence[str]) -> int:
    from fastdllm.ui.terminal import main

    return main(arguments, prog="fastdllm chat")


def app(arguments: Sequence[str]) -> int:
    from fastdllm.ui.app import main

    return main(arguments, prog="fastdllm app")


def evaluate(arguments: Sequence[str]) -> int:
    from fastdllm.evaluation.command import main

    return main(arguments=arguments)


def score(arguments: Sequence[str]) -> int:
    from fastdllm.scoring.score import main

    return main(arguments, prog="fastdllm score")


def _version() -> str:
    from fastdllm import __version__

    return __version__


def serve(arguments: Sequence[str]) -> int:
    from fastdllm.serving.command import main

    return main(arguments, prog="fastdllm serve")


def batch(arguments: Sequence[str]) -> int:
    from fastdllm.serving.batch import main

    return main(arguments, prog="fastdllm batch")


class Ended(SystemExit):
    """The end of a program that `shell` has told the reason of, where there is one to tell."""


@contextmanager
def shell(prog: str) -> Iterator[None]:
    """What every program needs around it: an interruption is one line on stderr and exit code 130, SIGTERM one line and 143,
    once the program has ended the processes and removed the folders that it made for itself. So is output that nobody takes:
    141 where its reader is gone (`| head`), as of a program that the signal ends, and 2 where it cannot be written (a full
    disk). Characters that the encoding of the output lacks are written as escapes.
    """
    _open_streams()
    try:
        try:
            with _ended_by_sigterm(prog):
                yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise Ended(130) from None
    except BrokenPipeError:
        _forget_output()
        raise Ended(141) from None
    except Exception as error:
        if not disk_is_full(error):
            raise
        _forget_output()
        print(f"{prog}: {os.strerror(errno.ENOSPC)}", file=sys.stderr)
        raise Ended(2) from None


@contextmanager
def _ended_by_sigterm(prog: str) -> Iterator[None]:
    """Meanwhile SIGTERM is an exception, as SIGINT is; a second one ends the program at once.

    A handler that is there already stays. So does the default where a launcher ends several processes: one that waits for
    the others in a collective operation would not hear an exception.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours or os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(f"{prog}: terminated", file=sys.stderr)
        raise Ended(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def disk_is_full(error: Exception) -> bool:
    """Whether something could not be written for lack of space, which safetensors and torch tell with errors of their own:
    torch's says "unexpected pos 576 vs 534"."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    text = str(error)
    torchs = "inline_container.cc" in text and ("unexpected pos" in text or "failed writing" in text)
    return torchs or os.strerror(errno.ENOSPC) in text


@contextmanager
def one_line(prog: str) -> Iterator[None]:
    """`shell`, in which what the user should mend (ValueError, OSError) is one line on stderr and exit code 2 as well.

    So is a library that is not installed, with exit code 1, as in `main`.
    """
    with shell(prog):
        try:
            yield
        except ModuleNotFoundError as error:
            from fastdllm import libraries

            if not (library := libraries.missing(error)):
                raise
            print(libraries.hint(prog, library), file=sys.stderr)
            raise SystemExit(1) from error
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError) or disk_is_full(error):
                raise
            print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from error


def _open_streams() -> None:
    """Output that is closed (`>&-`) goes nowhere. Else the next file that is opened would take its number, and whatever a
    child process prints would end up in that file."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            place = os.open(os.devnull, os.O_WRONLY)
            if place != number:
                os.dup2(place, number)
                os.close(place)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


COMMANDS: dict[str, Command] = {
    "chat": chat,
    "app": app,
    "eval": evaluate,
    "serve": serve,
    "batch": batch,
    "score": score,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, 2 for an unknown one, 1 when a library it needs is missing.

    Interruptions and output that nobody takes: see `shell`.
    """
    try:
        with shell("fastdllm"):
            return _run(arguments)
    except Ended as ended:
        return int(str(ended.code))


def _forget_output() -> None:
    """Else the interpreter tries to write what is left of it when it ends, and complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str] | None) -> int:
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if name in ("--version", "-V"):
        print(f"fastdllm {_version()}")
        return 0
    if name not in COMMANDS:
        print(f"fastdllm: unknown command {name!r}\n\n{USAGE}" if name else USAGE, end="", file=sys.stderr)
        return 2
    from fastdllm import libraries

    try:
        return COMMANDS[name](rest)
    except ModuleNotFoundError as error:
        if not (library := libraries.missing(error)):
            raise
        print(libraries.hint(f"fastdllm {name}", library), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

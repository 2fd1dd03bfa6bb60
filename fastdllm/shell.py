# SPDX-License-Identifier: Apache-2.0
"""What every program needs around it: interruptions, signals, lost output and mistakes are one line and an exit code.

Programs import this module before what takes seconds to import: from here on an interruption is one line.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For an interruption outside `shell`: while a program imports its libraries, which takes seconds."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).stem}: interrupted", file=sys.stderr)
    else:
        _hook_before(kind, error, trace)


_hook_before = sys.excepthook
sys.excepthook = _say_interrupted  # Python then ends the program by SIGINT


def _send_again(dropped: Any) -> None:
    """For an interruption that comes in a destructor meanwhile, where Python drops it."""
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        _once_more(signal.SIGINT)
    else:
        _dropped_before(dropped)


def _once_more(number: int) -> None:
    """A moment later, when what dropped the signal is over."""
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()


_dropped_before = sys.unraisablehook
sys.unraisablehook = _send_again


class Ended(SystemExit):
    """The end of a program that `shell` has told the reason of, where there is one to tell."""


@contextmanager
def shell(prog: str) -> Iterator[None]:
    """What every program needs around it: an interruption is one line on stderr and exit code 130, SIGTERM one line and 143,
    a terminal that is closed 129, once the program has ended the processes and removed the folders that it made for itself.
    So is output that nobody takes: 141 where its reader is gone (`| head`), as of a program that the signal ends, and 2
    where the system refuses to write it (a full disk, a quota, a folder in the way). Characters that the encoding of the
    output lacks are written as escapes.
    """
    _open_streams()
    try:
        try:
            with _ended_by_signals(prog):
                yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end_at_once_if_interrupted_again()
        print(f"{prog}: interrupted", file=sys.stderr)
        raise Ended(130) from None
    except BrokenPipeError:
        _forget_output()
        raise Ended(141) from None
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # of processes that were interrupted as well
            _end_at_once_if_interrupted_again()
            print(f"{prog}: interrupted", file=sys.stderr)
            raise Ended(130) from None
        if not (reason := of_the_system(error)):
            raise
        _say_last(f"{prog}: {reason}")
        raise Ended(2) from None


# What ends a program besides an interruption: a service or a scheduler that stops it, and the end of its terminal.
ENDINGS = {name: said for name, said in {"SIGTERM": "terminated", "SIGHUP": "hung up"}.items() if hasattr(signal, name)}


@contextmanager
def _ended_by_signals(prog: str) -> Iterator[None]:
    """Meanwhile SIGTERM and SIGHUP are exceptions, as SIGINT is; a second one ends the program at once.

    A handler that is there already stays, and so does what `nohup` ignores. So does the default where a launcher ends
    several processes: one that waits for the others in a collective operation would not hear an exception. Processes that
    the program forked end as they would without.
    """
    alone = os.environ.get("WORLD_SIZE", "1") in ("", "1")
    main_thread = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ENDINGS] if alone and main_thread else []
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    heard: list[signal.Signals] = []
    own = os.getpid()

    def end(number: int, _: object) -> None:
        if heard or os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        heard.append(signal.Signals(number))
        raise Ended(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        with _heard_anywhere(heard):
            yield
    except (Exception, Ended):
        if not heard:  # else it is of something that was interrupted, or of processes that ended by the same signal
            raise
    finally:
        for number in numbers:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)
    if heard:  # only now: before, a line of progress may have been open
        _say_last(f"{prog}: {ENDINGS[heard[0].name]}")
        raise Ended(128 + heard[0])


@contextmanager
def _heard_anywhere(heard: list[signal.Signals]) -> Iterator[None]:
    """A signal may come where Python drops exceptions: in a destructor, or around a fork. There it is sent again."""
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt | Ended):
            before(dropped)
            return
        _once_more(heard.pop() if heard else signal.SIGINT)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _say_last(line: str) -> None:
    """The last line of a program, after what it printed. Where they cannot be written, as to a terminal that is gone, they
    are dropped."""
    try:
        sys.stdout.flush()
    except OSError:
        _forget_output()
    with suppress(OSError):
        print(line, file=sys.stderr)


def _end_at_once_if_interrupted_again() -> None:
    """The program is over: an impatient second Ctrl-C would show where the interpreter tidies up."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, of a quota, of a limit on the size of a file


def no_room(error: Exception) -> bool:
    """Whether something could not be written for lack of room."""
    return of_the_system(error) in [os.strerror(number) for number in NO_ROOM]


def of_the_system(error: Exception) -> str | None:
    """What the system says that refused to read or write a file, None for other errors. safetensors and torch tell it with
    errors of their own: torch's says "unexpected pos 576 vs 534", whatever the reason was."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        if error.errno in NO_ROOM:
            return os.strerror(error.errno)
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(names)}: {error.strerror}" if names and error.strerror else text
    if "inline_container.cc" in text and ("unexpected pos" in text or "failed writing" in text):
        return os.strerror(errno.ENOSPC)
    known = next((said for said in map(os.strerror, NO_ROOM) if said in text), None)
    return known or (text if "(os error " in text else None)


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
            if isinstance(error, BrokenPipeError) or no_room(error):
                raise
            print(f"{prog}: {of_the_system(error) or ' '.join(str(error).split())}", file=sys.stderr)
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


def _forget_output() -> None:
    """Else the interpreter tries to write what is left of it when it ends, and complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

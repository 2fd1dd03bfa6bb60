# SPDX-License-Identifier: Apache-2.0
"""Command lines whose mistakes are told in one line: a parser, and types for numbers that lie in a range."""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A mistake is one line on stderr and exit code 2; `--help` shows the usage. A list holds each of its values once. An
    empty path is a mistake, as of a variable of the shell that is not set: it would mean the present folder."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        options, rest = super().parse_known_args(*args, **kwargs)
        for action in self._actions:
            if action.nargs in ("+", "*") and isinstance(values := getattr(options, action.dest, None), list):
                setattr(options, action.dest, [*dict.fromkeys(values)])
        return options, rest

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1, 0.75)
        hint = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}{hint}\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and "--" in arg_strings:  # of --name=--, which argparse reads as no value at all
            raise argparse.ArgumentError(action, "'--' is no value")
        if action.type in (Path, output_file, output_folder) and "" in arg_strings:
            raise argparse.ArgumentError(action, "is empty")
        return super()._get_values(action, arg_strings)


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """A type of arguments: an `int` or `float` from `least` to `most`. Not a number is none, and infinity is not finite."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):
            name = "an integer" if kind is int else "a number"
            allowed = f"from {least:.12g} to {most:.12g}" if math.isfinite(most) else f"of at least {least:g}"
            raise argparse.ArgumentTypeError(f"must be {name} {allowed}, not {text[:60]!r}")
        return value

    return read


COUNT = number(int, 1, 10**9)  # of problems, rows, steps: at least one
SIZE = number(int, 0, 10**9)
SEED = number(int, 0, 2**32 - 1)  # what numpy takes
SHARE = number(float, 0, 1)
AMOUNT = number(float, 0, 1e9)  # of seconds, a rate, a weight


def output_file(text: str) -> Path:
    """A type of arguments: a file that can be written. A place that cannot be shows before anything is computed."""
    path = Path(text)
    there = os.path.lexists(path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666))
        if not there:
            path.unlink()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} cannot be written ({reason(error)})") from error
    return path


def output_folder(text: str) -> Path:
    """Likewise: a folder that is there, or can be made where folders are."""
    path = Path(text)
    try:
        found = next(part for part in (path, *path.absolute().parents) if _is_there(part))
        if not (found.is_dir() and os.access(found, os.W_OK)):
            raise NotADirectoryError(f"{found} is no folder that can be written")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} cannot be made ({reason(error)})") from error
    return path


def _is_there(path: Path) -> bool:
    """Whether something has this name, a link to nothing included. Raises OSError where nothing can have it."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def reason(error: Exception) -> str:
    """What an error of the system says, without the name of the file."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)

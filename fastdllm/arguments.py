# SPDX-License-Identifier: Apache-2.0
"""Command lines whose mistakes are told in one line: a parser, and types for numbers that lie in a range."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A mistake is one line on stderr and exit code 2; `--help` shows the usage. A list holds each of its values once."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        options, rest = super().parse_known_args(*args, **kwargs)
        for action in self._actions:
            if action.nargs in ("+", "*") and isinstance(values := getattr(options, action.dest, None), list):
                setattr(options, action.dest, [*dict.fromkeys(values)])
        return options, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


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

# SPDX-License-Identifier: Apache-2.0
"""The tests of a problem, run in a process that the program under test cannot reach."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from contextlib import suppress

from . import remote

ENDED = "ended"  # the program's process did, before its tests
_TESTS = "tests.py"
_MOST_MESSAGE = 1000


def run(tester: remote.ChecksSide, program: str, source: str, setup: str, names: Iterable[str]) -> dict[str, str]:
    """Run the program, then `setup` and the tests `source` with `names` taken from it: status and message.

    `setup` is what the problem gives. It overrides anything of that name in the program.
    """
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    message = ""
    try:
        tester.run()
        for name in names:
            with suppress(NameError):
                vars(module)[name] = tester.name(name)
        exec(compile(setup, "setup.py", "exec", dont_inherit=True), vars(module))
        exec(compile(source, _TESTS, "exec", dont_inherit=True), vars(module))
    except BaseException as error:  # SystemExit in a test is a failure, too
        message = _explain(error, program, source)
    if tester.channel.broken:  # a test may have caught the exception that says so
        reason = tester.channel.broken
        return {"status": ENDED, "message": "" if reason == ENDED else f"the program {reason}"}
    return {"status": "failed", "message": message} if message else {"status": "passed", "message": ""}


def _explain(error: BaseException, program: str, source: str) -> str:
    described = vars(error).get("described")
    if described is None:
        described, text = remote.describe(error, _TESTS), source
    else:
        text = program
    lines = text.split("\n")
    number = described.get("line")
    at = f" at: {lines[number - 1].strip()}" if isinstance(number, int) and 0 < number <= len(lines) else ""
    return f"{described.get('text')}{at}"[:_MOST_MESSAGE]

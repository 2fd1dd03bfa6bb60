# SPDX-License-Identifier: Apache-2.0
"""Programs are run with and without namespaces."""

from __future__ import annotations

import pytest

from fastdllm.scoring.sandbox import Checks, Limits, Verdict, run_program

MODES = [pytest.param(True, id="namespaces"), pytest.param(False, id="without")]


@pytest.fixture(params=MODES)
def run(request: pytest.FixtureRequest):
    """Run a program; skip if the machine lacks the means named."""

    def run(program: str, *means: str, checks: Checks | None = None, seconds: float = 20.0, **limits: int) -> Verdict:
        verdict = run_program(program, Limits(seconds=seconds, namespaces=request.param, **limits), checks)
        for name in means:
            if not verdict.isolation[name]:
                pytest.skip(f"this system does not give: {name}")
        return verdict

    return run

# SPDX-License-Identifier: Apache-2.0
"""examples/serve_client.py, against a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_client_gets_a_right_answer_and_follows_it(server: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "examples" / "serve_client.py", server], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answer, _, forwards = done.stdout.partition(" forwards\n\n")
    assert "#### 39" in answer
    assert len(forwards.splitlines()) >= 2 and "░" in forwards.splitlines()[0]

# SPDX-License-Identifier: Apache-2.0
"""How many examples a property is tried on."""

from __future__ import annotations

import os


def examples(nightly: int) -> int:
    """As many where FASTDLLM_TESTS=nightly says so, otherwise a quarter. Those of another run are others, unless a test
    derandomizes them."""
    return nightly if os.environ.get("FASTDLLM_TESTS") == "nightly" else max(10, nightly // 4)

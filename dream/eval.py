# SPDX-License-Identifier: Apache-2.0
"""Dream under lm-eval as `dream`: accelerate launch eval.py --model dream ... (see eval.md)."""

import sys

from fastdllm.shell import shell  # first: from here on an interruption is one line

# isort: split
from fastdllm.evaluation.adapters import DreamEvalHarness
from fastdllm.evaluation.command import main

__all__ = ["DreamEvalHarness"]

if __name__ == "__main__":
    with shell("eval.py"):
        sys.exit(main("dream", "eval.py"))

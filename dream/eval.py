# SPDX-License-Identifier: Apache-2.0
"""Dream under lm-eval as `dream`: accelerate launch eval.py --model dream ... (see eval.md)."""

import sys

from fastdllm.cli import shell
from fastdllm.evaluation.adapters import DreamEvalHarness
from fastdllm.evaluation.command import main

__all__ = ["DreamEvalHarness"]

if __name__ == "__main__":
    with shell("eval.py"):
        sys.exit(main("dream", "eval.py"))

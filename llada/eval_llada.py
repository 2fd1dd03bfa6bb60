# SPDX-License-Identifier: Apache-2.0
"""LLaDA under lm-eval as `llada_dist`: accelerate launch eval_llada.py --model llada_dist ... (see eval.md)."""

import sys

from fastdllm.shell import shell  # first: from here on an interruption is one line

# isort: split
from fastdllm.evaluation.adapters import LLaDAEvalHarness
from fastdllm.evaluation.command import main

__all__ = ["LLaDAEvalHarness"]

if __name__ == "__main__":
    with shell("eval_llada.py"):
        sys.exit(main("llada_dist", "eval_llada.py"))

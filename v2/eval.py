# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2 under lm-eval as `fast_dllm_v2`: accelerate launch eval.py --model fast_dllm_v2 ... (see README.md)."""

import sys

from fastdllm.shell import shell  # first: from here on an interruption is one line

# isort: split
from fastdllm.evaluation.adapters import FastDLLMv2EvalHarness
from fastdllm.evaluation.command import main

__all__ = ["FastDLLMv2EvalHarness"]

if __name__ == "__main__":
    with shell("eval.py"):
        sys.exit(main("fast_dllm_v2", "eval.py"))

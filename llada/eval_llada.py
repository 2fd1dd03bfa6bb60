# SPDX-License-Identifier: Apache-2.0
"""LLaDA under lm-eval as `llada_dist`: accelerate launch eval_llada.py --model llada_dist ... (see eval.md)."""

from typing import ClassVar

from fastdllm.harness import DiffusionLM, main, register


class LLaDAEvalHarness(DiffusionLM):
    """Published defaults: one token a step, no cache."""

    defaults: ClassVar = {"decoder": "quota", "confidence": "probability", "cache": "none"}


register("llada_dist", LLaDAEvalHarness)

if __name__ == "__main__":
    main()

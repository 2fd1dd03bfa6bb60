# SPDX-License-Identifier: Apache-2.0
"""The adapters under their published names, with the defaults of the published evaluation scripts."""

from __future__ import annotations

from typing import Any, ClassVar

from lm_eval.api.instance import Instance

from fastdllm.evaluation.harness import DiffusionLM
from fastdllm.evaluation.options import V2Options

# The adapter of Fast-dLLM v2's wording, double braces included, and the words it stands in for, by the start of the task's
# name.
REASON = "Please reason step by step, and put your final answer within \\boxed{{}}."
REPLACED = {"gsm8k": "Answer:", "minerva_math": "Solution:"}


class LLaDAEvalHarness(DiffusionLM):
    """`llada_dist`. Published defaults: one token a step, no cache."""

    defaults: ClassVar = {"decoder": "quota", "confidence": "probability", "cache": "none"}


class DreamEvalHarness(DiffusionLM):
    """`dream`. Published defaults: tokens of least entropy first, one a step, no cache, the whole answer as one block."""

    defaults: ClassVar = {"decoder": "quota", "confidence": "entropy", "cache": "none"}

    def complete(self, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("cache") == "none":
            options.setdefault("block_length", options["gen_length"])
        return options


class FastDLLMv2EvalHarness(DiffusionLM):
    """`fast_dllm_v2`. Published defaults: threshold 0.9, block cache without sub-blocks, 2048 new tokens."""

    options_type: ClassVar = V2Options
    defaults: ClassVar = {"cache": "block", "gen_length": 2048}

    def prompt_of(self, request: Instance) -> str:
        prompt = request.args[0]
        for task, words in REPLACED.items():
            if self.options.cot_prompt and (request.task_name or "").startswith(task):
                prompt = prompt.replace(words, REASON)
        return prompt

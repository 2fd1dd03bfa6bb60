# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2 under lm-eval as `fast_dllm_v2`: accelerate launch eval.py --model fast_dllm_v2 ... (see README.md)."""

from dataclasses import dataclass
from typing import ClassVar

from lm_eval.api.instance import Instance

from fastdllm.harness import DiffusionLM, main, register
from fastdllm.published import HarnessOptions

# The published adapter's wording, double braces included, and the words it stands in for, by the start of the task's name.
REASON = "Please reason step by step, and put your final answer within \\boxed{{}}."
REPLACED = {"gsm8k": "Answer:", "minerva_math": "Solution:"}


@dataclass(frozen=True)
class V2Options(HarnessOptions):
    """cot_prompt: ask for step-by-step reasoning in gsm8k and minerva_math, as the published numbers did. Off by default,
    because it changes what lm-eval reports under these tasks' names."""

    cot_prompt: bool = False


class FastDLLMv2EvalHarness(DiffusionLM):
    """Published defaults: threshold 0.9, block cache without sub-blocks, 2048 new tokens."""

    options_type: ClassVar = V2Options
    defaults: ClassVar = {"cache": "block", "gen_length": 2048}

    def prompt_of(self, request: Instance) -> str:
        prompt = request.args[0]
        for task, words in REPLACED.items():
            if self.options.cot_prompt and (request.task_name or "").startswith(task):
                prompt = prompt.replace(words, REASON)
        return prompt


register("fast_dllm_v2", FastDLLMv2EvalHarness)

if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Dream under lm-eval as `dream`: accelerate launch eval.py --model dream ... (see eval.md)."""

from typing import Any, ClassVar

from fastdllm.harness import DiffusionLM, main, register


class DreamEvalHarness(DiffusionLM):
    """Published defaults: the tokens of least entropy first, one a step, no cache, the whole answer as one block."""

    defaults: ClassVar = {"decoder": "quota", "confidence": "entropy", "cache": "none"}

    def complete(self, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("cache") == "none":
            options.setdefault("block_length", options["gen_length"])
        return options


register("dream", DreamEvalHarness)

if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The console command `fastdllm`: one name for what the folders llada/, dream/, v2/ and scripts/ offer in a checkout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

Command = Callable[[Sequence[str]], int]
USAGE = """usage: fastdllm COMMAND [OPTIONS]

Fast inference and evaluation of diffusion language models (LLaDA, Dream, Fast-dLLM v2).

  chat    talk to a model in the terminal and see its answers being filled in
  app     the same in the browser: every token with its step and confidence, two settings side by side
  eval    run lm-eval tasks: accuracy, forwards and tokens per second
  score   run the tests of generated HumanEval and MBPP programs, confined

fastdllm COMMAND --help explains a command. Start with:  fastdllm chat
"""

EVAL_USAGE = """usage: fastdllm eval --tasks TASK[,TASK...] --model_args pretrained=MODEL[,OPTION=VALUE...] [OPTIONS]

Run lm-eval tasks with a diffusion language model: accuracy, forwards per sample, tokens per forward and per second.

  --tasks        names of lm-eval, or gsm_symbolic, which ships with fastdllm and needs no network
  --model_args   pretrained=MODEL (a shipped name, a folder or a hub id) and any option of fastdllm.DecodeConfig:
                 gen_length, block_length, cache, decoder, threshold, factor, steps, temperature, ...
                 show_speed=True prints the figures at the end
  --num_fewshot  worked examples in front of each question
  --limit        only the first N questions of each task
  --batch_size   questions decoded together
  --output_path  folder for the results; --log_samples keeps every answer

Examples:
  fastdllm eval --tasks gsm_symbolic --limit 20 --model_args pretrained=tiny-llada,show_speed=True
  fastdllm eval --tasks gsm8k --num_fewshot 5 --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,cache=dual,threshold=0.9

The other options are lm-eval's: fastdllm eval run --help lists them, fastdllm eval ls tasks lists the tasks.
"""


def chat(arguments: Sequence[str]) -> int:
    from fastdllm.ui.terminal import main

    return main(arguments, prog="fastdllm chat")


def app(arguments: Sequence[str]) -> int:
    from fastdllm.ui.page import main

    return main(arguments, prog="fastdllm app")


def evaluate(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(EVAL_USAGE, end="")
        return 0
    from fastdllm.harness import DiffusionLM, main, register

    register("fastdllm", DiffusionLM)
    runs = arguments[0] == "run" or arguments[0].startswith("-")
    chosen = any(argument.partition("=")[0] in ("--model", "-M", "--config", "-C") for argument in arguments)
    sys.argv = ["fastdllm eval", *arguments, *(["--model", "fastdllm"] if runs and not chosen else [])]
    main()
    return 0


def score(arguments: Sequence[str]) -> int:
    from fastdllm.scoring.score import main

    return main(arguments, prog="fastdllm score")


COMMANDS: dict[str, Command] = {"chat": chat, "app": app, "eval": evaluate, "score": score}
NEEDS = {"gradio": "ui", "rich": "ui", "transformers": "ui", "tokenizers": "ui", "lm_eval": "eval", "tqdm": "eval"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, 2 for an unknown one, 1 when a library it needs is missing."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if name not in COMMANDS:
        print(f"fastdllm: unknown command {name!r}\n\n{USAGE}" if name else USAGE, end="", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](rest)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in NEEDS:
            raise
        print(f"fastdllm {name} needs {missing}: pip install 'fastdllm[{NEEDS[missing]}]'", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The console command `fastdllm`: one name for what the folders llada/, dream/, v2/ and scripts/ offer in a checkout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from fastdllm.fields import shown
from fastdllm.shell import Ended, shell

Command = Callable[[Sequence[str]], int]
USAGE = """usage: fastdllm COMMAND [OPTIONS]

Fast inference and evaluation of diffusion language models (LLaDA, Dream, Fast-dLLM v2).

  chat    talk to a model in the terminal and see its answers being filled in
  app     the same in the browser: every token with its step and confidence, two settings side by side
  eval    run lm-eval tasks: accuracy, forwards and tokens per second
  serve   an OpenAI-compatible server: chat, completions, streaming, typed answers; one process or many
  batch   answer a file of requests in OpenAI's batch format
  score   run the tests of generated HumanEval and MBPP programs, confined

All but score take --import MODULE, a module or file that registers decoders and caches of your own (fastdllm.register).
fastdllm COMMAND --help explains a command, fastdllm --version tells the version. Start with:  fastdllm chat
"""


def chat(arguments: Sequence[str]) -> int:
    from fastdllm.ui.terminal import main

    return main(arguments, prog="fastdllm chat")


def app(arguments: Sequence[str]) -> int:
    from fastdllm.ui.app import main

    return main(arguments, prog="fastdllm app")


def evaluate(arguments: Sequence[str]) -> int:
    from fastdllm.evaluation.command import main

    return main(arguments=arguments)


def score(arguments: Sequence[str]) -> int:
    from fastdllm.scoring.score import main

    return main(arguments, prog="fastdllm score")


def _version() -> str:
    from fastdllm import __version__

    return __version__


def serve(arguments: Sequence[str]) -> int:
    from fastdllm.serving.command import main

    return main(arguments, prog="fastdllm serve")


def batch(arguments: Sequence[str]) -> int:
    from fastdllm.serving.batch import main

    return main(arguments, prog="fastdllm batch")


COMMANDS: dict[str, Command] = {
    "chat": chat,
    "app": app,
    "eval": evaluate,
    "serve": serve,
    "batch": batch,
    "score": score,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, 2 for an unknown one, 1 when a library it needs is missing.

    Interruptions and output that nobody takes: see `shell`.
    """
    try:
        with shell("fastdllm"):
            return _run(arguments)
    except Ended as ended:
        return int(str(ended.code))


def _run(arguments: Sequence[str] | None) -> int:
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if name in ("--version", "-V"):
        print(f"fastdllm {_version()}")
        return 0
    if name not in COMMANDS:
        known = f"{', '.join(COMMANDS)}; fastdllm --help explains them"
        print(f"fastdllm: unknown command {shown(name)}; known are {known}\n" if name else USAGE, end="", file=sys.stderr)
        return 2
    from fastdllm import libraries

    try:
        return COMMANDS[name](rest)
    except ModuleNotFoundError as error:
        if not (library := libraries.missing(error)):
            raise
        print(libraries.hint(f"fastdllm {name}", library), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

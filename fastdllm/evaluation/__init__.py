# SPDX-License-Identifier: Apache-2.0
"""Evaluation with lm-eval: `import fastdllm.evaluation` makes the adapters known to it by name.

    import lm_eval, fastdllm.evaluation
    lm_eval.simple_evaluate("llada_dist", model_args="pretrained=tiny-llada,threshold=0.9", tasks=["gsm_symbolic"],
                            task_manager=fastdllm.evaluation.task_manager())

lm-eval 0.4.13 looks for models in no installed package, so that its own command `lm_eval` cannot know these names; the
command `fastdllm eval` and the scripts of a checkout do. Without lm-eval this package can be imported and registers nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastdllm.tasks import TASKS_DIR

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

ADAPTERS = {
    "fastdllm": "fastdllm.evaluation.harness:DiffusionLM",
    "llada_dist": "fastdllm.evaluation.adapters:LLaDAEvalHarness",
    "dream": "fastdllm.evaluation.adapters:DreamEvalHarness",
    "fast_dllm_v2": "fastdllm.evaluation.adapters:FastDLLMv2EvalHarness",
}


def register(name: str, adapter: Any) -> None:
    """Make `adapter` (a class, or "module:class", which is imported when it is used) known as `--model name`.

    lm-eval's own models first: it adds them only while its registry is empty. The first to come keeps the name.
    """
    import lm_eval.models  # noqa: F401 - registers lm-eval's own
    from lm_eval.api.registry import model_registry

    if name not in model_registry:
        model_registry.register(name, target=adapter)


def task_manager(include_path: str | list[str] | None = None, **options: Any) -> TaskManager:
    """lm-eval's TaskManager, which also knows the tasks that ship with fastdllm."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_folders(include_path), **options)


def task_folders(include_path: str | list[str] | None) -> list[str]:
    """The folder of the shipped tasks and those of `include_path`, which come later and so win."""
    given = [include_path] if isinstance(include_path, str) else list(include_path or ())
    return [str(TASKS_DIR), *(folder for folder in given if folder != str(TASKS_DIR))]


if find_spec("lm_eval"):
    for _name, _adapter in ADAPTERS.items():
        register(_name, _adapter)

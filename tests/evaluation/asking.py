# SPDX-License-Identifier: Apache-2.0
"""Requests of lm-eval to the adapters, and the questions that the tests of them share."""

from __future__ import annotations

import json
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from fastdllm.evaluation.harness import DiffusionLM
from fastdllm.tasks import TASKS_DIR

QUESTIONS = [
    json.loads(line)["question"] for line in (TASKS_DIR / "gsm_symbolic" / "test.jsonl").read_text().splitlines()[:5]
]


def adapter(batch_size: int | str = 2, device: str = "cpu", **options: Any) -> DiffusionLM:
    return DiffusionLM(pretrained="tiny-llada", batch_size=batch_size, device=device, **options)


def generations(*asked: tuple[str, dict[str, Any]]) -> list[Instance]:
    return [Instance("generate_until", {}, args, i, ("task", i, 1)) for i, args in enumerate(asked)]


def chat(model: DiffusionLM, question: str) -> str:
    return model.apply_chat_template([{"role": "user", "content": question}])


def likelihoods(model: DiffusionLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return model.loglikelihood(
        [Instance("loglikelihood", {}, pair, i, ("choices", i, 1)) for i, pair in enumerate(pairs)], disable_tqdm=True
    )


def evaluate(model: DiffusionLM, task: str, **options: Any) -> dict[str, Any]:
    tasks = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    options = {"bootstrap_iters": 0, "log_samples": True, **options}
    return lm_eval.simple_evaluate(model, tasks=[task], task_manager=tasks, **options)

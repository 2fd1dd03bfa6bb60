# SPDX-License-Identifier: Apache-2.0
"""The tasks that read local files, run by lm-eval itself with a model that recites known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdllm.scoring.samples import human_eval_problems, read_lines
from fastdllm.tasks import TASKS_DIR

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.model import LM  # noqa: E402 - only after the import above did not skip
from lm_eval.tasks import TaskManager  # noqa: E402


class Reciter(LM):
    """Answers each prompt by a function of it, and notes the prompts."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.prompts: list[str] = []

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list) -> list:
        raise AssertionError("these tasks generate; nothing is scored by log-likelihood")

    loglikelihood_rolling = loglikelihood


def evaluate(task: str, model: LM, metadata: dict[str, Any], **options: Any) -> dict[str, float]:
    tasks = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
    options = {"num_fewshot": None, "bootstrap_iters": 0, "metadata": metadata, **options}
    return lm_eval.simple_evaluate(model, tasks=[task], task_manager=tasks, **options)["results"][task]


QUESTIONS = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}", "id": n} for n in range(8)]


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_gsm8k_from_a_file(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"problems{ending}"
    lines = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    file.write_text(json.dumps(QUESTIONS) if ending == ".json" else lines)
    answers = {row["question"]: row["answer"] for row in QUESTIONS}
    answers["What is 7 and 7?"] = "Surely 14"  # the right number, not in the asked form
    model = Reciter(lambda prompt: answers[prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:")])
    scores = evaluate("gsm8k_local", model, {"data_file": str(file)})
    assert scores["exact_match,strict-match"] == 7 / 8
    assert scores["exact_match,flexible-extract"] == 1.0
    assert len(model.prompts) == 8
    for prompt in model.prompts:
        questions = [line for line in prompt.splitlines() if line.startswith("Question: ")]
        assert len(questions) == len(set(questions)) == 6, "five examples, and none of them the question itself"


def test_gsm8k_takes_its_examples_from_a_file_of_their_own(tmp_path: Path) -> None:
    test, train = tmp_path / "test.json", tmp_path / "train.json"
    test.write_text(json.dumps(QUESTIONS[:1]))
    train.write_text(json.dumps(QUESTIONS[1:]))
    model = Reciter(lambda prompt: "#### 0")
    scores = evaluate("gsm8k_local_train", model, {"data_file": str(test), "fewshot_file": str(train)}, num_fewshot=7)
    assert scores["exact_match,strict-match"] == 1.0
    assert all(row["answer"] in model.prompts[0] for row in QUESTIONS[1:])


def test_humaneval_from_the_package_without_a_network() -> None:
    solutions = {doc["prompt"]: doc["canonical_solution"] for doc in read_lines(human_eval_problems())}
    model = Reciter(lambda prompt: solutions[prompt] if len(prompt) % 2 else "    pass\n")
    scores = evaluate("humaneval_local", model, {}, limit=8, confirm_run_unsafe_code=True)
    assert scores["pass@1,none"] == sum(len(prompt) % 2 for prompt in model.prompts) / 8 > 0
    with pytest.raises(ValueError, match="unsafe"):
        evaluate("humaneval_local", model, {}, limit=1)


def test_bad_files_are_errors_that_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data_file"):
        evaluate("gsm8k_local", Reciter(str), {})
    file = tmp_path / "problems.jsonl"
    file.write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match="row 1: no answer; it has question"):
        evaluate("gsm8k_local", Reciter(str), {"data_file": str(file)})

# SPDX-License-Identifier: Apache-2.0
"""The shipped GSM-Symbolic tasks, run by lm-eval itself, and the promises that their data make."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import fastdllm
from fastdllm import build, prompts
from fastdllm.config import DecodeConfig
from fastdllm.models import Model
from fastdllm.tasks import TASKS_DIR

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.model import LM  # noqa: E402 - only after the import above did not skip
from lm_eval.tasks import TaskManager  # noqa: E402

from fastdllm.evaluation.harness import DiffusionLM  # noqa: E402
from scripts import quickstart  # noqa: E402
from scripts.studies import pareto  # noqa: E402

DATA = TASKS_DIR / "gsm_symbolic"


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


class Scripted(LM):
    """Answers prompts, and scores (context, continuation) pairs, by the given functions."""

    def __init__(self, answer: Callable[[str], str], score: Callable[[str, str], float]) -> None:
        super().__init__()
        self.answer, self.score = answer, score
        self.prompts: list[str] = []

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        return [(self.score(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        raise AssertionError("no task here asks for a rolling log-likelihood")


def evaluate(tasks: list[str], model: LM, **options: object) -> dict[str, dict[str, float]]:
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    return lm_eval.simple_evaluate(
        model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **{"num_fewshot": None, **options}
    )["results"]


def asked(prompt: str) -> str:
    return prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:")


def test_splits_share_no_question_and_end_in_a_result() -> None:
    test, validation, fewshot = rows("test"), rows("validation"), rows("fewshot")
    assert (len(test), len(validation), len(fewshot)) == (500, 500, 8)
    questions = [row["question"] for row in test + validation + fewshot]
    assert len(set(questions)) == len(questions)
    for row in test + validation + fewshot:
        assert float(row["answer"].rsplit("\n#### ", 1)[1]) is not None


@pytest.mark.parametrize("task, split", [("gsm_symbolic", "test"), ("gsm_symbolic_validation", "validation")])
def test_answers_are_matched_strictly_and_flexibly(task: str, split: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # the data are found from anywhere
    answers = {row["question"]: row["answer"] for row in rows(split)}
    unmarked = rows(split)[1]["question"]
    answers[unmarked] = "It is " + answers[unmarked].rsplit("#### ", 1)[1]  # right, not in the asked form
    answers[rows(split)[2]["question"]] = "#### -77777"
    model = Scripted(lambda prompt: answers[asked(prompt)], lambda *_: 0.0)
    scores = evaluate([task], model, limit=20)[task]
    assert scores["exact_match,strict-match"] == 18 / 20
    assert scores["exact_match,flexible-extract"] == 19 / 20
    assert model.prompts[0] == f"Question: {rows(split)[0]['question']}\nAnswer:"


def test_few_shot_examples_come_from_training() -> None:
    model = Scripted(lambda prompt: "", lambda *_: 0.0)
    evaluate(["gsm_symbolic"], model, limit=3, num_fewshot=2)
    pool = {row["question"]: row["answer"] for row in rows("fewshot")}
    for prompt in model.prompts:
        *examples, last = prompt.split("\n\nQuestion: ")
        assert len(examples) == 2 and last.endswith("\nAnswer:")
        for example in examples:
            question, _, answer = example.removeprefix("Question: ").partition("\nAnswer: ")
            assert pool[question] == answer


def test_multiple_choice_rewards_the_right_result_only() -> None:
    gold = {row["context"]: row for row in rows("multiple_choice")}

    def score(context: str, continuation: str, sign: int) -> float:
        for known, row in gold.items():
            if context.endswith(known):
                return sign * float(continuation == " " + row["choices"][row["gold"]])
            if context.endswith(f"{known} {row['stem']}"):
                return sign * float(continuation == row["digits"][row["digit_gold"]])
        raise AssertionError(context)

    tasks = ["gsm_symbolic_mc", "gsm_symbolic_mc_digit"]
    for sign, accuracy in ((1, 1.0), (-1, 0.0)):
        results = evaluate(tasks, Scripted(lambda _: "", lambda a, b, s=sign: score(a, b, s)), limit=30)
        assert [results[task]["acc,none"] for task in tasks] == [accuracy] * 2


def test_choices_differ_and_digits_are_one_token() -> None:
    for row in rows("multiple_choice"):
        assert len(set(row["choices"])) == len(set(row["digits"])) == 4
        right = row["choices"][row["gold"]]
        assert right == row["stem"] + row["digits"][row["digit_gold"]]
        assert all(len(digit) == 1 and digit.isdigit() for digit in row["digits"])


@cache
def shipped(name: str) -> Model:
    return fastdllm.load(name, device="cpu")


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream", "tiny-fast-dllm-v2"])
@pytest.mark.parametrize("task, template", [("gsm_symbolic_chat", "chat"), ("gsm_symbolic", "plain")])
def test_an_evaluation_asks_what_the_study_asks_token_by_token(name: str, task: str, template: str, monkeypatch) -> None:
    """Else two tables of one model show two accuracies: a second "Question:" in the turn cost tiny-llada eleven points."""
    model, requests = DiffusionLM(pretrained=shipped(name)), []
    monkeypatch.setattr(model, "generate_until", lambda asked, **_: requests.extend(asked) or [""] * len(asked))
    evaluate([task], model, limit=20, num_fewshot=0, apply_chat_template=template == "chat")
    asked = [model.tok_encode(model.prompt_of(request)) for request in requests]
    study = [
        pareto.prompt(row["question"], template) for row in pareto.problems("test", 20, pareto.TASKS["gsm_symbolic"].folder)
    ]
    assert asked == [ids.tolist() for ids in prompts.encode(shipped(name), study)]


def test_the_quick_start_runs_the_settings_of_the_study() -> None:
    assert quickstart.TASK == "gsm_symbolic_chat"
    args = pareto.arguments(["run"])
    same = {"one_a_step": "quota+dual", "threshold": "threshold=0.9+dual", "v2_one_a_step": "quota+block"}
    for name, setting in same.items():
        run = quickstart.RUNS[name]
        adapter = DiffusionLM(pretrained=shipped(run.model), **dict(item.split("=") for item in run.options.split(",")))
        spec = shipped(run.model).spec
        assert build.resolve(spec, adapter._configure({})) == build.resolve(
            spec, DecodeConfig(**pareto.options_of(setting, args))
        )

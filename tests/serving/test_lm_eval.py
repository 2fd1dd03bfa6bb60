# SPDX-License-Identifier: Apache-2.0
"""lm-eval's own API models against the server give the scores that the adapter gives."""

from __future__ import annotations

from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs fastdllm[eval]")
pytest.importorskip("tenacity", reason="needs lm_eval[api]")

from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import fastdllm  # noqa: E402
from fastdllm.tasks import TASKS_DIR  # noqa: E402

LIMIT = 6


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def evaluate(model: Any, task: str, **options: Any) -> dict[str, Any]:
    options = {"limit": LIMIT, "bootstrap_iters": 0, "log_samples": True, **options}
    manager = TaskManager(include_path=str(TASKS_DIR))
    return lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, **options)


def adapter(**options: Any) -> Any:
    from fastdllm.evaluation.harness import DiffusionLM

    return DiffusionLM(pretrained="tiny-llada", device="cpu", batch_size=4, **options)


def api(kind: Any, server: str, path: str, **options: Any) -> Any:
    folder = str(fastdllm.models.find_folder("tiny-llada"))
    return kind(
        base_url=f"{server}{path}", model="tiny-llada", tokenizer=folder, max_length=512, num_concurrent=4, **options
    )


def samples(result: dict[str, Any], task: str) -> list[Any]:
    return [(sample["doc_id"], sample["filtered_resps"]) for sample in result["samples"][task]]


@pytest.mark.slow
def test_local_completions_generates_what_the_adapter_generates(server: str) -> None:
    task = "gsm_symbolic"
    options = {"gen_kwargs": "max_gen_toks=96,temperature=0"}
    expected = evaluate(adapter(gen_length=96), task)
    got = evaluate(api(LocalCompletionsAPI, server, "/v1/completions", tokenizer_backend="huggingface"), task, **options)
    assert samples(got, task) == samples(expected, task)
    assert got["results"][task] == expected["results"][task]


@pytest.mark.slow
def test_local_chat_completions_generates_what_the_adapter_generates(server: str) -> None:
    task = "gsm_symbolic"
    options = {"gen_kwargs": "max_gen_toks=96,temperature=0", "apply_chat_template": True}
    expected = evaluate(adapter(gen_length=96), task, apply_chat_template=True)
    model = LocalChatCompletion(base_url=f"{server}/v1/chat/completions", model="tiny-llada", num_concurrent=4)
    got = evaluate(model, task, **options)
    assert samples(got, task) == samples(expected, task)
    assert got["results"][task] == expected["results"][task]


@pytest.mark.slow
def test_local_completions_scores_what_the_adapter_scores(server: str) -> None:
    task = "gsm_symbolic_mc_digit"
    expected = evaluate(adapter(likelihood="chain"), task, limit=3)
    got = evaluate(
        api(LocalCompletionsAPI, server, "/v1/completions", tokenizer_backend="huggingface", batch_size=4), task, limit=3
    )
    assert got["results"][task] == expected["results"][task]
    for (_, own), (_, theirs) in zip(samples(got, task), samples(expected, task), strict=True):
        assert [value for value, _ in own] == pytest.approx([value for value, _ in theirs], abs=1e-3)
        assert [greedy for _, greedy in own] == [greedy for _, greedy in theirs]

# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoints: they solve problems nobody trained them on, and rows of a batch stay independent."""

from __future__ import annotations

import json
from functools import cache

import pytest

import fastdllm
from fastdllm.models import Model
from fastdllm.tasks import TASKS_DIR

MODELS = ["tiny-llada", "tiny-dream", "tiny-fast-dllm-v2"]


@cache
def model(name: str) -> Model:
    return fastdllm.load(name, device="cpu")


def problems(count: int) -> list[dict[str, str]]:
    lines = (TASKS_DIR / "gsm_symbolic" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def prompt(name: str, question: str) -> str:
    turn = [{"role": "user", "content": question}]
    return model(name).tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("name", MODELS)
def test_most_of_a_few_problems_are_solved_in_parallel(name: str) -> None:
    rows = problems(20)[8:]
    texts = [prompt(name, row["question"]) for row in rows]
    out = fastdllm.generate(model(name), texts, gen_length=256, decoder="threshold", threshold=0.9)
    results = [text.rsplit("#### ", 1)[-1].strip() for text in out.texts]
    solved = sum(r == row["answer"].rsplit("#### ", 1)[1] for r, row in zip(results, rows, strict=True))
    assert solved >= 6
    assert sum(out.stats.row_tokens) > 3 * sum(out.stats.row_forwards)


@pytest.mark.parametrize("cache", ["none", "block", "sub_block"])
def test_a_row_ignores_a_wider_opening_pass_beside_it(cache: str) -> None:
    """Prompts of 147 and 100 tokens open with 128 and 96 positions; the padding of the second teaches it nothing."""
    name = "tiny-fast-dllm-v2"
    texts = [prompt(name, row["question"]) for row in problems(8)[6:]]
    lengths = [len(model(name).tokenizer(text)["input_ids"]) for text in texts]
    assert lengths[0] // 32 > lengths[1] // 32 and lengths[1] % 32
    options = {"gen_length": 32, "cache": cache, "decoder": "threshold", "threshold": 0.9}
    together = fastdllm.generate(model(name), texts, **options).texts
    assert together == [fastdllm.generate(model(name), text, **options).texts[0] for text in texts]

# SPDX-License-Identifier: Apache-2.0
"""Typed answers: probabilities that a likelihood confirms, for options of any length."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import decide
from fastdllm.likelihood import Probe, log_likelihoods, read
from fastdllm.prompts import encode, encode_text

MODELS = ("tiny-llada", "tiny-dream", "tiny-fast-dllm-v2")
PROMPT = "Question: Tom has 3 apples and eats one. How many are left?\nAnswer:"


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> fastdllm.Model:
    return fastdllm.load(request.param)


def single_tokens(model: fastdllm.Model, count: int) -> list[str]:
    """Words that are one token after a space and begin differently."""
    words = [
        word
        for word in model.tokenizer.get_vocab()
        if word.startswith("Ġ") and word[1:].isalpha() and word.isascii() is False
    ]
    words = [word[1:] for word in sorted(words) if len(encode_text(model, f" {word[1:]}")) == 1]
    return words[:: len(words) // count][:count]


def test_one_slot_agrees_with_the_log_likelihood(model: fastdllm.Model) -> None:
    options = single_tokens(model, 4)
    decision = decide(model, PROMPT, [{"name": "what", "type": "choice", "options": options}])["what"]
    lead = encode_text(model, f"what ({'/'.join(options)}):")
    context = torch.cat([encode(model, PROMPT)[0], torch.tensor(lead)])
    pairs = [(context, torch.tensor(encode_text(model, f" {option}"))) for option in options]
    scores = torch.tensor([score.log_likelihood for score in log_likelihoods(model, pairs)], dtype=torch.float64)
    assert list(decision.probabilities.values()) == pytest.approx(scores.softmax(0).tolist(), abs=1e-5)
    assert decision.answer == options[int(scores.argmax())]


def test_an_option_of_several_tokens_sums_over_its_span(model: fastdllm.Model) -> None:
    options = ["quickly gone", "banana", "one of them"]
    tokens = [encode_text(model, f" {option}") for option in options]
    lengths = {len(t) for t in tokens}
    out = decide(model, PROMPT, [{"name": "what", "type": "choice", "options": options}])
    lead = encode(model, PROMPT)[0].tolist() + encode_text(model, f"what ({'/'.join(options)}):")
    sums = []
    for option in tokens:
        ids = lead + [model.spec.mask_id] * len(option)
        ids += [model.spec.mask_id] * (-len(ids) % (model.spec.block_causal or 1))
        at = torch.arange(len(lead), len(lead) + len(option))
        probe = Probe(torch.tensor(ids), len(lead), at, torch.tensor(option))
        sums.append(float(next(read(model, [(0, 0.0, probe)], 1))[1].log_prob.double().sum()))
    expected = torch.tensor(sums, dtype=torch.float64).softmax(0).tolist()
    assert list(out["what"].probabilities.values()) == pytest.approx(expected, abs=1e-5)
    assert out.canvases == len(lengths) and out.forwards == 1


def test_many_questions_take_one_forward_and_probabilities_add_up(model: fastdllm.Model) -> None:
    questions: list[dict[str, Any]] = [
        {"name": "even", "type": "yes_no"},
        {"name": "left", "type": "score"},
        {"name": "sure", "type": "score", "options": [0.5, 1], "text": "How sure is that"},
        {"name": "fruit", "type": "choice", "options": ["apple", "a pear tree", 3]},
    ]
    out = decide(model, PROMPT, questions)
    assert out.forwards == 1 and list(out) == [q["name"] for q in questions]
    assert out.prompt_tokens == len(encode(model, PROMPT)[0])
    for decision in out.values():
        assert sum(decision.probabilities.values()) == pytest.approx(1)
        assert decision.probabilities[decision.answer] == max(decision.probabilities.values())
    assert list(out["left"].probabilities) == list(range(10))
    assert out["left"].mean == pytest.approx(sum(k * p for k, p in out["left"].probabilities.items()))
    assert out["even"].mean is None
    if model.spec.block_causal:  # a question does not depend on those before it
        assert decide(model, PROMPT, questions[1:])["left"] == out["left"]


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "questions is empty"),
        ([{"name": "a", "type": "maybe"}], r"questions\[0\].type='maybe' is unknown; allowed are choice, yes_no, score"),
        ([{"name": "a", "type": "choice"}], r"questions\[0\].options has 0 entries"),
        ([{"name": "a", "type": "choice", "options": ["x"]}], r"questions\[0\].options has 1 entries"),
        ([{"name": "a", "type": "choice", "options": ["x", "x"]}], r"an entry twice"),
        ([{"name": "a", "type": "score", "options": ["x", "y"]}], r"'x' is not a number"),
        ([{"name": "a", "type": "yes_no", "options": ["a", "b", "c"]}], "exactly 2"),
        ([{"name": "", "type": "yes_no"}], r"questions\[0\].name"),
        ([{"name": "a", "type": "yes_no", "hint": 1}], "unknown field 'hint'"),
        ([{"name": "a", "type": "yes_no"}] * 2, "'a' occurs twice"),
        ([{"name": "a", "type": "choice", "options": ["x " * 600, "y"]}], "context"),
        (None, "questions=None must be a list of dicts"),
        ({"name": "a", "type": "yes_no"}, "questions=.* must be a list of dicts"),
        ([None], r"questions\[0\]=None must be a dict"),
        (["a"], r"questions\[0\]='a' must be a dict"),
        ([{"name": "a", "type": "yes_no", 5: 1, "hint": 1}], "unknown field 5"),
        ([{"name": "a", "type": "choice", "options": "abc"}], r"questions\[0\].options='abc' must be a list"),
        ([{"name": "a", "type": "choice", "options": {"x": 1, "y": 2}}], "must be a list"),
        ([{"name": "a", "type": "choice", "options": 5}], "options=5 must be a list"),
        ([{"name": "a", "type": "score", "options": [math.nan, 1]}], "options: nan must be finite"),
        ([{"name": "a", "type": "score", "options": [10**400, 1]}], "must be finite"),
        ([{"name": "a", "type": "choice", "options": ["x", "\ud800"]}], r"questions\[0\].options has a lone surrogate"),
        ([{"name": "a", "type": "yes_no", "text": 5}], r"questions\[0\].text=5 must be a text"),
    ],
)
def test_a_question_that_makes_no_sense_is_named(questions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decide(fastdllm.load("tiny-llada"), PROMPT, questions)

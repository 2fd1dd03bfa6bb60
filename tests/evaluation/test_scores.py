# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of the lm-eval adapter: nothing of a continuation is lost, whatever merges or is too long."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from fastdllm.evaluation.harness import DiffusionLM
from tests.evaluation.asking import adapter, evaluate, generations, likelihoods
from tests.examples import examples

pytestmark = pytest.mark.usefixtures("loaded_once")


def test_log_likelihoods_come_in_order_and_alike_in_every_batch() -> None:
    pairs = [("Question: 2 + 2?\nAnswer:", " 4"), ("One", " two three four"), ("", "alone"), ("a b", " c")] * 2
    asked = [Instance("loglikelihood", {}, pair, i, ("task", i, 1)) for i, pair in enumerate(pairs)]
    runs = [adapter(size, mc_num=5).loglikelihood(asked, disable_tqdm=True) for size in (1, 3, 64)]
    assert runs[0][:4] == runs[0][4:]
    for run in runs:
        assert [value for value, _ in run] == pytest.approx([value for value, _ in runs[0]], abs=1e-3)
        assert all(isinstance(greedy, bool) for _, greedy in run)


def test_rolling_scores_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = adapter(mc_num=1), []
    monkeypatch.setattr(
        model, "_loglikelihood_tokens", lambda asked, *rest: [windows.append(w) or (float(len(w[2])), False) for w in asked]
    )
    texts = ["far away " * 400, "short", "one more"]
    asked = [Instance("loglikelihood_rolling", {}, (text,), i, ("task", i, 1)) for i, text in enumerate(texts)]
    ids = [model.tok_encode(text) for text in texts]
    assert model.loglikelihood_rolling(asked, disable_tqdm=True) == [float(len(one)) for one in ids]
    assert len(windows) > 3 and [t for _, _, target in windows for t in target] == [t for one in ids for t in one]
    assert all(context and len(context) + len(target) <= model.max_length for _, context, target in windows)


def test_rolling_is_the_sum_of_its_windows() -> None:
    model, text = adapter(mc_num=3), "Ann has 3 apples."
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0, ("task", 0, 1))]
    value = model._loglikelihood_tokens([(None, [model.prefix_token_id], model.tok_encode(text))], True)[0][0]
    assert model.loglikelihood_rolling(asked, disable_tqdm=True) == [pytest.approx(value)]


def test_multiple_choice_task_from_end_to_end() -> None:
    results = evaluate(adapter(8, mc_num=2, is_check_greedy=False), "gsm_symbolic_mc", limit=3, num_fewshot=0)
    assert 0 <= results["results"]["gsm_symbolic_mc"]["acc,none"] <= 1
    assert len(results["samples"]["gsm_symbolic_mc"]) == 3


def test_v2_scores_choices_and_rephrases_only_when_asked() -> None:
    from fastdllm.evaluation.adapters import FastDLLMv2EvalHarness

    options = {"pretrained": "tiny-fast-dllm-v2", "device": "cpu"}
    whole = FastDLLMv2EvalHarness(**options)
    first = FastDLLMv2EvalHarness(**options, likelihood="first_token", cot_prompt=True)
    scores = [evaluate(model, "gsm_symbolic_mc_digit", limit=2)["results"] for model in (whole, first)]
    assert all(0 <= of["gsm_symbolic_mc_digit"]["acc,none"] <= 1 for of in scores)
    args = ("Question: 1 + 1?\nAnswer:", {})
    gsm8k, other = (Instance("generate_until", {}, args, 0, (task, 0, 1)) for task in ("gsm8k_cot", "gsm_symbolic"))
    assert whole.prompt_of(gsm8k) == whole.prompt_of(other) == first.prompt_of(other) == args[0]
    assert first.prompt_of(gsm8k).startswith("Question: 1 + 1?\nPlease reason step by step")


@pytest.fixture(scope="module")
def model() -> DiffusionLM:
    return adapter()


def test_a_choice_that_merges_with_its_context_is_scored() -> None:
    model = adapter(8, mc_num=1)
    pairs = [("The answe", "r"), ("The answe", "d"), ("He is a stude", "nt"), ("He is a stude", "s")]
    for (value, _), (context, choice) in zip(likelihoods(model, *pairs), pairs, strict=True):
        assert value < -0.01, (context, choice)
    assert likelihoods(model, ("The answer", "")) == [(0.0, True)]
    assert likelihoods(model, ("", "")) == [(0.0, True)]


@settings(deadline=None, max_examples=examples(300))
@given(st.text("aber answ\n .é\u0301", max_size=12), st.text("aber answ\n .é\u0301", min_size=1, max_size=8))
def test_nothing_of_a_continuation_is_lost(model: DiffusionLM, context: str, continuation: str) -> None:
    whole = model.tok_encode(context + continuation)
    before, target = model._encode_pair(context, continuation)
    assert before and target
    joined = before + target if before != [model.prefix_token_id] or whole[:1] == before else target
    assert joined == whole
    if joined is not target:  # what comes before the cut belongs to the context
        seen, text = (model.tokenizer.decode(ids) for ids in (before, whole))
        assert text.startswith(seen) and len(seen) <= len(model.tokenizer.decode(model.tok_encode(context)))


def test_a_pair_without_a_join_is_cut_as_lm_eval_cuts_it() -> None:
    model = adapter()
    for context, continuation in [
        ("Question: 2?\nAnswer:", " 4"),
        ("One ", "two"),
        ("far away", " and so on"),
        ("a\n", "b"),
    ]:
        pair = super(DiffusionLM, model)._encode_pair(context, continuation)
        assert model._encode_pair(context, continuation) == pair


def test_a_target_longer_than_the_context_loses_its_beginning() -> None:
    model = adapter(mc_num=1, is_check_greedy=False)
    ((value, _),) = likelihoods(model, ("Here: ", "far away " * 600))
    assert value < 0


@pytest.mark.parametrize("family", ["llada", "dream", "fast-dllm-v2"])
def test_an_empty_prompt_is_answered(family: str) -> None:
    model = DiffusionLM(pretrained=f"tiny-{family}", device="cpu", gen_length=16)
    (text,) = model.generate_until(generations(("", {"until": []})), disable_tqdm=True)
    assert isinstance(text, str)

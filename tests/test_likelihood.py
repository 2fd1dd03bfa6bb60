# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods against their definitions, written out on tiny random models."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm.forward import Window
from fastdllm.likelihood import METHODS, draw_masks, log_likelihoods
from fastdllm.models import Model
from fastdllm.models.spec import ModelSpec
from fastdllm.models.transformer import Transformer

FAMILIES = {"llada": (0, 0), "dream": (1, 0), "fast_dllm_v2": (1, 4)}  # shift, block size
BIDIRECTIONAL = ["llada", "dream"]


def tiny(family: str) -> Model:
    shift, block = FAMILIES[family]
    spec = ModelSpec(
        family, 2, 16, 2, 1, 8, 24, 32, 64, 1e-5, 10000.0, True, False, shift, block, mask_id=30, stop_ids=(29,), pad_id=31
    )
    network = Transformer(spec)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return Model(network.requires_grad_(False).eval(), spec)


def log_probs(model: Model, ids: Tensor) -> Tensor:
    """[T, V]: row p is the model's distribution of position p of a canvas [T]; one plain forward (NaN where it has none)."""
    length, block = len(ids), model.spec.block_causal
    pos = torch.arange(length)[None]
    limit = torch.clamp((pos // block + 1) * block, max=length) if block else torch.full_like(pos, length)
    window = Window(torch.tensor([0]), pos, limit, length, False, torch.zeros(1, 2, dtype=torch.long))
    hidden = model.network(ids[None], window, model.network.new_store(1, length))
    rows = model.network.logits(hidden)[0].log_softmax(-1)
    return torch.cat([torch.full((model.spec.shift, 32), math.nan), rows])[:length]


def pair(context: int, target: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 29, (context,)), torch.randint(0, 29, (target,))


def masked(model: Model, context: Tensor, target: Tensor, at: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The canvas with the target's positions `at` masked, and these positions on the canvas."""
    where = torch.tensor(at) + len(context)
    return torch.cat([context, target]).index_fill(0, where, model.spec.mask_id), where


def bound(model: Model, context: Tensor, target: Tensor) -> float:
    """The published measure, summed over every choice of masked tokens."""
    length, total = len(target), 0.0
    for count in range(1, length + 1):
        for at in itertools.combinations(range(length), count):
            canvas, where = masked(model, context, target, at)
            gains = log_probs(model, canvas)[where, target[list(at)]].sum()
            total += float(gains) * (length / count) / math.comb(length, count) / length
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", [1, 4, 7])
def test_one_token_is_its_log_softmax(family: str, context: int) -> None:
    model, (prompt, target) = tiny(family), pair(context, 1)
    canvas, _ = masked(model, prompt, target, (0,))
    block = model.spec.block_causal
    fill = -len(canvas) % block if block else 0
    rows = log_probs(model, torch.cat([canvas, torch.full((fill,), 30)]))
    row = rows[context]
    score = log_likelihoods(model, [(prompt, target)], mc_num=1)[0]
    assert score.log_likelihood == pytest.approx(float(row[target[0]]), abs=1e-5)
    best = row.masked_fill(model.banned, -torch.inf).argmax()
    assert score.greedy == (int(best) == int(target[0]))
    assert log_likelihoods(model, [(prompt, best[None])], mc_num=1)[0].greedy


@pytest.mark.parametrize("family", BIDIRECTIONAL)
@pytest.mark.parametrize("length", [2, 3])
def test_short_targets_are_summed_over_every_mask(family: str, length: int) -> None:
    model, (context, target) = tiny(family), pair(5, length)
    score = log_likelihoods(model, [(context, target)], mc_num=2**length - 1)[0]
    assert score.log_likelihood == pytest.approx(bound(model, context, target), abs=1e-4)


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_monte_carlo_comes_close_to_the_sum(family: str) -> None:
    model, (context, target) = tiny(family), pair(4, 4)
    draws = [log_likelihoods(model, [(context, target)], mc_num=14, seed=s, check_greedy=False)[0] for s in range(60)]
    values = torch.tensor([score.log_likelihood for score in draws])
    error = float(values.std()) / math.sqrt(len(values))
    assert 0 < error < 0.5
    assert abs(float(values.mean()) - bound(model, context, target)) < 4 * error


@pytest.mark.parametrize(("length", "samples"), [(4, 8), (5, 30), (9, 17), (40, 128)])
def test_drawn_masks_are_spread_over_every_count(length: int, samples: int) -> None:
    masks, weights = draw_masks(length, samples, seed=3)
    assert masks.shape == (samples, length)
    counts = masks.sum(1)
    assert counts.min() >= 1 and torch.equal(weights, length / counts.double() / samples)
    assert len(counts.unique()) == min(length, samples)


def test_every_mask_weighs_as_in_the_expectation() -> None:
    masks, weights = draw_masks(5, 31, seed=0)
    assert len({tuple(mask.tolist()) for mask in masks}) == 31
    # Each token's log-probabilities count once in all, whatever they are conditioned on.
    assert torch.allclose((masks * weights[:, None]).sum(0), torch.ones(5, dtype=torch.float64))


def test_block_causal_models_are_scored_by_the_chain_rule() -> None:
    model, (context, target) = tiny("fast_dllm_v2"), pair(6, 7)
    total, text = 0.0, torch.cat([context, target])
    for at in range(6, 13):
        canvas = torch.full((16,), 30)
        canvas[:at] = text[:at]
        total += float(log_probs(model, canvas)[at, text[at]])
    assert log_likelihoods(model, [(context, target)])[0].log_likelihood == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize(("context", "length"), [(5, 2), (5, 9), (8, 3), (11, 1)])
def test_first_token_scores_the_first_token_before_a_visible_rest(context: int, length: int) -> None:
    model, (prompt, target) = tiny("fast_dllm_v2"), pair(context, length)
    text = torch.cat([prompt, torch.tensor([30]), target[1:], torch.tensor([29])])
    text = torch.cat([text, torch.full((-len(text) % 4,), 30)])
    expected = float(log_probs(model, text)[context, target[0]])
    score = log_likelihoods(model, [(prompt, target)], method="first_token")[0]
    assert score.log_likelihood == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_scores_in_a_batch_what_it_scores_alone(family: str) -> None:
    model = tiny(family)
    pairs = [pair(context, length) for context, length in [(3, 2), (9, 1), (1, 5), (6, 0), (2, 7), (20, 3)]]
    alone = [log_likelihoods(model, [one], mc_num=9, batch_size=1)[0] for one in pairs]
    for batch in (2, 7, 64, 10**12, 10**30):  # more than there is: no memory is taken for what does not come
        together = log_likelihoods(model, pairs, mc_num=9, batch_size=batch)
        for one, other in zip(alone, together, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
            assert one.greedy == other.greedy
    assert log_likelihoods(model, pairs, mc_num=9) == log_likelihoods(model, pairs, mc_num=9)


def test_seeds_give_different_draws() -> None:
    model, one = tiny("llada"), pair(3, 8)
    scores = [log_likelihoods(model, [one], mc_num=4, seed=seed)[0].log_likelihood for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_target_is_certain(family: str) -> None:
    scores = log_likelihoods(tiny(family), [pair(4, 0), pair(4, 1)])
    assert (scores[0].log_likelihood, scores[0].greedy) == (0.0, True)
    assert scores[1].log_likelihood < 0


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_greedy_is_what_greedy_decoding_writes(family: str) -> None:
    model, (context, _) = tiny(family), pair(5, 0)
    canvas, left = torch.cat([context, torch.full((4,), 30)]), [5, 6, 7, 8]
    while left:
        rows = log_probs(model, canvas).masked_fill(model.banned, -torch.inf)[left]
        at = int(rows.max(-1).values.argmax())
        canvas[left.pop(at)] = rows[at].argmax()
    target = canvas[5:]
    assert log_likelihoods(model, [(context, target)], mc_num=1)[0].greedy
    for at in range(4):
        other = target.clone()
        other[at] = (target[at] + 1) % 29
        assert not log_likelihoods(model, [(context, other)], mc_num=1)[0].greedy
    assert not log_likelihoods(model, [(context, target)], mc_num=1, check_greedy=False)[0].greedy


def test_guidance_moves_the_score_away_from_the_unconditional_one() -> None:
    model, (context, target) = tiny("llada"), pair(6, 1)
    canvas, where = masked(model, context, target, (0,))
    given = log_probs(model, canvas)[where[0]]
    free = log_probs(model, canvas.index_fill(0, torch.arange(6), 30))[where[0]]
    expected = (free + 2.5 * (given - free)).log_softmax(-1)[target[0]]
    score = log_likelihoods(model, [(context, target)], cfg_scale=1.5)[0]
    assert score.log_likelihood == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llada", {"method": "exact"}, "likelihood='exact' does not fit the family 'llada'; allowed are monte_carlo, chain"),
        ("llada", {"method": "first_token"}, "likelihood='first_token' does not fit"),
        ("fast_dllm_v2", {"method": "monte_carlo"}, "allowed are chain, first_token"),
        ("llada", {"mc_num": 0}, "mc_num=0 must be at least 1"),
        ("llada", {"batch_size": 0}, "batch_size=0 must be at least 1"),
        ("dream", {"cfg_scale": -1}, "cfg_scale=-1.0 must be at least 0"),
        ("dream", {"cfg_scale": math.nan}, "cfg_scale=nan must be of type float, and finite"),
        ("dream", {"cfg_scale": math.inf}, "cfg_scale=inf must be of type float, and finite"),
        ("llada", {"method": []}, r"likelihood=\[\] does not fit"),
        ("llada", {"mc_num": 10**12}, "mc_num=1000000000000 must be at most 65536"),
        ("llada", {"mc_num": "many"}, "mc_num='many' must be of type int"),
        ("llada", {"mc_num": 1.5}, "mc_num=1.5 must be of type int"),
        ("llada", {"batch_size": None}, "batch_size=None must be of type int"),
        ("llada", {"seed": "x"}, "seed='x' must be of type int"),
        ("llada", {"seed": 10**30}, "seed=1000+ must lie between"),
        ("llada", {"check_greedy": "x"}, "check_greedy='x' must be of type bool"),
    ],
)
def test_bad_options_are_named(family: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihoods(tiny(family), [pair(3, 2)], **options)


def test_what_does_not_fit_the_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="65 tokens, more than the model's context of 64"):
        log_likelihoods(tiny("llada"), [pair(60, 5)])
    with pytest.raises(ValueError, match="the context may not be empty"):
        log_likelihoods(tiny("dream"), [pair(0, 2)])
    assert log_likelihoods(tiny("llada"), [pair(0, 2)])[0].log_likelihood < 0


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (([1, 2], [32]), r"a target has token ids outside 0\.\.31"),
        (([-1], [3]), r"a context has token ids outside 0\.\.31"),
        ((torch.ones(2), [3]), "context is a Tensor .*; token ids are integers"),
        (("text", [3]), "has no tokenizer; pass token ids instead of text"),
        (([1], "text"), "has no tokenizer; pass token ids instead of text"),
        (([1], {"a": 1}), "target is a dict .*; token ids are integers"),
        (([1], None), "target is None; token ids are integers"),
        (([1],), r"pairs\[0\]=.* must be two, "),
        (([1], [2], [3]), r"pairs\[0\]=.* must be two, "),
        (5, r"pairs\[0\]=5 must be two, "),
        ({1: 2, 3: 4}, r"pairs\[0\]=.* must be two, "),
    ],
)
def test_what_are_no_ids_is_an_error(one: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihoods(tiny("llada"), [one])
    lists = log_likelihoods(tiny("llada"), [([1, 2], [3])], mc_num=1)
    assert lists[0].log_likelihood < 0


@pytest.fixture(scope="module")
def shipped() -> Model:
    return fastdllm.load("tiny-llada")


def ids_of(model: Model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


TEXTS = [
    ("Tom has 2 apples", " and 3 pears."),
    ("Tom has 2 apples ", "and 3 pears."),  # the blank is a part of the target's first token
    ("Tom has 2 appl", "es"),
    ("", "Tom has"),
    ("Tom has", ""),
]


@pytest.mark.parametrize(("context", "target"), TEXTS)
def test_two_texts_are_scored_as_the_tokens_of_one(shipped: Model, context: str, target: str) -> None:
    (score,) = log_likelihoods(shipped, [(context, target)], mc_num=4)
    whole = ids_of(shipped, context + target)
    assert list(score.tokens) == whole[len(whole) - len(score.tokens) :]
    before = whole[: len(whole) - len(score.tokens)]
    assert target in shipped.tokenizer.decode(score.tokens), "nothing of the target is lost"
    assert len(shipped.tokenizer.decode(before)) >= len(context.rstrip()) - len(" appl")
    given = before or [shipped.tokenizer.bos_token_id or shipped.spec.stop_ids[0]]
    assert score == log_likelihoods(shipped, [(given, list(score.tokens))], mc_num=4)[0]


def test_texts_are_scored_as_lm_eval_scores_them(shipped: Model) -> None:
    adapters = pytest.importorskip("fastdllm.evaluation.adapters", reason="needs lm-eval")
    harness = adapters.LLaDAEvalHarness(pretrained=shipped, mc_num=4)
    for (context, target), score in zip(TEXTS, log_likelihoods(shipped, TEXTS, mc_num=4), strict=True):
        before, after = harness._encode_pair(context, target)
        found = harness._loglikelihood_tokens([(None, before, after)], True)[0][0]
        assert found == pytest.approx(score.log_likelihood, abs=1e-4)


def test_after_a_conversation_the_assistant_says_the_target(shipped: Model) -> None:
    talk, said = [{"role": "user", "content": "Hello"}], "He has <|eos|> 5.\n#### 5"
    (score,) = log_likelihoods(shipped, [(talk, said)], mc_num=2)
    (prompt,) = fastdllm.encode(shipped, talk)
    assert score == log_likelihoods(shipped, [(prompt, list(score.tokens))], mc_num=2)[0]
    assert shipped.tokenizer.decode(score.tokens) == said and not {*shipped.spec.stop_ids} & {*score.tokens}
    tokenized = shipped.tokenizer("Tom has", add_special_tokens=False, return_tensors="pt")
    mixed = log_likelihoods(shipped, [(tokenized, " 5"), ("Tom has", ids_of(shipped, " 5"))], mc_num=2)
    assert mixed[0] == mixed[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["monte_carlo", "chain", "first_token"])
def test_shares_of_the_tokens_add_up(family: str, method: str) -> None:
    model, (context, target) = tiny(family), pair(5, 6)
    if not METHODS[method].fits(model.spec):
        pytest.skip("not a measure of this family")
    (score,) = log_likelihoods(model, [(context, target)], method=method, mc_num=9)
    assert score.tokens == tuple(target.tolist()) and len(score.logprobs) == 6
    assert math.fsum(score.logprobs) == pytest.approx(score.log_likelihood, abs=1e-9)
    if method == "chain":  # a token's share is what it adds to the score of the tokens before it
        shorter = log_likelihoods(model, [(context, target[:n]) for n in range(1, 7)], method=method)
        if model.spec.block_causal:
            sums = torch.tensor(score.logprobs).cumsum(0)
            assert torch.allclose(sums, torch.tensor([one.log_likelihood for one in shorter]), atol=1e-3)
    elif method == "first_token":
        assert score.logprobs[1:] == (0.0,) * 5
    else:
        assert all(value < 0 for value in score.logprobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_do_not_depend_on_the_batch(family: str) -> None:
    model = tiny(family)
    rows = [torch.randint(0, 31, (n,)) for n in (5, 1, 12, 4)]
    for states in (fastdllm.hidden_states(model, rows), fastdllm.hidden_states(model, rows, batch_size=2)):
        assert [list(of.shape) for of in states] == [[len(row), 16] for row in rows]
        for row, of in zip(rows, states, strict=True):
            full = log_probs(model, row)[model.spec.shift :]
            found = model.network.logits(of).log_softmax(-1)[: len(full)]
            torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-4)
            assert not of.is_inference()  # a probe may be trained on them


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": [[1] * 65]}, "prompt 0 has 65 tokens, more than the model's context of 64"),
        ({"prompts": [[1]], "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"prompts": "text"}, "has no tokenizer"),
        ({"prompts": []}, "prompts is empty"),
    ],
)
def test_what_has_no_hidden_states_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastdllm.hidden_states(tiny("llada"), **given)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "array", "tensor"])
@pytest.mark.parametrize("target", ["7", None], ids=["text", "ids"])
def test_ids_of_a_context_may_be_of_any_kind(kind: Any, target: str | None) -> None:
    model = fastdllm.load("tiny-llada", device="cpu")
    context, said = [40, 41, 42], model.tokenizer("7", add_special_tokens=False)["input_ids"]
    expected = log_likelihoods(model, [(context, said)], mc_num=2)
    assert log_likelihoods(model, [(kind(context), target or kind(said))], mc_num=2) == expected

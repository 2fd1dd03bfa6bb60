# SPDX-License-Identifier: Apache-2.0
"""Nemotron decodes as published: by blocks after a causal context, from left to right, and by linear self-speculation."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm.likelihood import Score, log_likelihoods
from tests.random_models import MASK, STOP, prompts, random_model
from tests.reference import nemotron
from tests.reference.network import PlainNetwork

CACHES = ["causal", "none"]
LENGTHS = [(1, 16), (3, 8), (8, 16), (16, 24), (13, 17), (5, 1), (7, 9)]  # prompt, answer


def tokens(out: fastdllm.Output) -> list[list[int]]:
    return [s.tolist() for s in out.sequences]


@pytest.mark.pairwise
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("size", [1, 2, 8, 32])
@pytest.mark.parametrize("rule", [{"threshold": 0.3}, {"threshold": 0.9}, {"steps": "all"}, {"steps": "half"}], ids=str)
def test_the_published_sampler(rule: dict[str, Any], size: int, cache: str) -> None:
    for seed, (length, answer) in enumerate(LENGTHS):
        model = random_model("nemotron", seed)
        (prompt,) = prompts(length)
        block, per_block, options = min(size, answer), None, dict(rule)
        if "steps" in rule:  # whole blocks: what a shorter one's share of the steps is, the published loop does not say
            answer = -(-answer // block) * block
            per_block = max(1, block // (1 if rule["steps"] == "all" else 2))
            options = {"decoder": "quota", "steps": per_block * (answer // block)}
        threshold = {"threshold": rule["threshold"]} if "threshold" in rule else {}
        net = PlainNetwork(model)
        expected, forwards = nemotron.generate(net, prompt, length=answer, block_size=block, steps=per_block, **threshold)
        shape = {"gen_length": answer, "block_length": block, "stop_ids": (), "cache": cache}
        out = fastdllm.generate(model, [prompt], **shape, **options)
        assert tokens(out) == [expected]
        assert out.stats.forwards == forwards


@pytest.mark.each_choice
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 32])
def test_self_speculation_gives_the_tokens_of_autoregressive_decoding(size: int, cache: str) -> None:
    """Token for token, in the forwards of the published loop; never more than a token and a draft for each prefix."""
    spent = one_each = 0
    for seed in range(2):
        for length, answer in LENGTHS:
            model = random_model("nemotron", seed)
            (prompt,) = prompts(length)
            net = PlainNetwork(model)
            expected, each = nemotron.autoregressive(net, prompt, length=answer)
            drafted, forwards, accepted = nemotron.self_speculate(net, prompt, length=answer, block_size=min(size, answer))
            assert drafted == expected
            options = {"gen_length": answer, "block_length": size, "stop_ids": (), "cache": cache}
            out = fastdllm.generate(model, [prompt], decoder="self_speculate", **options)
            assert tokens(out) == [expected]
            assert out.stats.forwards == forwards <= 1 + 2 * accepted
            spent, one_each = spent + forwards, one_each + each
    assert (spent == one_each) == (size == 1)


def agreeable(seed: int) -> fastdllm.Model:
    """A model whose drafts are often right: all tokens have much in common, so that what lies around decides little."""
    model = random_model("nemotron", seed)
    weight = model.network.embed.weight.data
    weight.copy_(3 * weight[:1] + (0.8 + 0.2 * (seed % 5)) * weight)
    return model


def drafting(model: fastdllm.Model, given: Any, **options: Any) -> fastdllm.Output:
    return fastdllm.generate(model, given, decoder="self_speculate", **{"block_length": 8, "stop_ids": ()} | options)


def test_prefixes_of_every_length_are_accepted() -> None:
    lengths = set()
    for seed in range(10):
        model = agreeable(seed)
        for prompt in prompts(3, 8, 13):
            net = PlainNetwork(model)
            expected, forwards, _ = nemotron.self_speculate(net, prompt, length=29, block_size=8)
            for cache in CACHES:
                out = drafting(model, [prompt], gen_length=29, cache=cache, trace=True)
                assert tokens(out) == [expected] and out.stats.forwards == forwards
            gained = [int(step.committed.sum()) for step in out.trace]
            assert sum(gained) == 29 and all(a or b for a, b in pairwise(gained))
            drafts = [step for step, size in zip(out.trace, gained, strict=True) if not size]
            assert all((step.ids[0, : step.stops[0] - step.starts[0]] == MASK).all() for step in drafts)
            lengths |= set(gained)
            each, _ = nemotron.autoregressive(net, prompt, length=29)
            assert each == expected
    assert lengths == set(range(9))


@pytest.mark.parametrize("cache", CACHES)
def test_a_row_of_a_batch_drafts_as_it_does_alone(cache: str) -> None:
    """Rows of any length, some verify while others draft, some stop inside a block."""
    for seed in range(3):
        model, given = agreeable(seed), prompts(1, 5, 8, 16, 13)
        options = {"gen_length": 21, "cache": cache, "stop_ids": (STOP, 1, 2, 3, 4, 5, 6, 7)}
        together = drafting(model, given, batch_size=3, **options)
        for row, prompt in enumerate(given):
            alone = drafting(model, [prompt], **options)
            assert torch.equal(alone.sequences[0], together.sequences[row])
            assert alone.stats.row_forwards[0] == together.stats.row_forwards[row]
            full, _ = nemotron.autoregressive(PlainNetwork(model), prompt, length=21)
            answer = full[len(prompt) :]
            end = next((i + 1 for i, token in enumerate(answer) if token in options["stop_ids"]), 21)
            assert alone.sequences[0].tolist() == full[: len(prompt) + end]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_constraints_are_read_as_text(size: int) -> None:
    """At block starts, at the ends, in runs: autoregressive decoding that is given these tokens where they stand."""
    for seed in range(2):
        model, (prompt,) = agreeable(seed), prompts(5)
        for fixed in (
            {0: 4},
            {0: 4, 1: 5, 2: 6},
            {3: 7, 9: 8},
            {15: 9},
            dict.fromkeys(range(3, 14), 8),
            {1: 3, 2: 3, 14: 2, 15: 1},
        ):
            reader, x, new = nemotron.Reader(PlainNetwork(model)), prompt.tolist(), prompt
            for at in range(16):
                token = reader.read(new)[-1].argmax()
                new = torch.tensor([fixed.get(at, int(token))])
                x += new.tolist()
            for cache in CACHES:
                out = drafting(model, [prompt], gen_length=16, block_length=size, constraints=fixed, cache=cache)
                assert tokens(out) == [x], (fixed, cache)


def test_drawn_tokens_come_from_the_distribution_of_autoregressive_decoding() -> None:
    """Whatever was drafted: the first two tokens of many answers, against their probabilities."""
    model, (prompt,) = agreeable(0), prompts(4)
    rows = 1500
    out = drafting(model, [prompt] * rows, gen_length=3, block_length=3, temperature=1.0, batch_size=64)
    first = torch.stack([s[4] for s in out.sequences])
    reader = nemotron.Reader(PlainNetwork(model))
    expected = reader.read(prompt)[-1].softmax(-1)
    seen = first.bincount(minlength=len(expected)) / rows
    assert (seen - expected).abs().max() < 0.04
    often = int(expected.argmax())
    second = torch.stack([s[5] for s in out.sequences])[first == often]
    expected = reader.read(torch.tensor([often]))[-1].softmax(-1)
    seen = second.bincount(minlength=len(expected)) / len(second)
    assert (seen - expected).abs().max() < 4 / len(second) ** 0.5


def test_what_drafts_do_not_go_with_is_refused() -> None:
    for family in ("llada", "dream", "v2"):
        with pytest.raises(
            ValueError, match=f"'self_speculate' does not fit the family '{random_model(family).spec.family}'"
        ):
            fastdllm.generate(random_model(family), prompts(4), decoder="self_speculate", gen_length=8)
    model = random_model("nemotron")
    with pytest.raises(ValueError, match="needs cfg_scale=0"):
        fastdllm.generate(model, prompts(4), decoder="self_speculate", cfg_scale=1.0, gen_length=8)
    for cache in ("dual", "block", "prefix"):
        with pytest.raises(
            ValueError, match=f"cache='{cache}' does not fit the family 'nemotron'; allowed are causal, none"
        ):
            fastdllm.generate(model, prompts(4), cache=cache, gen_length=8)
    with pytest.raises(ValueError, match="cache='causal' does not fit the family 'llada'"):
        fastdllm.generate(random_model("llada"), prompts(4), cache="causal", gen_length=8)
    with pytest.raises(ValueError, match="geometry"):
        fastdllm.generate(model, prompts(4), geometry=lambda prompt, total: [], gen_length=8)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_guidance_is_two_readers(scale: float) -> None:
    """One of them never saw the prompt; each reads what both together wrote."""
    for seed in range(3):
        model, (prompt,) = random_model("nemotron", seed), prompts(6)
        options = {"decoder": "quota", "cfg_scale": scale, "gen_length": 12, "block_length": 6, "stop_ids": ()}
        out = fastdllm.generate(model, [prompt], **options)
        net = PlainNetwork(model)
        net.banned = torch.zeros_like(model.banned)
        readers = [nemotron.Reader(net), nemotron.Reader(net)]
        new, x = [prompt, torch.full_like(prompt, MASK)], prompt.tolist()

        def guided(conditional: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
            return (free + (scale + 1) * (conditional - free)).index_fill(-1, torch.tensor(MASK), -torch.inf).softmax(-1)

        for _ in range(2):
            block = torch.full((6,), MASK)
            block[0] = guided(*(reader.read(ids)[-1] for reader, ids in zip(readers, new, strict=True))).argmax()
            for _ in range(5):
                conf, top = guided(*(reader.look(block) for reader in readers)).max(-1)
                at = conf.masked_fill(block != MASK, -1).argmax()
                block[at] = top[at]
            new, x = [block, block], x + block.tolist()
        assert tokens(out) == [x]


def test_log_likelihoods_are_those_of_autoregressive_decoding() -> None:
    """In one forward each, whatever else is in the batch; greedy says what self-speculation would write."""
    model = random_model("nemotron", 3)
    pairs = [(torch.randint(0, STOP, (n,)), torch.randint(0, STOP, (m,))) for n, m in ((1, 1), (3, 8), (16, 5), (2, 20))]
    written = drafting(model, [pairs[1][0]], gen_length=7).sequences[0]
    pairs += [(written[:3], written[3:]), (pairs[0][0], torch.tensor([], dtype=torch.long))]
    forwards = []
    model.network.register_forward_hook(lambda *_: forwards.append(1))
    scores = log_likelihoods(model, pairs, batch_size=2)
    assert len(forwards) == 3
    for (context, target), score in zip(pairs, scores, strict=True):
        logits = nemotron.Reader(PlainNetwork(model)).read(torch.cat([context, target]))[len(context) - 1 : -1]
        # The mask can be no token of a text; what it takes of the probability is the model's own.
        hidden = net_logits(model, torch.cat([context, target]))[len(context) - 1 : -1]
        expected = hidden.log_softmax(-1).gather(1, target[:, None]).sum()
        assert score.log_likelihood == pytest.approx(float(expected), abs=1e-4)
        assert score.greedy == bool((logits.argmax(-1) == target).all())
    assert scores[4].greedy and scores[5] == Score(0.0, True, (), ())
    for method in ("monte_carlo", "first_token"):
        with pytest.raises(ValueError, match=f"likelihood='{method}' does not fit the family 'nemotron'; allowed are chain"):
            log_likelihoods(model, pairs, method=method)
    with pytest.raises(ValueError, match="the context may not be empty"):
        log_likelihoods(model, [(torch.tensor([], dtype=torch.long), torch.tensor([1]))])


def net_logits(model: fastdllm.Model, ids: torch.Tensor) -> torch.Tensor:
    net = PlainNetwork(model)
    net.banned = torch.zeros_like(model.banned)
    return nemotron.Reader(net).read(ids)

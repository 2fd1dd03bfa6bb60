# SPDX-License-Identifier: Apache-2.0
"""Parallel speculative decoding beside its plain loop, and what a branch needs to be kept."""

from __future__ import annotations

import pytest
import torch

import fastdllm
from fastdllm import registry
from fastdllm.view import View
from tests.random_models import MASK, prompts, random_model
from tests.reference import psd
from tests.reference.network import PlainNetwork


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("level, branches", [(0.4, 4), (0.9, 2), (0.9, 8), (0.6, 1)])
def test_it_gives_what_its_plain_loop_gives(cache: str, level: float, branches: int) -> None:
    """Tokens, log-probabilities and forwards; and with branches fewer forwards than the rule by itself."""
    saved = 0
    for seed in range(3):
        model, given = random_model("llada", seed), prompts(5, 9)
        options = {"cache": cache, "gen_length": 20, "block_length": 8, "stop_ids": ()}
        out = fastdllm.generate(model, given, decoder="psd", level=level, branches=branches, **options)
        alone = fastdllm.generate(model, given, decoder="threshold", threshold=level, **options)
        for row, prompt in enumerate(given):
            lengths = {"gen_length": 20, "block_length": 8}
            want = psd.generate(PlainNetwork(model), prompt, cache=cache, level=level, branches=branches, **lengths)
            tokens, rounds, logprobs = want
            assert out.sequences[row].tolist() == tokens
            assert out.stats.row_forwards[row] == rounds
            assert out.logprobs[row].tolist() == pytest.approx(logprobs, abs=1e-4)
            saved += alone.stats.row_forwards[row] - rounds
    assert saved > 0 if branches > 1 else saved == 0


def row(contents: list[list[int]], tops: list[list[int]], confs: list[list[float]]) -> View:
    ids, top, conf = torch.tensor(contents), torch.tensor(tops), torch.tensor(confs)
    zero = torch.zeros(len(ids), dtype=torch.long)
    return View(ids, ids == MASK, top, conf, zero, zero + ids.shape[1], MASK, logprob=conf.log())


def test_the_deepest_branch_is_kept_whose_tokens_are_all_still_the_likeliest() -> None:
    """Of three branches the second holds what the first predicts, and the third what the second does not."""
    rule = registry.find("decoders", "psd")(level=0.9, branches=3)
    m = MASK
    contents = [[m, m, m, m], [5, m, m, m], [5, 6, m, m]]
    confs = [[0.4, 0.8, 0.1, 0.2], [0.5, 0.6, 0.95, 0.7], [0.5, 0.6, 0.9, 0.99]]
    view = row(contents, [[5, 6, 7, 8], [1, 9, 3, 8], [1, 1, 4, 4]], confs)
    assert rule.step(view).tolist() == [[5, m, 3, m], [5, m, 3, 8], [5, 9, 3, 8]]
    assert view.logprob is not None and view.logprob[0].exp().tolist() == pytest.approx([0.4, 0.6, 0.95, 0.7])


def test_a_branch_beyond_one_that_failed_does_not_count() -> None:
    """The third branch holds what the second predicts, but the second does not hold what the first predicts."""
    rule = registry.find("decoders", "psd")(level=0.9, branches=3)
    m = MASK
    contents = [[m, m, m], [5, m, m], [5, 6, m]]
    view = row(contents, [[4, 6, 7], [5, 6, 8], [5, 6, 9]], [[0.95, 0.8, 0.1], [0.99, 0.99, 0.99], [0.99, 0.99, 0.99]])
    assert rule.step(view).tolist() == [[4, m, m], [4, 6, m], [4, 6, 7]]


@pytest.mark.parametrize("rule", ["factor", "frechet"])
def test_the_rule_that_decides_may_be_another(rule: str) -> None:
    given, options = prompts(6), {"cache": "none", "gen_length": 12, "level": 0.5, "stop_ids": ()}
    one = fastdllm.generate(random_model(), given, decoder="psd", rule=rule, branches=1, **options)
    name = {"factor": "factor", "frechet": "delta"}[rule]
    alone = fastdllm.generate(random_model(), given, decoder=rule, **{name: 0.5}, cache="none", gen_length=12, stop_ids=())
    assert torch.equal(one.sequences[0], alone.sequences[0])
    assert one.stats.row_forwards == alone.stats.row_forwards

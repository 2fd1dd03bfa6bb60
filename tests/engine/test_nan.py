# SPDX-License-Identifier: Apache-2.0
"""A request for which the model gives NaN harms nobody else: neither those next to it nor those that take its place."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import fastdllm
from fastdllm import kernels
from fastdllm.models import Model
from tests.random_models import FAMILIES, random_model, triples
from tests.scripted_model import with_logits

BAD = 5  # a token whose embedding is not a number
LENGTHS = (4, 9, 3)  # of the prompts; every second one has a bad twin


def poisoned(family: str) -> Model:
    """The model never writes the bad token by itself."""
    model = copy.deepcopy(random_model(family))
    with torch.no_grad():
        model.network.embed.weight[BAD] = torch.nan
    return with_logits(model, lambda x: x.index_fill(-1, torch.tensor(BAD), -1e9))


def crowd(bad: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(BAD + 1, 20, (n,), generator=generator) for n in LENGTHS]
    for prompt in prompts[1::2]:
        prompt[1] = BAD if bad else BAD + 1
    return prompts


def answers(model: Model, bad: bool, **options: object) -> fastdllm.Output:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastdllm.generate(model, crowd(bad), gen_length=13, block_length=8, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_of_one_row_stays_in_it(family: str) -> None:
    """Two rows at a time, so that a good one works next to a bad one and another takes its place. Each decoder in turn
    meets another cache."""
    model, caches = poisoned(family), dict[str, list[str]]()
    for own, cache, decoder in triples():
        if own == family:
            caches.setdefault(decoder, []).append(cache)
    for number, decoder in enumerate(caches):
        cache = caches[decoder][number % len(caches[decoder])]
        options = {"cache": cache, "decoder": decoder, "batch_size": 2}
        without, beside = answers(model, False, **options), answers(model, True, **options)
        for i in range(0, len(LENGTHS), 2):
            assert beside.sequences[i].tolist() == without.sequences[i].tolist(), (cache, decoder, i)
            torch.testing.assert_close(beside.logprobs[i], without.logprobs[i], rtol=1e-4, atol=1e-4)


def test_an_answer_made_of_nan_is_named() -> None:
    model = poisoned("llada")
    with pytest.warns(UserWarning, match="answer 1 means nothing"):
        fastdllm.generate(model, crowd(True)[:2], gen_length=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdllm.generate(model, crowd(False), gen_length=8, constraints={3: 7})


def test_attention_reads_nothing_that_no_query_of_a_row_sees() -> None:
    """Also where a mask would hide it: NaN times zero is NaN."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 4, 8), torch.randn(3, 2, 10, 8), torch.randn(3, 2, 10, 8)
    kv_len = torch.tensor([[1, 2, 2, 3], [4, 4, 4, 4], [0, 10, 10, 0]])
    hide = torch.tensor([[0, 0], [1, 3], [2, 9]])
    expected = kernels.attention(q, k, v, torch.arange(3), kv_len, 10, hide)
    for row, seen in enumerate(([0, 1, 2], [0, 3], [0, 1, 9])):
        unseen = [slot for slot in range(10) if slot not in seen]
        k[row, :, unseen], v[row, :, unseen] = torch.nan, torch.inf
    assert torch.equal(kernels.attention(q, k, v, torch.arange(3), kv_len, 10, hide), expected)

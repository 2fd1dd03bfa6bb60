# SPDX-License-Identifier: Apache-2.0
"""`self_verify`: the tokens of reading a block from left to right, whatever was drafted, and the forwards that it takes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import registry
from fastdllm.runners import cuda_graph
from fastdllm.testing import caches_of
from tests.random_models import MASK, prompts, random_model
from tests.reference import v2
from tests.reference.network import PlainNetwork
from tests.runners.test_bucketing import emulated
from tests.scripted_model import scripted_model

LENGTHS = [(1, 16), (3, 8), (8, 16), (16, 24), (13, 17), (5, 1), (7, 9)]  # prompt, answer


def decoded(model: fastdllm.Model, given: list[torch.Tensor], **options: Any) -> fastdllm.Output:
    return fastdllm.generate(model, given, decoder="self_verify", **{"block_length": 8, "stop_ids": ()} | options)


@pytest.mark.parametrize("small", [1, 2, 4, 8])
def test_tokens_are_those_of_reading_a_block_from_left_to_right(small: int) -> None:
    """Token for token under every cache, since no draft has a say; with exact ones in the forwards of the published loop."""
    for seed, (length, answer) in enumerate(LENGTHS):
        model, (prompt,) = random_model("v2", seed % 3), prompts(length)
        net = PlainNetwork(model, grid=8)
        expected = v2.left_to_right(net, prompt, length=answer, block_size=8)
        drafted, forwards = v2.self_verify(net, prompt, length=answer, block_size=8, small_block_size=small)
        assert drafted == expected
        for cache in (name for name in caches_of("v2") if not registry.find("caches", name).begins):
            out = decoded(model, [prompt], gen_length=answer, small_block_size=small, cache=cache)
            assert out.sequences[0].tolist() == expected
            if cache != "sub_block":
                assert out.stats.row_forwards == [forwards]


def test_rows_of_a_batch_end_and_keep_fixed_tokens_as_by_themselves() -> None:
    """Unlike lengths, stop tokens, constraints; rows that draft beside rows that verify, and captured graphs' padding."""
    model, given = random_model("v2", 4), prompts(3, 12, 7, 8, 16)
    fixed = [{0: 4, 3: 5}, {}, dict.fromkeys(range(2, 9), 6), {7: 3}, dict.fromkeys(range(12), 9)]
    for stop_ids in ((), (1, 2, 3, 5, 8, 13)):
        options: dict[str, Any] = {"gen_length": 12, "small_block_size": 4, "stop_ids": stop_ids}
        together = decoded(model, given, constraints=fixed, batch_size=3, **options)
        for i, prompt in enumerate(given):
            alone = decoded(model, [prompt], constraints=[fixed[i]], **options)
            assert alone.sequences[0].tolist() == together.sequences[i].tolist()
            assert alone.stats.row_forwards[0] == together.stats.row_forwards[i]
            answer = alone.sequences[0][len(prompt) :].tolist()
            assert MASK not in answer and all(answer[at] == token for at, token in fixed[i].items() if at < len(answer))


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    model = random_model("v2", 1)
    for batch in (prompts(7), prompts(5, 40, 16, 31, 3)):
        eager, graph = (decoded(model, batch, gen_length=21, runner=runner) for runner in ("eager", "cuda_graph"))
        assert [s.tolist() for s in graph.sequences] == [s.tolist() for s in eager.sequences]
        assert graph.stats.row_forwards == eager.stats.row_forwards


def test_what_was_committed_when_and_how_likely_it_was() -> None:
    """A token's log-probability is the one it had from left to right, and no forward commits out of that order."""
    model, (prompt,) = random_model("v2", 2), prompts(5)
    (result,) = [
        r
        for step in fastdllm.stream(
            model, [prompt], decoder="self_verify", gen_length=19, block_length=8, small_block_size=8, stop_ids=()
        )
        for r in step.done.values()
    ]
    order = result.committed_at.tolist()
    assert all(a <= b for a, b in pairwise(order)) and order[0] > 0
    net = PlainNetwork(model, grid=8)
    for at in range(5, 24):
        seq = v2.Blocks(net, result.ids[:at], 8)
        logits = seq.last if at % 8 == 0 else seq.read(result.ids[seq.start : at], causal=True)[-1]
        assert abs(float(logits.log_softmax(-1)[result.ids[at]]) - float(result.logprobs[at - 5])) < 1e-4


def test_drafts_that_are_all_taken_cost_two_forwards_a_sub_block() -> None:
    model = scripted_model("v2", [*range(30)], [0.9])
    calls: list[int] = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    # The prompt ends within a block: 4 positions, then two blocks of 8 whose first token their opening gives.
    for small, passes in ((8, 2 + 3 * 2), (4, 2 + 5 * 2)):
        calls.clear()
        out = decoded(model, prompts(4), gen_length=20, small_block_size=small)
        assert out.stats.row_forwards == [passes] == [len(calls)]


@pytest.mark.parametrize("family", ["llada", "dream", "nemotron"])
def test_other_families_are_refused(family: str) -> None:
    with pytest.raises(
        ValueError, match=f"decoder='self_verify' does not fit the family '{family}'.*predicts the next token"
    ):
        fastdllm.generate(random_model(family), prompts(4), decoder="self_verify", gen_length=8)


def test_what_makes_no_sense_with_it_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder='self_verify' needs layers that run for whole passes; reuse_k=2 skips"):
        decoded(random_model("v2"), prompts(4), reuse_k=2, layer_subset="1", trim_ratio=0.4, gen_length=8)
    with pytest.raises(ValueError, match="cfg_scale"):
        decoded(random_model("v2"), prompts(4), cfg_scale=1.0, gen_length=8)
    with pytest.raises(ValueError, match="lossless=2 does not go with decoder='self_verify'"):
        decoded(random_model("v2"), prompts(4), lossless=2, gen_length=8)

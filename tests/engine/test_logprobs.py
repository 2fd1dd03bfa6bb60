# SPDX-License-Identifier: Apache-2.0
"""The log-probability of each token when it was committed, and the forward that committed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm import registry
from fastdllm.forward import Window
from fastdllm.models import Model
from tests.random_models import MASK, prompts, random_model, triples

OPTIONS: dict[str, Any] = {"gen_length": 13, "block_length": 8, "small_block_size": 4, "stop_ids": ()}


@pytest.mark.each_choice
@pytest.mark.parametrize("family, cache, decoder", triples())
def test_committed_at_is_what_the_steps_say(family: str, cache: str, decoder: str) -> None:
    """For every decoder and cache, in a batch, with a constraint: the last commit of a position counts."""
    model, given = random_model(family, 2), prompts(5, 8)
    fixed = {2: 7}
    options = {**OPTIONS, "cache": cache, "decoder": decoder}
    out = fastdllm.generate(model, given, trace=True, constraints=fixed, **options)
    for row, prompt in enumerate(given):
        committed_at, conf = torch.zeros(13, dtype=torch.long), torch.full((13,), torch.nan)
        forward = 0
        for step in out.trace:
            if row not in step.rows:
                continue
            i, forward = step.rows.index(row), forward + 1
            first = max(step.starts[i], len(prompt)) - len(prompt)
            for at in step.committed[i].nonzero()[:, 0].tolist():
                committed_at[first + at] = forward
                conf[first + at] = step.confidence[i, at]
        assert out.committed_at[row].tolist() == committed_at.tolist()
        assert out.committed_at[row][2] == 0 and out.logprobs[row][2].isnan()
        assert out.logprobs[row].isnan().sum() == 1
        assert (out.logprobs[row].nan_to_num(0) <= 1e-6).all()
        rule = registry.find("decoders", decoder)
        if rule.adjust is None and decoder not in ("draft_verify", "lopa", "psd"):
            torch.testing.assert_close(out.logprobs[row].exp(), conf, rtol=1e-4, atol=1e-6, equal_nan=True)


def plain(model: Model, ids: Tensor) -> Tensor:
    """Log-probabilities [T, V] of every position from one forward without a cache."""
    spec, pos = model.spec, torch.arange(len(ids))[None]
    kv_len = torch.full_like(pos, len(ids))
    store = model.network.new_store(1, len(ids))
    logits = model.network.logits(
        model.network(ids[None], Window(torch.zeros(1, dtype=torch.long), pos, kv_len, len(ids)), store)[0]
    )
    return logits.masked_fill(model.banned, -torch.inf).log_softmax(-1).roll(spec.shift, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("decoder", ["quota", "threshold", "draft_verify", "lopa", "wino", "joint_threshold"])
def test_logprobs_are_those_of_the_canvas_at_that_forward(decoder: str, temperature: float) -> None:
    """Without a cache: mask what was not yet committed, run one plain forward, read the token's probability off it."""
    if temperature and decoder in ("draft_verify", "lopa"):
        pytest.skip("a decoder with branches is deterministic")
    model, given = random_model("llada", 5), prompts(6)[0]
    options = {**OPTIONS, "cache": "none", "decoder": decoder, "temperature": temperature, "block_length": 13}
    out = fastdllm.generate(model, given, trace=True, **options)
    answer, at = out.sequences[0][6:], out.committed_at[0]
    if decoder == "draft_verify":  # several tokens of one forward were committed one after the other
        single = fastdllm.generate(model, given, **{**options, "decoder": "quota"})
        assert torch.equal(single.sequences[0], out.sequences[0])
        torch.testing.assert_close(out.logprobs[0], single.logprobs[0], rtol=1e-4, atol=1e-5)
        return
    before = torch.full((13,), MASK)
    history = [before.clone()]
    for step in out.trace:
        history.append(step.ids[0].clone())
    for i in range(13):
        contexts = [history[int(at[i]) - 1]]
        if decoder == "lopa":  # scored in the branch that won, which holds one token more than the row did
            for number in {int(at[i]), max(1, int(at[i]) - 1)}:
                for j in (at == number).nonzero()[:, 0].tolist():
                    more = history[number - 1].clone()
                    more[j] = answer[j]
                    contexts += [history[number - 1], more]
        if decoder != "joint_threshold":  # which reads tokens that it replaces
            contexts = [context for context in contexts if context[i] == MASK]
        found = [plain(model, torch.cat([given, context]))[6 + i, answer[i]] for context in contexts]
        closest = min(found, key=lambda logprob: abs(float(logprob - out.logprobs[0][i])))
        torch.testing.assert_close(out.logprobs[0][i], closest, rtol=1e-4, atol=1e-4)

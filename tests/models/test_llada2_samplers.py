# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.0's steps of a block and LLaDA2.1's edits are those of the published samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import build
from fastdllm.testing import prompts, random_model
from tests.published_checkpoints import write_checkpoint
from tests.reference import llada2
from tests.reference.network import PlainNetwork

SIZE = 8
SHAPE: dict[str, Any] = {"block_length": SIZE, "small_block_size": SIZE, "stop_ids": ()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> fastdllm.Model:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("llada2")
    write_checkpoint(folder, "llada2_moe")
    made = fastdllm.load(str(folder), device="cpu", block_size=SIZE)
    made.network.head.weight.mul_(5)  # sharper, so that thresholds part the tokens
    return made


def text(length: int) -> torch.Tensor:
    return torch.randint(300, 500, (length,))


def whole(length: int) -> int:
    """An answer of about two blocks that ends on the grid."""
    return -(-length // SIZE) * SIZE - length + 2 * SIZE


def readings(length: int, answer: int) -> int:
    """Forwards that read what comes before a block for good; the published samplers read all of it every time."""
    return (length >= SIZE) + (length + answer - 1) // SIZE - length // SIZE


@pytest.mark.pairwise
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("length", [1, 8, 13])
@pytest.mark.parametrize("threshold", [0.3, 0.95])
def test_a_block_takes_at_most_so_many_steps(model: fastdllm.Model, steps: int, length: int, threshold: float) -> None:
    ids, answer = text(length), whole(length)
    shape = {"length": answer, "block_size": SIZE, "steps": steps, "threshold": threshold}
    expected, forwards = llada2.by_steps(PlainNetwork(model, SIZE), ids, **shape)
    for cache in ("block", "none"):
        options = {"cache": cache, "threshold": threshold, "steps_per_block": steps}
        out = fastdllm.generate(model, [ids], gen_length=answer, **SHAPE, **options)
        assert out.sequences[0].tolist() == expected
        assert out.stats.forwards == forwards + readings(length, answer)
    assert forwards <= steps * (readings(length, answer) + 1)


EDITING = {"threshold": 0.3, "editing_threshold": 0.1, "max_post_steps": 16}


@pytest.mark.each_choice
@pytest.mark.parametrize(
    "options",
    [
        EDITING,
        {"threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 16},  # the speed mode
        {"threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": 16},  # the quality mode
        {"threshold": 0.1, "editing_threshold": 0.0, "max_post_steps": 3},  # more edits than it has time for
        {"threshold": 0.1, "editing_threshold": 0.0, "max_post_steps": 1},
        {"threshold": 0.1, "editing_threshold": 0.0, "max_post_steps": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 8, 13])
def test_tokens_are_edited_as_published(model: fastdllm.Model, options: dict[str, Any], length: int) -> None:
    ids, answer = text(length), whole(length)
    expected, written, forwards, _ = llada2.editing(
        PlainNetwork(model, SIZE), ids, length=answer, block_size=SIZE, **options
    )
    for cache in ("block", "none"):
        out = fastdllm.generate(model, [ids], gen_length=answer, cache=cache, decoder="joint_threshold", **SHAPE, **options)
        assert out.sequences[0].tolist() == expected
        assert out.stats.forwards == forwards + readings(length, answer)
        own = [at - readings(length, offset + 1) for offset, at in enumerate(out.committed_at[0].tolist())]
        assert own == written  # by the forward that wrote it last


def test_the_cases_edit_and_meet_their_bound(model: fastdllm.Model) -> None:
    """Otherwise the tests above would say nothing."""
    shape = {"length": 3 * SIZE, "block_size": SIZE}
    tight = {"threshold": 0.1, "editing_threshold": 0.0, "max_post_steps": 1}
    made = [llada2.editing(PlainNetwork(model, SIZE), text(8), **shape, **options) for options in (EDITING, tight)]
    assert all(edits > 3 for *_, edits in made)
    longer = llada2.editing(PlainNetwork(model, SIZE), text(8), **shape, **(tight | {"max_post_steps": 40}))
    assert longer[2] > made[1][2]


def test_log_probabilities_are_those_of_the_last_commit(model: fastdllm.Model) -> None:
    ids = text(8)
    options = {"gen_length": SIZE, "decoder": "joint_threshold", "cache": "none", **SHAPE, **EDITING}
    seen, final = [], None
    for step in fastdllm.stream(model, [ids], **options):
        seen.append((step.ids[0].clone(), step.committed[0].clone(), step.logprobs[0].clone()))
        final = step.done.get(0, final)
    assert final is not None
    net = PlainNetwork(model, SIZE)
    before = torch.full((SIZE,), model.spec.mask_id)
    changed_twice = 0
    for number, (after, committed, _) in enumerate(seen, 1):
        assert torch.equal(committed, after != before)
        logits = net(torch.cat([ids, before]))[len(ids) :]
        changed_twice += int((committed & (before != model.spec.mask_id)).sum())
        for at in (final.committed_at == number).nonzero()[:, 0].tolist():
            expected = logits[at].log_softmax(-1)[after[at]]
            assert float(final.logprobs[at]) == pytest.approx(float(expected), abs=1e-4)
        before = after
    assert changed_twice, "nothing was edited"
    assert torch.equal(final.ids[len(ids) :], before)


@pytest.mark.parametrize("family", ["llada", "dream", "v2", "nemotron", "llada2_moe"])
def test_constraints_and_prompts_are_never_edited(family: str) -> None:
    net, given = random_model(family), prompts(5, 11)
    fixed = {0: 3, 6: 4, 7: 5}
    options = {"decoder": "joint_threshold", "threshold": 0.0, "editing_threshold": 0.0, "stop_ids": ()}
    out = fastdllm.generate(net, given, constraints=fixed, gen_length=20, block_length=8, **options)
    for sequence, prompt in zip(out.sequences, given, strict=True):
        assert torch.equal(sequence[: len(prompt)], prompt)
        assert all(int(sequence[len(prompt) + at]) == token for at, token in fixed.items())


def test_an_answer_ends_only_with_its_block(model: fastdllm.Model) -> None:
    """A stop token may be edited away as long as its block is open."""
    ids, options = text(8), {"decoder": "joint_threshold", "gen_length": 3 * SIZE, **EDITING}
    free = fastdllm.generate(model, [ids], **{**options, **SHAPE})
    answer = free.sequences[0][8:].tolist()
    for at in (1, SIZE, 2 * SIZE + 3):
        stop = answer[at]
        out = fastdllm.generate(model, [ids], **{**options, **SHAPE, "stop_ids": (stop,)})
        assert out.sequences[0][8:].tolist() == answer[: answer.index(stop) + 1]


@pytest.mark.parametrize("decoder", ["joint_threshold", "wino"])
def test_streamed_text_is_never_taken_back(decoder: str) -> None:
    net = fastdllm.load("tiny-llada")
    own = {"editing_threshold": 0.0} if decoder == "joint_threshold" else {"keep": 1.0}
    options = {"decoder": decoder, "threshold": 0.1, "gen_length": 64, "block_length": 16, **own}
    question = [{"role": "user", "content": "Tom has 12 apples and eats 5. How many are left?"}]
    pieces = list(fastdllm.stream_text(net, question, **options))
    assert "".join(pieces) == fastdllm.generate(net, question, **options).texts[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lossless": 3}, "lossless=3 does not go with decoder='joint_threshold', which edits"),
        ({"attention_discount": 4.0}, "attention_discount=4.0 does not go with decoder='joint_threshold', which edits"),
        ({"editing_threshold": 1.5}, "editing_threshold=1.5 must lie in"),
        ({"max_post_steps": -1}, "max_post_steps=-1 must be at least 0"),
    ],
)
def test_what_does_not_go_with_edits_is_refused(options: dict[str, Any], message: str) -> None:
    config = fastdllm.DecodeConfig
    with pytest.raises(ValueError, match=message):
        build.assemble(random_model(), config(decoder="joint_threshold", gen_length=16, **options))
    with pytest.raises(ValueError, match="steps_per_block=-1 must be at least 0"):
        config(steps_per_block=-1)

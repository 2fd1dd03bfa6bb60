# SPDX-License-Identifier: Apache-2.0
"""Corruption, views and loss of the block-diffusion objective."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdllm.training.masks import row_positions
from fastdllm.training.objective import (
    EPS,
    IGNORE,
    Noise,
    choose_masked,
    complementary_views,
    draw_noise,
    drop_first_targets,
    noisy_and_clean,
    shifted_cross_entropy,
    target_states,
)

MASK = 99


def batch(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels (about half of them prompt) and positions, [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (rows, length), generator=generator)
    prompt = torch.rand(rows, length, generator=generator) < 0.5
    positions, _ = row_positions(rows, length)
    return ids, drop_first_targets(ids.masked_fill(prompt, IGNORE), positions), positions


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 3), length=st.integers(1, 40), block=st.integers(1, 16), seed=st.integers(0, 99))
def test_each_response_token_is_masked_in_one_view(rows: int, length: int, block: int, seed: int) -> None:
    ids, labels, positions = batch(rows, length, seed)
    noise = draw_noise(rows, length, torch.Generator().manual_seed(seed))
    masked = choose_masked(labels, positions, block, noise)
    first, second = complementary_views(ids, labels, masked, MASK).chunk(2)
    assert torch.equal((first == MASK) ^ (second == MASK), labels != IGNORE)
    assert not ((first == MASK) & (second == MASK)).any()
    for view in (first, second):
        assert torch.equal(view[view != MASK], ids[view != MASK])


def test_a_block_has_one_ratio_and_tokens_have_their_own_coins() -> None:
    rows, length, block = 4000, 16, 8
    positions, _ = row_positions(rows, length)
    labels = torch.ones(rows, length, dtype=torch.long)
    masked = choose_masked(labels, positions, block, draw_noise(rows, length, torch.Generator().manual_seed(0)))
    counts = masked.view(rows, 2, block).sum(-1).float()
    # t ~ U(0, 1) with 8 coins of probability t: the count is uniform on 0 ... 8, of mean 4 and variance 20/3.
    # Independent ratios a token would give variance 2. Standard errors here: 0.03 and 0.07.
    assert abs(counts.mean() - 4) < 0.15
    assert abs(counts.var() - 20 / 3) < 0.4
    first, second = counts[:, 0] - counts[:, 0].mean(), counts[:, 1] - counts[:, 1].mean()
    assert abs((first * second).mean()) < 0.5, "two blocks share their ratio"


def test_least_ratio_is_eps() -> None:
    positions, _ = row_positions(1, 4)
    labels = torch.ones(1, 4, dtype=torch.long)
    coins = torch.tensor([[0.0, EPS / 2, EPS * 2, 0.5]])
    masked = choose_masked(labels, positions, 4, Noise(torch.zeros(1, 4), coins))
    assert masked.tolist() == [[True, True, False, False]]


def test_blocks_follow_each_document() -> None:
    """A document that starts in the middle of a row opens a new block there."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    ratio = torch.tensor([[1.0, 0, 0, 0.0, 0, 0, 0, 1.0]])
    noise = Noise(ratio, torch.full((1, 8), 0.5))
    masked = choose_masked(torch.ones(1, 8, dtype=torch.long), positions, 4, noise)
    assert masked.long().tolist() == [[1, 1, 1, 0, 0, 0, 0, 1]]


def test_noise_of_a_row_is_the_same_at_every_width() -> None:
    narrow = draw_noise(1, 37, torch.Generator().manual_seed(5))
    wide = draw_noise(1, 128, torch.Generator().manual_seed(5))
    assert torch.equal(narrow.ratio, wide.ratio[:, :37])
    assert torch.equal(narrow.coin, wide.coin[:, :37])
    assert not torch.equal(narrow.ratio, narrow.coin)


def test_first_token_of_a_document_is_no_target() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    labels = torch.tensor([[5, 6, 7, 8, 9]])
    assert drop_first_targets(labels, positions).tolist() == [[IGNORE, 6, 7, IGNORE, 9]]


@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_a_loop_over_views_and_positions(seed: int) -> None:
    """The published form: each view gives logits everywhere, token i is scored at i - 1 where the view masks it."""
    ids, labels, positions = batch(3, 21, seed)
    masked = choose_masked(labels, positions, 4, draw_noise(3, 21, torch.Generator().manual_seed(seed)))
    noisy = complementary_views(ids, labels, masked, MASK)
    states = torch.randn(6, 21, 8, requires_grad=True)
    head = torch.nn.Linear(8, 50)

    loss = shifted_cross_entropy(head(target_states(states, masked)), labels)
    (gradient,) = torch.autograd.grad(loss, states)

    terms = []
    for view in range(6):
        for i in range(1, 21):
            if noisy[view, i] == MASK:
                log_probability = head(states[view, i - 1]).log_softmax(-1)
                terms.append(-log_probability[ids[view % 3, i]])
    assert len(terms) == (labels != IGNORE).sum()
    expected = torch.stack(terms).mean()
    (expected_gradient,) = torch.autograd.grad(expected, states)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_loss_is_computed_in_float32() -> None:
    logits = torch.randn(2, 6, 30).bfloat16()
    labels = torch.randint(0, 30, (2, 7))
    exact = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels[:, 1:].flatten())
    assert abs(shifted_cross_entropy(logits, labels) - exact) < 1e-6, "bfloat16 keeps 3 digits"


def test_a_batch_without_targets_has_loss_zero_and_a_gradient() -> None:
    states = torch.randn(2, 5, 3, requires_grad=True)
    labels = torch.full((1, 5), IGNORE)
    loss = shifted_cross_entropy(target_states(states, labels != IGNORE), labels)
    loss.backward()
    assert loss == 0
    assert (states.grad == 0).all()


def test_loss_is_divided_by_the_given_count() -> None:
    logits, labels = torch.randn(2, 6, 9), torch.randint(0, 9, (2, 7))
    total = 12 * shifted_cross_entropy(logits, labels)
    torch.testing.assert_close(shifted_cross_entropy(logits, labels, count=48), total / 48)


def test_clean_rows_follow_both_views() -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    views = torch.tensor([[MASK, 2], [3, MASK], [1, MASK], [MASK, 4]])
    expected = [[MASK, 2, 1, 2], [3, MASK, 3, 4], [1, MASK, 1, 2], [MASK, 4, 3, 4]]
    assert noisy_and_clean(views, ids).tolist() == expected

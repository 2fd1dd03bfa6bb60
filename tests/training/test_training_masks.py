# SPDX-License-Identifier: Apache-2.0
"""The training mask against a definition in words, and its two forms against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from fastdllm.training.masks import PADDING, dense_mask, flex_mask, row_positions
from tests.examples import examples


def packed_row(lengths: list[int], padding: int) -> tuple[Tensor, Tensor]:
    """positions and documents, [1, T], of documents of these lengths, then row padding."""
    positions = [i for length in lengths for i in range(length)] + [0] * padding
    documents = [d for d, length in enumerate(lengths) for _ in range(length)] + [PADDING] * padding
    return torch.tensor([positions]), torch.tensor([documents])


def allowed(query: tuple[str, int, int], key: tuple[str, int, int], block: int) -> bool:
    """May `query` see `key`, each a (half, document, position)?"""
    (q_half, q_document, q_position), (k_half, k_document, k_position) = query, key
    if PADDING in (q_document, k_document):
        return False
    if q_document != k_document:
        return False
    if q_half == "noisy" and k_half == "noisy":
        return q_position // block == k_position // block
    if q_half == "noisy" and k_half == "clean":
        return k_position < q_position - q_position % block
    if q_half == "clean" and k_half == "clean":
        return k_position < q_position - q_position % block + block
    return False


@settings(max_examples=examples(60), deadline=None)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    padding=st.integers(0, 5),
    block=st.integers(1, 9),
)
def test_mask_equals_its_definition(lengths: list[int], padding: int, block: int) -> None:
    positions, documents = packed_row(lengths, padding)
    tokens = [
        (half, document, position)
        for half in ("noisy", "clean")
        for document, position in zip(documents[0].tolist(), positions[0].tolist(), strict=True)
    ]
    expected = torch.tensor([[allowed(q, k, block) or i == j for j, k in enumerate(tokens)] for i, q in enumerate(tokens)])
    mask = dense_mask(positions, documents, block)
    assert mask.shape == (1, 1, len(tokens), len(tokens))
    assert torch.equal(mask[0, 0], expected)


def test_rows_of_a_batch_have_their_own_masks() -> None:
    rows = [packed_row([5, 7, 3], 1), packed_row([16], 0), packed_row([8], 8)]
    batch = dense_mask(torch.cat([p for p, _ in rows]), torch.cat([d for _, d in rows]), 4)
    for mask, (positions, documents) in zip(batch, rows, strict=True):
        assert torch.equal(mask, dense_mask(positions, documents, 4)[0])


def test_plain_rows_are_one_document() -> None:
    positions, documents = row_positions(2, 6)
    one_positions, one_documents = packed_row([6], 0)
    assert torch.equal(dense_mask(positions, documents, 4), dense_mask(one_positions, one_documents, 4).expand(2, 1, 12, 12))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("lengths", [[40], [7, 33], [32, 64, 5]], ids=str)
def test_flex_attention_equals_sdpa(lengths: list[int], heads: tuple[int, int]) -> None:
    padded = [packed_row(lengths, 3), packed_row([sum(lengths)], 3)]
    positions, documents = torch.cat([p for p, _ in padded]), torch.cat([d for _, d in padded])
    length = 2 * positions.shape[1]
    query = torch.randn(2, heads[0], length, 16)
    key, value = torch.randn(2, 2, heads[1], length, 16)
    dense = scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(positions, documents, 8), enable_gqa=True)
    with torch.no_grad():
        flex = flex_attention(query, key, value, block_mask=flex_mask(positions, documents, 8), enable_gqa=True)
    torch.testing.assert_close(flex, dense, atol=1e-4, rtol=0)

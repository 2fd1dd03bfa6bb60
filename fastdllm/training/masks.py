# SPDX-License-Identifier: Apache-2.0
"""Who sees whom while a block-diffusion model is trained (Fast-dLLM v2, arXiv 2509.26328).

A training row is `[noisy | clean]`: T corrupted tokens, then the same T tokens as they are, at the same
positions. A noisy block sees itself in both directions and the clean form of the blocks before it, as a
decoder does: an unfinished block after finished ones. One predicate states the rule; `dense_mask` evaluates
it for every pair and `flex_mask` hands it to flex attention.

        keys      noisy            clean
  noisy query     same block       earlier blocks
  clean query     nothing          same and earlier blocks

Beyond the paper: documents packed into one row never see each other, and nobody sees row padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

PADDING = -1  # document number of the positions that only fill a batch row up to its width

Predicate = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


def row_positions(rows: int, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(positions, documents), both [B, T], of rows that hold one unpadded document each."""
    positions = torch.arange(length, device=device).expand(rows, length)
    return positions, torch.zeros_like(positions)


def block_diffusion_predicate(positions: Tensor, documents: Tensor, block: int) -> Predicate:
    """The rule as `predicate(row, head, query, key) -> bool`, the signature of flex attention's `mask_mod`.

    positions: [B, T] position of each token within its own document, from 0; blocks lie on this grid, as in
    decoding. documents: [B, T] document number within the row, `PADDING` for row padding.
    query, key: indices into the row of 2T. All indices broadcast; the head is ignored.
    A padding position sees only itself, so that no softmax is empty.
    """
    length = positions.shape[1]
    blocks = positions // block

    def predicate(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        query_clean, key_clean = query >= length, key >= length
        q, k = query % length, key % length
        query_block, key_block = blocks[row, q], blocks[row, k]
        noisy_to_noisy = ~query_clean & ~key_clean & (query_block == key_block)
        noisy_to_clean = ~query_clean & key_clean & (query_block > key_block)
        clean_to_clean = query_clean & key_clean & (query_block >= key_block)
        same_document = (documents[row, q] == documents[row, k]) & (documents[row, k] != PADDING)
        return ((noisy_to_noisy | noisy_to_clean | clean_to_clean) & same_document) | (query == key)

    return predicate


def dense_mask(positions: Tensor, documents: Tensor, block: int) -> Tensor:
    """[B, 1, 2T, 2T] bool, True where attention is allowed: the form scaled_dot_product_attention takes."""
    predicate = block_diffusion_predicate(positions, documents, block)
    rows = torch.arange(positions.shape[0], device=positions.device)
    index = torch.arange(2 * positions.shape[1], device=positions.device)
    return predicate(rows[:, None, None], None, index[:, None], index).unsqueeze(1)


def flex_mask(positions: Tensor, documents: Tensor, block: int) -> BlockMask:
    """The same rule for flex attention, which skips the tiles that the rule leaves empty."""
    rows, length = positions.shape
    predicate = block_diffusion_predicate(positions, documents, block)
    return create_block_mask(predicate, rows, None, 2 * length, 2 * length, device=positions.device)

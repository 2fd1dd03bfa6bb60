# SPDX-License-Identifier: Apache-2.0
"""Rows of samples to the tensors of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdllm.training.masks import PADDING
from fastdllm.training.objective import IGNORE, drop_first_targets
from fastdllm.training.samples import Sample


class Row(NamedTuple):
    """One row of a batch: its number in the data set, which seeds its noise, and its samples."""

    index: int
    samples: list[Sample]


class Rows(Dataset[Row]):
    """The rows of a training set, held in memory."""

    def __init__(self, rows: Sequence[list[Sample]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return Row(index, self.rows[index])


@dataclass(frozen=True)
class Collator:
    """Stacks rows and pads them to `width` tokens, or to the longest of the batch.

    document_mask: number the samples of a packed row, so that they neither see each other nor share positions.
    Without it a row is one document, as in the published training.
    """

    mask_id: int
    width: int | None = None
    document_mask: bool = True

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids, labels, position_ids, documents: [B, T]; index: [B]."""
        width = self.width or max(sum(len(s.ids) for s in row.samples) for row in rows)
        shape = (len(rows), width)
        ids = torch.full(shape, self.mask_id)
        labels = torch.full(shape, IGNORE)
        positions = torch.zeros(shape, dtype=torch.long)
        documents = torch.full(shape, PADDING)
        for b, row in enumerate(rows):
            start = 0
            for number, sample in enumerate(row.samples):
                here = slice(start, start + len(sample.ids))
                ids[b, here] = torch.from_numpy(sample.ids).long()
                labels[b, here] = torch.from_numpy(sample.labels).long()
                documents[b, here] = number if self.document_mask else 0
                positions[b, here] = torch.arange(len(sample.ids)) + (0 if self.document_mask else start)
                start = here.stop
        return {
            "input_ids": ids,
            "labels": drop_first_targets(labels, positions),
            "position_ids": positions,
            "documents": documents,
            "index": torch.tensor([row.index for row in rows]),
        }

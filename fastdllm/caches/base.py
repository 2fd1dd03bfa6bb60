# SPDX-License-Identifier: Apache-2.0
"""A cache is a plan: which positions to recompute now, and what they may see.

It never touches the model or the KV store. A file of this folder is one plan. Its name is the name on the command line, its
class is called `Cache`, and its dataclass fields are its options.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from fastdllm.blocks import Block, Pass, Progress
from fastdllm.fields import Declared

if TYPE_CHECKING:
    from fastdllm.reuse.values import ValueReuse


class CachePlan(metaclass=Declared):
    """Which positions each forward recomputes, and what they see. Values of its fields have the types that these declare.

    `open` refreshes the store when a block opens. Its logits are the decoder's first step; a shifted model learns only the
    block's first token from it, unless the plan `begins` the block. `step` says what a denoising forward recomputes.

    block_causal: the plan needs a model whose finished blocks never change (True), needs one that reads both ways (False),
        or takes any (None).
    causal: whether the plan needs a model that reads its context causally.
    pure: whether a forward depends on the block's content only, not on the steps that led to it.
    begins: whether the pass that opens a block is its first denoising pass in shifted models too.
    """

    block_causal: ClassVar[bool | None] = False
    causal: ClassVar[bool] = False
    pure: ClassVar[bool] = True
    begins: ClassVar[bool] = False

    @classmethod
    def fits(cls, block_causal: bool, causal: bool) -> bool:
        """Whether a family can be run by this plan: one whose finished blocks never change, one that reads its context
        causally, or one that is neither."""
        return cls.block_causal is None or (bool(cls.block_causal), cls.causal) == (block_causal, causal)

    @classmethod
    def final(cls) -> bool:
        """Whether finished blocks never change, so that prompts that begin alike may share them."""
        return bool(cls.block_causal) or cls.causal

    def open(self, block: Block) -> Pass | None:
        """The pass that opens `block`, or None."""
        return None

    @abstractmethod
    def step(self, block: Block, progress: Progress) -> Pass:
        """The next denoising pass of `block`."""

    def reuse(self, layers: int, size: int) -> ValueReuse | None:
        """Which positions of a denoising pass, `size` of them at most, run in each of the model's layers; None: all."""
        return None

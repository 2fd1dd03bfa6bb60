# SPDX-License-Identifier: Apache-2.0
"""A decoder maps a block to its next content.

It sees ids, mask, top token and confidence of every position and returns the next ids; that one value expresses committing
and editing (write the top token), remasking (write the mask) and branching. A file of this folder is one rule; its name is
the name on the command line, its class is called `Decoder`, and its dataclass fields are its options.

A rule reads no value on the host, has no shape that depends on data, and leaves every row that has a masked position with
fewer of them than before: what it remasks is less than what it commits.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fastdllm.fields import Declared
from fastdllm.view import View

if TYPE_CHECKING:
    from typing_extensions import Self


class DecoderRule(metaclass=Declared):
    """What a decoder must offer. Values of its fields have the types that these declare.

    needs: extra statistics of the head, of {"entropy", "margin"}, "attention" for how much positions of the block attend to
        each other, and "stops" for the tokens that end an answer.
    probability: whether the rule compares the confidence with a probability, so that another confidence makes no sense.
    branches: contents of each row that run in the same forward. Branch 0 is the row's content, the others are tries.
    lossless: whether the tokens are those of another rule.
    shadow: whether extra queries ask what the model would say of each token of the block without seeing it (`view.unaware`).
        Where that is not NaN the rule may write the mask again. One branch only.
    drafts: whether what the rule writes is a draft. It stays open until a pass from left to right (`view.causal`), in which
        the rule keeps the drafts that the model takes. For families that read their context causally; one branch only.
    edits: whether the rule may replace tokens that it has written (`view.editable`). A full block then stays open until a
        forward changes nothing in it, or `max_post_steps` forwards have followed the one that filled it.
    max_post_steps: see `edits`.
    in_blocks: whether drafts are verified within the blocks of a block-causal family that predicts the next token instead.
    per_request: options that a request may replace by its own number. In `step` they are columns [R, 1] then, floats
        otherwise (`view.rows` gives [R] of either).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    probability: ClassVar[bool] = True
    branches: int = 1
    lossless: ClassVar[bool] = False
    shadow: ClassVar[bool] = False
    drafts: ClassVar[bool] = False
    in_blocks: ClassVar[bool] = False
    edits: ClassVar[bool] = False
    max_post_steps: int = 0
    per_request: ClassVar[tuple[str, ...]] = ()

    # Optional. state(width, vocab, device, rows) -> tensors kept from step to step, first dimension `rows` (index them with
    # `view.slot`); they are made once, so a rule resets a row's share where `view.step` is 0.
    state: ClassVar[Callable[..., dict[str, Tensor]] | None] = None
    # Optional. adjust(view, logits [R, Q, V] fp32) -> the logits to score instead; `view` holds the scores of `logits`.
    adjust: ClassVar[Callable[..., Tensor] | None] = None

    @property
    def numbers(self) -> dict[str, float]:
        """The options that a request may replace, with this rule's values."""
        return {name: float(getattr(self, name)) for name in self.per_request}

    @classmethod
    def revocable(cls) -> bool:
        """Whether a token may change, or be masked again, until its block is done."""
        return cls.shadow or cls.edits

    @property
    def owner(self) -> Hashable:
        """Rules with the same owner share their `state`."""
        return type(self)

    @abstractmethod
    def step(self, view: View) -> Tensor:
        """The next ids [R, Q]. With n branches, request i has the rows i * n to i * n + n - 1."""

    def of(self, numbers: Mapping[str, Tensor]) -> Self:
        """This rule with the rows' own numbers, columns [R, 1], in place of its options."""
        own = {name: numbers[name] for name in self.per_request}
        return self._with(own) if own else self

    def _with(self, options: Mapping[str, Any]) -> Self:
        """A copy with other values, which are not checked: columns cannot be, without a read on the host."""
        rule = copy.copy(self)  # a rule of one's own may keep its fields in slots
        for name, value in options.items():
            object.__setattr__(rule, name, value)
        return rule

    def checked(self, numbers: Mapping[str, float]) -> None:
        """Raise ValueError for numbers that this rule's own checks refuse."""
        if numbers:
            dataclasses.replace(self, **numbers)  # type: ignore[type-var]

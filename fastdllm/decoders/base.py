# SPDX-License-Identifier: Apache-2.0
"""A decoder maps a block to its next content.

It sees ids, mask, top token and confidence of every position and returns the next ids; that one value expresses committing
(write the top token), revoking (write the mask) and branching. A file of this folder is one rule; its name is the
name on the command line, its class is called `Decoder`, and its dataclass fields are its options.

A rule reads no value on the host, has no shape that depends on data, and leaves every row that has a masked position with
fewer of them than before: what it revokes is less than what it commits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from fastdllm.view import View


class DecoderRule:
    """`needs`: extra statistics of the head, of {"entropy", "margin"}. `probability`: the rule compares the confidence
    with a probability, so that another confidence makes no sense. `rows`: branches of each row that run in the same
    forward; branch 0 is the row's content, the others are tries. `lossless`: the tokens are those of one token per step.
    `shadow`: shadow queries ask each token of the block what the model would say without it (`view.check`), and where that
    is not NaN the rule may write the mask again; one branch only.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    probability: ClassVar[bool] = True
    rows: int = 1
    lossless: ClassVar[bool] = False
    shadow: ClassVar[bool] = False

    # Optional. state(width, vocab, device, rows) -> tensors kept from step to step, first dimension `rows` (index them with
    # `view.row`); they are made once, so a rule resets a row's share where `view.step` is 0.
    state: ClassVar[Callable[..., dict[str, Tensor]] | None] = None
    # Optional. adjust(view, logits [R, Q, V] fp32) -> the logits to score instead; `view` holds the scores of `logits`.
    adjust: ClassVar[Callable[..., Tensor] | None] = None

    def step(self, view: View) -> Tensor:
        """The next ids [R, Q]. Branches of a row are neighbours: with `rows` = n, row r has r * n to r * n + n - 1."""
        raise NotImplementedError

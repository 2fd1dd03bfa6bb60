# SPDX-License-Identifier: Apache-2.0
"""A decoder maps a block to its next content.

It sees ids, mask, top token and confidence of every position and returns the next ids; that one value expresses committing
(write the top token), revoking (write the mask), editing and branching. A file of this folder is one rule; its name is the
name on the command line, its class is called `Decoder`, and its dataclass fields are its options.

A rule reads no value on the host, has no shape that depends on data, and commits at least one token of every row that has a
masked position.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastdllm.view import View


class DecoderRule:
    """`needs`: extra statistics of the head, of {"entropy", "margin"}. `probability`: the rule compares the confidence
    with a probability, so that another confidence makes no sense."""

    needs: ClassVar[frozenset[str]] = frozenset()
    probability: ClassVar[bool] = True

    def step(self, view: View) -> Tensor:
        """The next ids [R, Q]."""
        raise NotImplementedError

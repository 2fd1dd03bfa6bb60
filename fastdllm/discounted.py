# SPDX-License-Identifier: Apache-2.0
"""Any rule that ranks by confidence, with each confidence lowered by attention to what would be committed with it
(Attention-Discounted Adaptive Sampler, ADAS, arXiv 2606.10829).

Tokens that are sure one by one may be wrong together, where each was predicted without knowing the other. A position whose
query attends to another masked position depends on it, the more so the less sure that one is. So positions are taken one
after another, the surest first, and every one that is taken lowers the confidence of those that attend to it. The rule sees
these confidences in place of its own: no commit gains by it, and fewer of those that depend on each other fall together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastdllm import kernels
from fastdllm.decoders.base import DecoderRule
from fastdllm.view import View

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Discounted(DecoderRule):
    """`inner`, as the option `attention_discount` has it. weight: of the attention; the paper's is 40."""

    inner: DecoderRule
    weight: float

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs | {"attention"}

    @property
    def per_request(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.per_request

    @property
    def numbers(self) -> dict[str, float]:
        return self.inner.numbers

    @property
    def owner(self) -> Hashable:
        return self.inner.owner

    @property
    def state(self) -> Callable[..., dict[str, Tensor]] | None:  # type: ignore[override]
        return self.inner.state

    @property
    def adjust(self) -> Callable[..., Tensor] | None:  # type: ignore[override]
        return self.inner.adjust

    def of(self, numbers: Mapping[str, Tensor]) -> Self:
        return self._with({"inner": self.inner.of(numbers)})

    def checked(self, numbers: Mapping[str, float]) -> None:
        self.inner.checked(numbers)

    def step(self, view: View) -> Tensor:
        assert view.attention is not None
        seen: Any = copy.copy(view)
        seen.conf = kernels.discount(view.conf, view.masked, view.attention, self.weight)
        return self.inner.step(seen)

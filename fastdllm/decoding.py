# SPDX-License-Identifier: Apache-2.0
"""Everything that is chosen once for a run. `build.assemble(model, config)` makes it; the engine reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastdllm.blocks import Geometry

if TYPE_CHECKING:
    from fastdllm.caches.base import CachePlan
    from fastdllm.decoders.base import DecoderRule
    from fastdllm.prompt_cache import PromptCache
    from fastdllm.reuse.base import Reuse
    from fastdllm.sampling import Sampler


@dataclass(frozen=True, eq=False)
class Decoding:
    """The choices of a run; what each may be is in the folder of its kind.

    geometry: cuts an answer into blocks.
    block_length: positions of the widest block (v2: of a sub-block).
    stop_ids: a row ends once one of them is committed and no mask stands before it; () decodes to the end. A request may
        bring its own.
    block_causal: block size of a model that sees no further than its block, 0 for a bidirectional one.
    grid_at_prompt: the blocks of such a model are counted from the prompt's end.
    causal: of a model that reads its context causally.
    lookback: positions before a block that every pass recomputes with it. With a shifted model's 1, the rule also
        decides about the block's first token.
    guidance: classifier-free guidance w, 0 for none. Logits become u + (w + 1)(c - u), with u from a second lane of the same
        forward, whose prompt is masked.
    reuse: runs some layers for some positions only.
    prompt_cache: positions of prompts that are kept for prompts that begin alike (block-causal models), None for what memory
        allows, 0 for none; or the cache that keeps them beyond the run.
    key: what shapes a step; runs with equal keys replay each other's graphs. What travels with a request is left out.
    """

    geometry: Geometry
    cache: CachePlan
    decoder: DecoderRule
    sampler: Sampler
    block_length: int
    stop_ids: tuple[int, ...] = ()
    block_causal: int = 0
    grid_at_prompt: bool = False
    causal: bool = False
    lookback: int = 0
    guidance: float = 0.0
    reuse: Reuse | None = None
    prompt_cache: int | PromptCache | None = None
    key: Choices = field(init=False)

    @property
    def lanes(self) -> int:
        """Rows of the canvas that one request takes: the decoder's branches, or two under guidance."""
        return 2 if self.guidance else self.decoder.branches

    @cached_property
    def numbers(self) -> Mapping[str, float]:
        """The numbers that a request may replace by its own, with the run's values, in the canvas's order."""
        numbers = {**self.sampler.numbers, **self.decoder.numbers}
        return {**numbers, "cfg_scale": self.guidance} if self.guidance else numbers

    def __post_init__(self) -> None:
        identity = (
            _identity(self.decoder, self.decoder.per_request),
            _identity(self.sampler, (*self.sampler.numbers, "drawn", "truncated")),
            self.block_length,
            self.block_causal,
            self.grid_at_prompt,
            self.causal,
            self.lanes,
            self.reuse,
        )
        object.__setattr__(self, "key", Choices(identity, self.decoder))


@dataclass(frozen=True)
class Choices:
    """identity: what is compared. decoder: kept alive, because captured graphs point to its tensors."""

    identity: Hashable
    decoder: DecoderRule = field(compare=False)


def _identity(component: Any, without: tuple[str, ...]) -> Hashable:
    """A component's class and field values; of one that is no dataclass, or has fields without a hash, its address."""
    if not dataclasses.is_dataclass(component):
        return id(component)
    values = [getattr(component, f.name) for f in dataclasses.fields(component) if f.name not in without]
    values = [str(v.tolist()) if isinstance(v, Tensor) else v for v in values]
    values = [_identity(v, without) if dataclasses.is_dataclass(v) and not isinstance(v, type) else v for v in values]
    hashable = all(isinstance(v, Hashable) for v in values)
    return (type(component), *values) if hashable else id(component)

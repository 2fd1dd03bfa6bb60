# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies (arXiv 2104.09864), and how they are stretched: linear, Llama 3's way, YaRN (arXiv 2309.00071).

Computed in fp32 on the CPU, as transformers computes them: another device may round pow() differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdllm.models.files import Fields
from fastdllm.models.spec import POSITIONS, Stretch

KINDS = ("default", "linear", "llama3", "yarn")
# Names under which the same kind's numbers are said twice, or that only training reads.
IGNORED = {"rope_type", "type", "rope_theta", "max_position_embeddings", "finetuned"}


@dataclass(frozen=True)
class Rope:
    """What a config.json says about the rotation: the base, how it is stretched (None: not), the longest context, and which
    share of a head's channels turns."""

    theta: float
    stretch: Stretch | None
    max_length: int
    share: float = 1.0


def frequencies(dim: int, theta: float, stretch: Stretch | None) -> tuple[Tensor, float]:
    """Angle per position of each of the dim / 2 pairs, fp32 [dim / 2], and the factor on cosine and sine."""
    inverse = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if stretch is None:
        return inverse, 1.0
    if stretch.kind == "linear":
        return inverse / stretch.factor, 1.0
    if stretch.kind == "llama3":
        return _llama3(inverse, stretch), 1.0
    return _yarn(inverse, dim, theta, stretch), stretch.scale


def _llama3(inverse: Tensor, s: Stretch) -> Tensor:
    """Long waves are stretched, short ones kept, those in between mixed."""
    length = 2 * math.pi / inverse
    share = ((s.original / length - s.low) / (s.high - s.low)).clamp(0, 1)
    return (1 - share) * inverse / s.factor + share * inverse


def _yarn(inverse: Tensor, dim: int, theta: float, s: Stretch) -> Tensor:
    """Pairs that turn more than `high` times in the original context are kept, less than `low` times stretched."""

    def pair(turns: float) -> float:
        return dim * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(s.high), pair(s.low)
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - first) / max(last - first, 1e-3)).clamp(0, 1)
    kept = 1 - stretched
    return inverse / s.factor * (1 - kept) + inverse * kept


def read_rope(config: Fields, kinds: tuple[str, ...] = ("default",), partial: bool = False) -> Rope:
    """The rotation of a config.json in transformers' layout, version 4 (`rope_scaling`) or 5 (`rope_parameters`).

    partial: whether a part of each head may stay unrotated.
    Raises ValueError naming the field for a kind that is not in `kinds`, and for a field that no kind here reads.
    """
    length = config.integer("max_position_embeddings", 1, POSITIONS)
    parameters, scaling = config.inner("rope_parameters"), config.inner("rope_scaling")
    rope = parameters or scaling
    if parameters:
        given = dict(config.inner("rope_parameters"))  # read here, which leaves `rope` to account for its fields
        said = {"rope_type" if name == "type" else name: value for name, value in scaling.items()}
        if other := sorted(name for name, value in said.items() if given.get(name) != value):
            raise config.wrong("rope_scaling", f"rope_parameters has another {other[0]}")
    theta = rope.number("rope_theta", 2, 1e12, None) or config.number("rope_theta", 2, 1e12)
    if (other := config.number("rope_theta", 2, 1e12, theta)) != theta:
        raise config.wrong("rope_theta", f"{rope.where} says {theta:g}, config.json {other:g}")
    outer = config.number("partial_rotary_factor", 1e-3, 1, 1.0) if partial else 1.0
    share = rope.number("partial_rotary_factor", 0, 1, outer)
    if share != outer:
        raise rope.wrong("partial_rotary_factor", f"only {outer:g} is supported")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in kinds:
        raise rope.wrong("rope_type" if "rope_type" in rope else "type", f"supported are {', '.join(kinds)}")
    stretch, length = _read_stretch(rope, kind, length)
    if rest := sorted(rope.rest() - IGNORED):
        raise rope.wrong(rest[0], f"it is not supported for the rotation {kind!r}")
    return Rope(theta, stretch, length, share)


def _read_stretch(rope: Fields, kind: str, length: int) -> tuple[Stretch | None, int]:
    factor = rope.number("factor", 1, 1e4, 1.0)
    if kind == "default":
        if factor != 1:
            raise rope.wrong("factor", "only 1 is supported for the rotation 'default'")
        return None, length
    original = rope.integer("original_max_position_embeddings", 1, POSITIONS, length)
    if kind == "linear":
        return Stretch(kind, factor), length
    if kind == "llama3":
        low, high = rope.number("low_freq_factor", 0.01, 1e3, 1.0), rope.number("high_freq_factor", 0.01, 1e3, 4.0)
        if low >= high:
            raise rope.wrong("low_freq_factor", "it must be below high_freq_factor")
        return Stretch(kind, factor, original, low, high), length
    low, high = rope.number("beta_slow", 1e-3, 1e4, 1.0), rope.number("beta_fast", 1e-3, 1e4, 32.0)
    if low >= high:
        raise rope.wrong("beta_slow" if "beta_slow" in rope else "beta_fast", f"{low:g} turns must be fewer than {high:g}")
    if rope.number("llama_4_scaling_beta", 0, 10, 0.0):
        # Queries are scaled by 1 + beta log(1 + floor(position / original)), which is 1 up to the original length.
        length = min(length, original)
    return Stretch(kind, factor, original, low, high, rope.flag("truncate", True), _yarn_scale(rope, factor)), length


def _yarn_scale(rope: Fields, factor: float) -> float:
    """The factor on cosine and sine (YaRN's attention temperature)."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    given = rope.number("attention_factor", 1e-3, 1e3, None)
    m, all_dim = rope.number("mscale", 0, 1e3, 0.0), rope.number("mscale_all_dim", 0, 1e3, 0.0)
    if given is not None:
        return given
    return scale(m) / scale(all_dim) if m and all_dim else scale(1.0)

# SPDX-License-Identifier: Apache-2.0
"""Settings by name, chosen on the validation problems of docs/frontier.md, which has their measured lines.

`exact`: the tokens of one token per step under the same cache, in fewer forwards where that saves time. `paper`: Fast-dLLM's
published setting (arXiv 2505.22618). `balanced`: fewer forwards than that (Dream: half, since its blocks open with a step
like others) and a third of the positions. Blocks of 64 need fewer openings, which pays for a higher threshold; masks far
from the block are left out, and the prompt is refreshed at every fourth block. `fast`: the same at the published threshold.

A family whose measurements say otherwise has its own options of a preset in `OWN`. Fast-dLLM v2 decodes a block as one part,
and the pass that finishes it is the first step of the next one: a third of the forwards of threshold 0.9. `balanced` loses
nothing that the problems confirm, `fast` about a point. So a preset means something once the model is known.
"""

from __future__ import annotations

from typing import Any

from fastdllm import registry

NEAR = {"cache": "suffix_window", "suffix": 32, "keep_last": False, "refresh_blocks": 4, "block_length": 64}
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"decoder": "draft_verify", "depth": 0, "cache": "dual"},
    "paper": {"decoder": "threshold", "threshold": 0.9, "cache": "prefix"},
    "balanced": {"decoder": "threshold", "threshold": 0.97, "first_token": "rule", **NEAR},
    "fast": {"decoder": "threshold", "threshold": 0.9, "first_token": "rule", **NEAR},
}
FUSED = {"decoder": "threshold", "cache": "fused", "small_block_size": 32}
OWN: dict[str, dict[str, dict[str, Any]]] = {  # family -> preset -> what it takes instead
    "fast_dllm_v2": {"balanced": {"threshold": 0.99, **FUSED}, "fast": {"threshold": 0.95, **FUSED}},
}


def for_family(name: str, family: str, bound: bool, shifted: bool) -> dict[str, Any]:
    """The options of a preset that a family takes: its own, or those of `PRESETS` that mean something to it.

    bound: the family has its own blocks and cache, and takes the decoder. shifted: it has a choice of a block's first token.
    """
    preset = OWN.get(family, {}).get(name)
    if preset is not None:
        return dict(preset)
    preset = PRESETS[name]
    if bound:
        decoder = {"decoder", *registry.options("decoders", preset["decoder"])}
        return {k: v for k, v in preset.items() if k in decoder}
    return {k: v for k, v in preset.items() if shifted or k != "first_token"}


def variants(name: str | None) -> list[dict[str, Any]]:
    """What a preset may turn out to be, before the model is known; without a preset nothing is set."""
    if name is None:
        return [{}]
    kinds = [for_family(name, "", bound, shifted) for bound, shifted in ((False, True), (False, False), (True, True))]
    return kinds + [own[name] for own in OWN.values() if name in own]


def names(name: str | None) -> set[str]:
    """The options that a preset sets in some family."""
    return {option for variant in variants(name) for option in variant}

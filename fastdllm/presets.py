# SPDX-License-Identifier: Apache-2.0
"""Settings by name, chosen on the validation problems of docs/frontier.md, which has their measured lines.

`exact`: the tokens of one token per step under the same cache, in fewer forwards. `paper`: Fast-dLLM's published setting
(arXiv 2505.22618). `balanced`: no more forwards than that (Dream: two thirds, since its blocks open with a step like others)
and half the positions. Blocks of 64 need fewer openings, which pays for a higher threshold; masks far from the block are
left out, and the prompt is refreshed at every fourth block. `fast`: the same at the published threshold.
"""

from __future__ import annotations

from typing import Any

from fastdllm import registry

NEAR = {"cache": "suffix_window", "suffix": 32, "keep_last": False, "refresh_blocks": 4, "block_length": 64}
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"decoder": "draft_verify", "depth": 4, "cache": "dual"},
    "paper": {"decoder": "threshold", "threshold": 0.9, "cache": "prefix"},
    "balanced": {"decoder": "threshold", "threshold": 0.97, "first_token": "rule", **NEAR},
    "fast": {"decoder": "threshold", "threshold": 0.9, "first_token": "rule", **NEAR},
}


def for_family(name: str, block_causal: bool, shifted: bool) -> dict[str, Any]:
    """The options of a preset that a family takes.

    One that is bound to its own blocks and cache takes the decoder only. How a block's first token is chosen is a matter of
    shifted models.
    """
    preset = PRESETS[name]
    if block_causal:
        decoder = {"decoder", *registry.options("decoders", preset["decoder"])}
        return {k: v for k, v in preset.items() if k in decoder}
    return {k: v for k, v in preset.items() if shifted or k != "first_token"}

# SPDX-License-Identifier: Apache-2.0
"""Settings by name, chosen on the validation problems of docs/frontier.md, which has their measured lines.

`exact`: the tokens of one token per step under the same cache, in fewer forwards. `paper`: Fast-dLLM's published setting
(arXiv 2505.22618). `balanced`: no more forwards than that (Dream: two thirds, since its blocks open with a step like others)
and half the positions. Blocks of 64 need fewer openings, which pays for a higher threshold; masks far behind the block are
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
DECIDED = frozenset().union(*PRESETS.values())  # names of all options that some preset sets


def expand(given: dict[str, Any]) -> dict[str, Any]:
    """`given` with its preset's options beneath; those of a decoder or cache that `given` replaces are left out.

    An option that carries a decoder's own name selects it here too, unless it is one of the preset's decoder.
    """
    if given["preset"] not in PRESETS:
        raise ValueError(f"preset={given['preset']!r} is unknown; allowed are {', '.join(PRESETS)}")
    beneath = PRESETS[given["preset"]]
    own = registry.options("decoders", beneath["decoder"])
    selected = [k for k in given if k in registry.names("decoders") and k not in own]
    if selected and "decoder" not in given:
        given = {**given, "decoder": selected[0]}
    for kind in ("decoder", "cache"):
        if kind in beneath and given.get(kind, beneath[kind]) != beneath[kind]:
            replaced = registry.options(f"{kind}s", beneath[kind])
            beneath = {k: v for k, v in beneath.items() if k not in replaced}
    return {**beneath, **given}


def fitted(given: dict[str, Any], bidirectional: bool, shifted: bool) -> dict[str, Any]:
    """`given` with what a family can take of its preset. One that is bound to its own blocks and cache takes the decoder
    alone; how a block's first token is chosen is a matter of shifted models."""
    preset = PRESETS[given["preset"]]
    taken = {"decoder", *registry.options("decoders", preset["decoder"])}
    if bidirectional:
        taken |= preset.keys() if shifted else preset.keys() - {"first_token"}
    return {k: v for k, v in given.items() if k != "preset" and (k in taken or k not in preset or v != preset[k])}

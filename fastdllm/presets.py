# SPDX-License-Identifier: Apache-2.0
"""Settings by name, chosen from the measured frontier of docs/frontier.md.

`exact`: the tokens of one token per step under the same cache, in fewer forwards. `paper`: Fast-dLLM's published setting
(arXiv 2505.22618). `balanced`: the fewest forwards whose accuracy was not found to differ from one token per step.
`fast`: fewer still, at a cost that the table shows.
"""

from __future__ import annotations

from typing import Any

from fastdllm import registry

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"decoder": "draft_verify", "depth": 4, "cache": "dual"},
    "paper": {"decoder": "threshold", "threshold": 0.9, "cache": "prefix"},
    "balanced": {"decoder": "frechet", "delta": 0.25, "cache": "lazy", "refresh_blocks": 4},
    "fast": {"decoder": "frechet", "delta": -0.5, "cache": "lazy", "refresh_blocks": 4},
}


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

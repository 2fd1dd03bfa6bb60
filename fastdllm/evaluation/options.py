# SPDX-License-Identifier: Apache-2.0
"""The option names of the published evaluation scripts, translated into this project's.

LLaDA's, Dream's and Fast-dLLM v2's scripts name the same things differently (gen_length, max_new_tokens), and say with
several switches what is one choice here (use_cache and dual_cache are `cache`; alg is `decoder` and `confidence`). Published
commands keep working, both spellings are accepted, and contradictions are errors.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdllm import config, presets, registry
from fastdllm.fields import coerce, shown
from fastdllm.registry import Kind

ALIASES = {**config.ALIASES, "model_path": "pretrained", "model": "pretrained"}
ALIASES |= {"peft": "adapter", "lora_path": "adapter"}  # lm-eval's own name, and the one others evaluate Dream with
CONFIDENCE = {
    "remasking": {"low_confidence": "probability", "random": "random"},
    "alg": {"entropy": "entropy", "maskgit_plus": "probability", "topk_margin": "margin", "origin": "random"},
}
AUTO_BATCH = 8  # what --batch_size auto means unless --max_batch_size says otherwise
NAMES_NONE = ("cache",)  # options for which the text "none" is a name; for all others it means that they are left open
CACHE_NAMES = ("cache", "use_cache", "dual_cache", "use_block_cache")
SWITCHES = {"use_cache": bool, "dual_cache": bool, "use_block_cache": bool, "remasking": str, "alg": str}


@dataclass(frozen=True)
class HarnessOptions:
    """What an evaluation needs besides `DecodeConfig`.

    pretrained, dtype, revision, quantize, adapter, trust_remote_code: see `fastdllm.load`. save_dir: folder that keeps
    finished answers. show_speed: log what decoding cost. mc_num, is_check_greedy, likelihood: see
    `likelihood.log_likelihoods`. escape_until: read backslash-n and backslash-t in stop strings as line break and tab.
    add_bos_token: put the beginning-of-text token before prompts that lack it.
    """

    pretrained: str
    dtype: str | None = None
    revision: str | None = None
    quantize: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False
    save_dir: str | None = None
    show_speed: bool = False
    mc_num: int = 128
    is_check_greedy: bool = True
    likelihood: str | None = None
    escape_until: bool = False
    add_bos_token: bool = False


@dataclass(frozen=True)
class V2Options(HarnessOptions):
    """cot_prompt: ask for step-by-step reasoning in gsm8k and minerva_math, as the published numbers did. Off by default,
    because it changes what lm-eval reports under these tasks' names."""

    cot_prompt: bool = False


def rename(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` under this project's names, without what is None or says so. ValueError where two names of one option
    disagree."""
    return config.rename({k: v for k, v in given.items() if not _left_open(k, v)}, ALIASES)


def _left_open(name: str, value: Any) -> bool:
    """None, or its text: lm-eval makes None of `dtype=none` in Python, and leaves the text on its command line."""
    says_none = isinstance(value, str) and value.lower() == "none" and name not in NAMES_NONE
    return value is None or says_none


def parse_arguments(given: str | Mapping[str, Any], option: str = "model_args") -> dict[str, Any]:
    """ "name=value,name=value" as lm-eval reads it, but for the text none, which is the name of a cache. ValueError for a
    name that is there twice, with different values: lm-eval takes the last one."""
    if isinstance(given, Mapping):
        if unnamed := [name for name in given if not isinstance(name, str)]:
            raise ValueError(f"{option}: {unnamed[0]!r} is no name of an option")
        return dict(given)
    if not isinstance(given, str):
        raise ValueError(f"{option}={shown(given)} must be a text, name=value,name=value, or a table of names and values")
    from lm_eval.utils import simple_parse_args_string

    out: dict[str, Any] = {}
    for part in filter(None, given.strip().split(",")):
        for name, value in simple_parse_args_string(part).items():
            value = "none" if value is None and name in NAMES_NONE else value
            if out.setdefault(name, value) != value:
                raise ValueError(f"{name}={shown(out[name])} and {name}={shown(value)}; give one of them")
    return out


def latest(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` under this project's names, the last one of several spellings: a task's generation kwargs come first in it,
    and what `--gen_kwargs` adds in another spelling follows."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        if not _left_open(name, value):
            own = ALIASES.get(name, name)
            out.pop(own, None)
            out[own] = value
    return out


def merge(task: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Renamed options of a task under those that are fixed for the run. Whoever says anything of the cache says it all."""
    says_cache = any(name in fixed for name in CACHE_NAMES)
    return {**{k: v for k, v in task.items() if not (says_cache and k in CACHE_NAMES)}, **fixed}


def check_names(given: Mapping[str, Any], extra: type = HarnessOptions) -> None:
    """ValueError for a name that is known nowhere, with the nearest known one, whatever its value: `cahce=none` is none."""
    known = {*(f.name for f in dataclasses.fields(extra)), *SWITCHES, *_decode_options()}
    for name, value in given.items():
        if ALIASES.get(name, name) not in known:
            raise ValueError(config.unknown(name, value, known))


def split(given: Mapping[str, Any], extra: type = HarnessOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of `extra`, the rest) of renamed options, the former coerced to their declared types.

    ValueError for a name that is known nowhere, with the nearest known one.
    """
    hints = typing.get_type_hints(extra)
    fields = [f.name for f in dataclasses.fields(extra)]
    check_names(given, extra)
    # lm-eval guesses types: a model folder called 2026 arrives as a number.
    own = {k: coerce(k, str(v) if hints[k] in (str, str | None) else v, hints[k]) for k, v in given.items() if k in fields}
    return own, {k: v for k, v in given.items() if k not in fields}


def _decode_options() -> set[str]:
    components = [registry.settable(kind, name) for kind in (Kind.DECODERS, Kind.CACHES) for name in registry.names(kind)]
    return set(config.OPTIONS).union(*components) - {"geometry"}


def decode_options(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Renamed options, the published switches among them, as `DecodeConfig` takes them.

    `defaults` (in the same spelling) fill what `given` leaves open. ValueError where switches contradict each other.
    """
    given = {k: coerce(k, v, SWITCHES[k]) if k in SWITCHES else v for k, v in given.items()}
    out = {k: v for k, v in given.items() if k not in SWITCHES}
    cache = _cache(given)
    if cache is not None:
        if out.get("cache", cache) != cache:
            raise ValueError(f"cache={out['cache']!r} and use_cache, dual_cache or use_block_cache; give one of them")
        out["cache"] = cache
    for switch, names in CONFIDENCE.items():
        value = given.get(switch)
        if value is None:
            continue
        if switch == "alg" and value == "confidence_threshold":
            if out.setdefault("decoder", "threshold") != "threshold":
                raise ValueError(f"alg={value!r} is decoder='threshold', not {out['decoder']!r}")
            continue
        if value not in names:
            allowed = [*names, "confidence_threshold"] if switch == "alg" else names
            raise ValueError(f"{switch}={value!r} is unknown; allowed are {', '.join(allowed)}")
        if out.setdefault("confidence", names[value]) != names[value]:
            raise ValueError(f"{switch}={value!r} is confidence={names[value]!r}, not {out['confidence']!r}")
        if switch == "alg" and out.setdefault("decoder", "quota") != "quota":
            raise ValueError(f"alg={value!r} is decoder='quota', not {out['decoder']!r}; leave alg out")
    preset = out["preset"] if out.get("preset") in presets.PRESETS else None  # an unknown one is refused by DecodeConfig
    beneath = [variant.get("decoder", defaults.get("decoder", "threshold")) for variant in presets.variants(preset)]
    decoders = [config.selected_decoder(out, decoder) for decoder in beneath]
    for name, value in defaults.items():
        if name in presets.names(preset) or (name == "decoder" and value not in decoders):
            continue
        # A default confidence is meant for fixed schedules: thresholds and the like compare probabilities.
        if name == "confidence" and any(registry.find(Kind.DECODERS, decoder).probability for decoder in decoders):
            continue
        out.setdefault(name, value)
    return out


def _cache(given: Mapping[str, Any]) -> str | None:
    """What the published cache switches say, None when none of them is given."""
    use, dual, block = (given.get(name) for name in ("use_cache", "dual_cache", "use_block_cache"))
    if block is not None:
        if use is not None or dual is not None:
            raise ValueError(
                "use_block_cache is Fast-dLLM v2's, use_cache and dual_cache are LLaDA's and Dream's; give one kind"
            )
        return "sub_block" if block else "block"
    if dual:
        if use is False:
            raise ValueError("dual_cache=True contradicts use_cache=False")
        return "dual"
    return None if use is None and dual is None else "prefix" if use else "none"


def read_batch_size(value: int | str | None, largest: int | None = None) -> int:
    """`--batch_size` as a number: "8", 8, "auto" or "auto:4" (then `--max_batch_size`, or 8)."""
    if value is None:
        return 1
    if isinstance(value, str) and re.fullmatch(r"auto(:\d+(\.\d*)?)?", value):
        return largest or AUTO_BATCH
    try:
        size = coerce("batch_size", value, int)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size={shown(value)} must be a number of at least 1, auto or auto:N")
    return size

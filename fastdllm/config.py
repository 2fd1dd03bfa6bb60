# SPDX-License-Identifier: Apache-2.0
"""Every option of a run, strict: an unknown name or a bad value is an error that says what is allowed.

Options arrive from Python, from lm-eval's command line (which guesses types: -1 may come as -1.0, 256 as "256") and from web
forms (floats everywhere), so each value is coerced by its declared type, once, here.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdllm import registry
from fastdllm.presets import DECIDED, expand
from fastdllm.sampling import CONFIDENCES
from fastdllm.schedules import SCHEDULES


@dataclass(frozen=True, init=False)
class DecodeConfig:
    """Options of `fastdllm.generate`. None means the family's default.

    The options of the chosen decoder and cache (their dataclass fields: `threshold`, `strict`, `factor`, ...) are given by
    name like all others and kept in `options`. An option that carries a decoder's own name selects it: `factor=1.0` means
    `decoder="factor"`.

    preset: a setting by name (`presets.py`); what is given beside it goes before it, and v2 takes its decoder alone.
    gen_length: new positions per prompt (published scripts: 256). block_length: positions decoded together (32 in
    Fast-dLLM's scripts; bd_size in v2). small_block_size: v2's sub-block (8). steps: denoising steps of the whole answer
    for fixed-step decoding (`quota`), default one per token; adaptive decoders ignore it. cache: default "dual" for
    LLaDA and Dream, "block" for v2. decoder: default "threshold" at 0.9. schedule: of `quota`; default "even" (LLaDA,
    v2), "timesteps" (Dream). confidence, temperature, top_p, top_k, alg_temp: see `sampling.Sampler`. cfg_scale:
    classifier-free guidance, cache "none" only (LLaDA's `generate.py`; 0 is off). seed: row i draws from seed + i.
    stop_ids: default the model's; () never stops early. batch_size: prompts on the canvas at once, default all. runner:
    default "cuda_graph" on CUDA, else "eager". first_token: of Dream's blocks; "forced" commits it from the opening
    pass, as published, "rule" leaves it to the decoder. reuse_k, layer_subset, reuse_mode, trim_ratio, trim_drift: layer
    reuse and TRIM of v2, see `fastdllm/reuse`; reuse_k=1 is none.
    """

    preset: str | None = None
    gen_length: int = 256
    block_length: int | None = None
    small_block_size: int = 8
    steps: int | None = None
    cache: str | None = None
    decoder: str = "threshold"
    schedule: str | None = None
    confidence: str = "probability"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float = 0.0
    cfg_scale: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None
    batch_size: int | None = None
    runner: str | None = None
    first_token: str = "forced"
    reuse_k: int = 1
    layer_subset: str | None = None
    reuse_mode: str = "delta"
    trim_ratio: float | None = None
    trim_drift: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __init__(self, **given: Any) -> None:
        hints = typing.get_type_hints(DecodeConfig)
        own = {f.name for f in dataclasses.fields(DecodeConfig)} - {"options"}
        given = {k: v for k, v in given.items() if v is not None}
        if "preset" in given:
            given = expand(given)
        if isinstance(given.get("layer_subset"), list | tuple | int):
            chosen = given["layer_subset"]
            given["layer_subset"] = str(chosen) if isinstance(chosen, int) else "+".join(map(str, chosen))
        if "decoder" not in given:
            selected = [k for k in given if k not in own and k in registry.names("decoders")]
            given["decoder"] = selected[0] if selected else "threshold"
        types_of = {**{k: hints[k] for k in own}, **registry.options("decoders", given["decoder"])}
        if "cache" in given:
            types_of |= registry.options("caches", given["cache"])
        values = {}
        for name, value in given.items():
            if name not in types_of:
                raise ValueError(_unknown(name, value, types_of, given))
            values[name] = coerce(name, value, types_of[name])
        for f in dataclasses.fields(DecodeConfig):
            if f.name != "options":
                object.__setattr__(self, f.name, values.get(f.name, f.default))
        object.__setattr__(self, "options", {k: v for k, v in values.items() if k not in own})
        self._check()

    def _check(self) -> None:
        at_least = dict.fromkeys(
            ("gen_length", "block_length", "small_block_size", "steps", "batch_size", "reuse_k"), 1
        ) | dict.fromkeys(("top_k", "temperature", "alg_temp", "cfg_scale"), 0)
        for name, low in at_least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}={value} must be at least {low}")
        allowed = {
            "confidence": CONFIDENCES,
            "schedule": tuple(SCHEDULES),
            "runner": registry.names("runners"),
            "first_token": ("forced", "rule"),
            "reuse_mode": ("delta", "output"),
        }
        for name, values in allowed.items():
            if getattr(self, name) is not None and getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; allowed are {', '.join(values)}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.trim_ratio is not None and not 0 <= self.trim_ratio <= 1:
            raise ValueError(f"trim_ratio={self.trim_ratio} must lie in [0, 1]")
        if self.trim_drift is not None and not 0 <= self.trim_drift <= 2:
            raise ValueError(f"trim_drift={self.trim_drift} must lie in [0, 2]")
        if self.trim_ratio is not None and self.trim_drift is not None:
            raise ValueError(f"trim_ratio={self.trim_ratio} and trim_drift={self.trim_drift} exclude each other")
        if self.reuse_k > 1 and self.layer_subset is None:
            raise ValueError(
                f"reuse_k={self.reuse_k} needs layer_subset: first, middle, last or layer indices such as '2+3'"
            )
        # Following timesteps, more steps than tokens are another plan than one token a step, and Dream's users ask for it.
        spread = self.schedule in ("timesteps", "cosine")
        if self.steps is not None and self.decoder == "quota" and self.steps > self.gen_length and not spread:
            raise ValueError(f"steps={self.steps} must be at most gen_length={self.gen_length}")
        if registry.find("decoders", self.decoder).probability and self.confidence != "probability":
            raise ValueError(
                f"confidence={self.confidence!r} has no meaning for decoder={self.decoder!r}, which compares probabilities; "
                "use decoder='quota' or confidence='probability'"
            )
        if self.cfg_scale and self.cache not in (None, "none"):
            raise ValueError(f"cfg_scale={self.cfg_scale} needs cache='none', not {self.cache!r}")

    def replace(self, **changes: Any) -> DecodeConfig:
        """A copy with some options changed (None resets one to its default; a preset replaces whatever presets decide)."""
        chosen = {*DECIDED, *self.options} if changes.get("preset") else ()
        return DecodeConfig(**{**{k: v for k, v in self.given().items() if k not in chosen}, **changes})

    def given(self) -> dict[str, Any]:
        """Every option by name, as the constructor takes them."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "options"}
        return {**own, **self.options}


DecodeConfig.__signature__ = inspect.Signature(
    [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(DecodeConfig)
        if f.name != "options"
    ]
    + [inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)]
)


def _unknown(name: str, value: Any, known: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    for kind in ("decoders", "caches"):
        owners = [n for n in registry.names(kind) if name in registry.options(kind, n)]
        if owners:
            chosen = given.get(kind[:-1], "the family's default")
            return f"{name}={value!r} is an option of {kind[:-1]} {' or '.join(owners)}, but {kind[:-1]} is {chosen!r}"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown option {name}={value!r}; {hint}allowed are {', '.join(sorted(known))}"


def coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` as the declared type `kind` (int, float, bool, str, tuple[int, ...], or a union of one with None)."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        # lm-eval may hand over the text "None" for a number; for a text option "none" is a name (cache="none").
        if value is None or (kind is not str and isinstance(value, str) and value.lower() == "none"):
            return None
    try:
        if typing.get_origin(kind) is tuple:
            items = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
            return tuple(coerce(name, v, typing.get_args(kind)[0]) for v in items)
        if kind is bool:
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            return words[str(value).lower().removesuffix(".0")]
        if kind is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        # Not a number passes every comparison of a range check.
        if kind is float and not isinstance(value, bool) and not math.isnan(float(value)):
            return float(value)
        if kind is str and isinstance(value, str):
            return value
    except (TypeError, ValueError, KeyError, OverflowError):
        pass
    raise ValueError(f"{name}={value!r} must be of type {kind.__name__ if isinstance(kind, type) else kind}")

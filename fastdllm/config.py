# SPDX-License-Identifier: Apache-2.0
"""Every option of a run, strict: an unknown name or a bad value is an error that says what is allowed.

Options arrive from Python, from lm-eval's command line (which guesses types: -1 may come as -1.0, 256 as "256") and from web
forms (floats everywhere), so each value is coerced by its declared type, once, here. What a model makes of the options (its
family's defaults, what it takes of a preset) is `build.resolve`'s to say.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from fastdllm import fields, presets, registry
from fastdllm.fields import LEAST_TEMPERATURE, Bounds, coerce, shown
from fastdllm.presets import PRESETS
from fastdllm.prompt_cache import PromptCache
from fastdllm.registry import Kind
from fastdllm.sampling import CONFIDENCES
from fastdllm.schedules import SCHEDULES

# Spellings of transformers, of OpenAI's protocol and of the published scripts.
ALIASES = {
    "max_new_tokens": "gen_length",
    "max_gen_toks": "gen_length",
    "max_tokens": "gen_length",
    "max_completion_tokens": "gen_length",
    "diffusion_steps": "steps",
    "bd_size": "block_length",
    "block_size": "block_length",
    "cfg": "cfg_scale",
}
# What people ask for under names of other libraries, where the answer is another option or another place.
ELSEWHERE = {
    "max_length": "gen_length counts the new tokens only, without the prompt",
    "min_length": "stop_ids=() always writes gen_length tokens",
    "min_new_tokens": "stop_ids=() always writes gen_length tokens",
    "stop": "stop strings are the argument stop of fastdllm.generate, stream and stream_text",
    "stop_strings": "stop strings are the argument stop of fastdllm.generate, stream and stream_text",
    "until": "stop strings are the argument stop of fastdllm.generate, stream and stream_text",
    "stopping_criteria": "stop takes texts, stop_ids token ids, and fastdllm.stream can be left at any step",
    "eos_token_id": "stop_ids takes the token ids that end an answer",
    "stop_token": "stop_ids takes the token ids that end an answer",
    "do_sample": "temperature=0 takes the most likely token, above 0 tokens are drawn",
    "num_beams": "there is no beam search; decoder='draft_verify' and 'lopa' try several branches",
    "num_return_sequences": "it is an argument of fastdllm.generate and fastdllm.stream",
    "n": "num_return_sequences is an argument of fastdllm.generate and fastdllm.stream",
    "attention_mask": "it is an argument of fastdllm.generate and fastdllm.stream",
    "input_ids": "it is another name of the prompts of fastdllm.generate and fastdllm.stream",
    "constraints": "it is an argument of fastdllm.generate, stream, stream_text and watch",
    "trace": "it is an argument of fastdllm.generate",
    "sampling_params": "its fields are arguments here: temperature, top_p, top_k, max_tokens, stop, n, seed",
    "streamer": "fastdllm.stream_text yields text, fastdllm.stream every step",
    "stream": "fastdllm.stream_text yields text, fastdllm.stream every step",
    "progress": "it is an argument of fastdllm.generate",
    "guidance_scale": "classifier-free guidance is cfg_scale",
    "num_steps": "the number of denoising steps is steps",
    "num_inference_steps": "the number of denoising steps is steps",
    "logits_processor": "a decoder of your own may change logits (`adjust`): decoder=MyRule()",
    "repetition_penalty": "a decoder of your own may change logits (`adjust`): decoder=MyRule()",
    "enable_prefix_caching": "prompt_cache=0 keeps no blocks of earlier prompts",
    "use_cache": "cache='prefix', or 'none'",
    "dual_cache": "cache='dual'",
    "use_block_cache": "cache='sub_block', or 'block'",
    "if_cache_position": "cache='dual'",
    "remasking": "confidence='probability' or 'random'",
    "alg": "decoder='quota' with confidence='entropy', 'probability', 'margin' or 'random'",
    "dtype": "it is an argument of fastdllm.load",
    "torch_dtype": "dtype is an argument of fastdllm.load",
    "device": "it is an argument of fastdllm.load",
    "device_map": "device is an argument of fastdllm.load",
    "quantize": "it is an argument of fastdllm.load",
}
STEPPED = ("steps", "schedule")  # options that a decoder with a fixed number of steps heeds, and no other does

Name = Any  # a name, or an object or class of that kind
Call = Any  # blocks.Geometry


class DecodeConfig:
    """Options of `fastdllm.generate`, given by name; immutable, hashable, equal when the same was given.

    It keeps what was given. An attribute has the value that was given, else the preset's, else the default. It is None where
    that depends on the model's family, and `fastdllm.build.resolve(model.spec, config)` fills it in. The options of the
    chosen decoder and cache (docs/decoders.md, docs/caches.md) are given by name like all others.

    * What is given overrides the preset, and the preset overrides the family's defaults.
    * An option that carries a decoder's name selects it: `factor=1.0` means `decoder="factor"`. `steps` or `schedule`
      without a decoder mean `decoder="quota"`, which keeps to a number of steps. Adaptive decoders do not heed them, and a
      warning says so.
    * A decoder or cache may be a name, an object (`decoder=MyRule(0.8)`), or a class, whose fields are options then.
    * Other spellings are understood:
    {aliases}

    Raises ValueError, naming the option, the value and what is allowed.

    {table}
    """

    preset: Annotated[str | None, "A setting by name.", Bounds(choices=tuple(PRESETS))] = None
    gen_length: Annotated[int, "New positions per prompt.", Bounds(1)] = 256
    block_length: Annotated[
        int | None, "Positions decoded together; for v2 the size of its blocks.", Bounds(1, at_most="context")
    ] = None
    small_block_size: Annotated[int, "Sub-blocks that v2 decodes its blocks in.", Bounds(1, at_most="block_length")] = 8
    geometry: Annotated[Call, "How an answer is cut into blocks, a function (prompt, total) -> list of `Block`."] = None
    cache: Annotated[Name, "What is kept between forwards.", Bounds(choices=partial(registry.names, Kind.CACHES))] = None
    decoder: Annotated[Name, "Which tokens a forward commits.", Bounds(choices=partial(registry.names, Kind.DECODERS))] = (
        "threshold"
    )
    lossless: Annotated[
        int,
        "Branches that save forwards and change no token; 1 is none, 0 as many as pay.",
        Bounds(0, at_most="block_length"),
    ] = 1
    attention_discount: Annotated[
        float, "Lowers a confidence by attention to what is committed with it (ADAS: 40); 0 is none.", Bounds(0)
    ] = 0.0
    steps: Annotated[int | None, "Forwards for the whole answer, of decoder quota; default one a token.", Bounds(1)] = None
    schedule: Annotated[str | None, "How decoder quota spreads tokens over its steps.", Bounds(choices=tuple(SCHEDULES))] = (
        None
    )
    confidence: Annotated[str, "What ranks positions: the first to be committed has most.", Bounds(choices=CONFIDENCES)] = (
        "probability"
    )
    temperature: Annotated[float, "0 takes the most likely token; above 0 tokens are drawn.", Bounds(0)] = 0.0
    top_p: Annotated[float | None, "Draws come from the likeliest tokens, of this sum.", Bounds(0, 1, True)] = None
    top_k: Annotated[int | None, "Draws come from so many of the likeliest tokens; 0 is no limit.", Bounds(0)] = None
    alg_temp: Annotated[float, "Randomness in the order of positions (Dream's); 0 is none.", Bounds(0)] = 0.0
    cfg_scale: Annotated[float, "Classifier-free guidance, with cache none only; 0 is off.", Bounds(0, 1000)] = 0.0
    seed: Annotated[int, "Of the draws; row i draws from seed + i.", Bounds(-(2**62), 2**62)] = 0
    stop_ids: Annotated[tuple[int, ...] | None, "Tokens that end an answer; () never stops early."] = None
    batch_size: Annotated[int | None, "Prompts decoded together; default what memory allows, up to 64.", Bounds(1)] = None
    prompt_cache: Annotated[
        int | None,
        "Positions kept for prompts that begin alike; default what fits, 0 none; or a PromptCache.",
        Bounds(0),
    ] = None
    runner: Annotated[
        str | None,
        "How a forward is executed; cuda_graph on a GPU, else eager.",
        Bounds(choices=partial(registry.names, Kind.RUNNERS)),
    ] = None
    first_token: Annotated[
        str,
        "Of Dream's blocks: forced by the opening pass (published) or left to the rule.",
        Bounds(choices=("forced", "rule")),
    ] = "forced"
    reuse_k: Annotated[int, "Layer reuse of v2: every so many passes all layers run; 1 is none.", Bounds(1)] = 1
    layer_subset: Annotated[str | None, "Layers that reuse: first, middle, last, or indices such as 2+3."] = None
    reuse_mode: Annotated[str, "What a layer reuses.", Bounds(choices=("delta", "output"))] = "delta"
    trim_ratio: Annotated[float | None, "Share of positions that run all the same.", Bounds(0, 1)] = None
    trim_drift: Annotated[float | None, "Drift from which positions run all the same.", Bounds(0, 2)] = None

    _given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        given = {name: value for name, value in rename(given).items() if value is not None}
        if "preset" in given:
            OPTIONS["preset"].bounds.check("preset", given["preset"])
        layers = presets.variants(given.get("preset"))
        chosen = [_chosen(given, layer) for layer in layers]
        known: dict[str, fields.Option] = {}
        for choice in chosen:
            known = {**known_options(choice["decoder"], choice["cache"]), **known}
        for name, value in given.items():
            if name not in known:
                raise ValueError(unknown(name, value, known, _agreed(chosen)))
            given[name] = _checked(known[name], value)
        possible = [merge(given, layer) for layer in layers]
        vars(self).update(_agreed(possible), _given=given)
        _cross_check_any(possible)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"DecodeConfig has no option {name!r} with decoder={self.name_of('decoder')}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot assign {name!r}; config.replace({name}=...) makes a changed copy")

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete {name!r}; config.replace({name}=None) resets it")

    def __eq__(self, other: object) -> bool:
        return fields.same(self._given, other._given) if isinstance(other, DecodeConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset((name, _hashable(value)) for name, value in self._given.items()))

    def __repr__(self) -> str:
        return f"DecodeConfig({', '.join(f'{name}={shown(value)}' for name, value in self._given.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._given,)

    def given(self) -> dict[str, Any]:
        """What was given, by this project's names: `DecodeConfig(**config.given()) == config`."""
        return dict(self._given)

    def name_of(self, option: str) -> str | None:
        """The name of the decoder, cache or runner that the option of that name chooses; None where it is left open."""
        chosen = vars(self).get(option)
        return None if chosen is None else registry.name_of(chosen)

    def replace(self, **changes: Any) -> DecodeConfig:
        """A copy with some options changed; None resets one to its default.

        The latest wish counts: an option named like a decoder selects it, a preset replaces what was given of the options it
        sets, and what only the decoder or cache before had is left out.
        """
        changes = rename(changes)
        wished = {name: value for name, value in changes.items() if value is not None}
        kept = {name: value for name, value in self._given.items() if name not in changes}
        preset: dict[str, Any] = {}
        if "preset" in wished:
            OPTIONS["preset"].bounds.check("preset", wished["preset"])
            preset = _agreed(presets.variants(wished["preset"]))
            kept = {k: v for k, v in kept.items() if k not in preset}
        for kind in (Kind.DECODERS, Kind.CACHES):
            for layer in presets.variants(self._given.get("preset")):
                kept = _without_other(kind, _chosen(self._given, layer)[kind.option], kept, changes, preset)
        return DecodeConfig(**kept, **wished)

    __replace__ = replace


def _without_other(
    kind: Kind, before: Any, kept: dict[str, Any], changes: Mapping[str, Any], preset: Mapping[str, Any]
) -> dict[str, Any]:
    """`kept` without the options of the decoder or cache `before`, as far as `changes` choose another one."""
    name = kind.option
    wished = {k: v for k, v in changes.items() if v is not None}
    after = wished.get(name, preset.get(name, None if changes.get(name, 0) is None else before))
    if kind is Kind.DECODERS:
        after = selected_decoder(wished, after)
    if fields.same(after, before) and name not in preset:
        return kept
    old, new = registry.settable(kind, before), registry.settable(kind, after)
    anew = name in preset or (name in changes and changes[name] is None)
    out = {k: v for k, v in kept.items() if k != name and (k not in old or (k in new and not anew))}
    if kind is Kind.DECODERS and not keeps_to_steps(after):
        out = {k: v for k, v in out.items() if k not in STEPPED}
    return out


def _rebuild(given: dict[str, Any]) -> DecodeConfig:
    return DecodeConfig(**given)


def _hashable(value: Any) -> Any:
    """The value, or its type where it cannot be hashed (an object of a class that is no frozen dataclass), or hashes by
    address what is compared by content (one that holds tensors)."""
    if fields.holds_array(value):
        return type(value)
    try:
        hash(value)
    except TypeError:
        return type(value)
    return value


def rename(given: Mapping[str, Any], aliases: Mapping[str, str] = ALIASES) -> dict[str, Any]:
    """`given` under this project's names. ValueError where two names of one option disagree."""
    out: dict[str, Any] = {}
    source: dict[str, str] = {}
    for name, value in given.items():
        own = aliases.get(name, name)
        if own in out and not fields.same(out[own], value):
            raise ValueError(
                f"{source[own]}={shown(out[own])} and {name}={shown(value)} are the same option; give one of them"
            )
        out[own], source[own] = value, name
    return out


def keeps_to_steps(decoder: Any) -> bool:
    """Whether a decoder follows a schedule of a fixed number of steps (`build.py` fills in its field `counts`)."""
    return isinstance(decoder, str | type) and "counts" in registry.field_names(registry.class_of(Kind.DECODERS, decoder))


def without_effect(given: Mapping[str, Any], decoder: Any) -> str:
    """What to say of steps and a schedule among the options given, where the decoder does not heed them; "" elsewhere.

    They are no error: the published commands give steps with a threshold, which takes their place.
    """
    values = {name: given[name] for name in STEPPED if name in given}
    if not values or keeps_to_steps(decoder):
        return ""
    named = " and ".join(f"{name}={shown(value)}" for name, value in values.items())
    verb = "has" if len(values) == 1 else "have"
    rule = registry.name_of(decoder)
    return f"{named} {verb} no effect: decoder={rule!r} takes as many forwards as an answer needs; 'quota' keeps to steps"


def selected_decoder(given: Mapping[str, Any], beneath: Any = "threshold") -> Any:
    """The decoder that options choose over `beneath` (a preset's, an evaluation's, or the one before).

    It is `decoder` itself where that is given. Else it is the decoder whose name an option carries, unless `beneath` has an
    option of that name. Else, where steps or a schedule are given, it is one that keeps to them.
    """
    beneath = "threshold" if beneath is None else beneath
    if given.get("decoder") is not None:
        return given["decoder"]
    own = registry.settable(Kind.DECODERS, beneath)
    for name in given:
        if name in registry.names(Kind.DECODERS) and name not in OPTIONS and name not in own:
            return name
    if any(name in given for name in STEPPED) and not any(name in given for name in own) and not keeps_to_steps(beneath):
        return "quota"
    return beneath


def known_options(decoder: Any, cache: Any) -> dict[str, fields.Option]:
    """All options by name, with those of this decoder and cache."""
    out = dict(OPTIONS)
    for kind, chosen in ((Kind.DECODERS, decoder), (Kind.CACHES, cache)):
        own = registry.settable(kind, chosen)
        if twice := sorted(own.keys() & {*out, *dir(DecodeConfig)}):
            raise ValueError(
                f"{kind.option} {registry.name_of(chosen)} declares {twice[0]!r}, a name of DecodeConfig; rename it"
            )
        out |= own
    return out


def _chosen(given: Mapping[str, Any], beneath: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder and the cache of options over those beneath them."""
    decoder = selected_decoder(given, beneath.get("decoder", "threshold"))
    return {"decoder": decoder, "cache": given.get("cache", beneath.get("cache"))}


def _agreed(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every option of some options, with the value that they have in common; None where they differ."""
    first, *others = layers
    names = dict.fromkeys(name for layer in layers for name in layer)
    return {n: first.get(n) if all(n in o and fields.same(o[n], first.get(n)) for o in others) else None for n in names}


def merge(given: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Every option's value: the declared default, then each layer's (the lowest first), then what is given.

    What a layer says of its decoder or cache is left out where another one is chosen.
    """
    beneath: dict[str, Any] = {}
    for layer in layers:
        beneath |= layer
    chosen = _chosen(given, beneath)
    known = known_options(chosen["decoder"], chosen["cache"])
    out = {name: option.default for name, option in known.items()}
    for layer in layers:
        others: set[str] = set()
        for kind in (Kind.DECODERS, Kind.CACHES):
            named = layer.get(kind.option)
            if named is not None and not fields.same(named, chosen[kind.option]):
                others.update(registry.settable(kind, named))
        out |= {k: v for k, v in layer.items() if k in known and k not in others}
    return {**out, **given, **chosen}


def _checked(option: fields.Option, value: Any) -> Any:
    """A given value, coerced and within its bounds."""
    name = option.name
    if name in ("decoder", "cache"):
        registry.class_of(Kind(name), value)  # it is one of them
        return value
    if name == "geometry":
        if not callable(value):
            raise ValueError(f"geometry={shown(value)} must be a function (prompt, total) -> list of blocks.Block")
        return value
    if name == "prompt_cache" and isinstance(value, PromptCache):
        return value
    if name == "layer_subset" and (isinstance(value, list | tuple) or fields.is_integer(value)):
        value = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    value = coerce(name, value, option.kind)
    if value is not None:
        option.bounds.check(name, value)
    return value


def _cross_check_any(possible: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where options contradict each other whatever the model's family makes of the preset."""
    errors = []
    for values in possible:
        try:
            cross_check(values)
        except ValueError as error:
            errors.append(error)
    if len(errors) == len(possible):
        raise errors[0]


def cross_check(values: Mapping[str, Any]) -> None:
    """Raise ValueError where options contradict each other, naming both."""
    for name in ("temperature", "alg_temp"):
        if 0 < values[name] < LEAST_TEMPERATURE:
            raise ValueError(f"{name}={values[name]} must be 0 or at least {LEAST_TEMPERATURE:g}")
    if values["trim_ratio"] is not None and values["trim_drift"] is not None:
        raise ValueError(f"trim_ratio={values['trim_ratio']} and trim_drift={values['trim_drift']} exclude each other")
    if values["reuse_k"] > 1 and values["layer_subset"] is None:
        raise ValueError(
            f"reuse_k={values['reuse_k']} needs layer_subset: first, middle, last or layer indices such as '2+3'"
        )
    decoder, cache = values["decoder"], values["cache"]
    if registry.class_of(Kind.DECODERS, decoder).probability and values["confidence"] != "probability":
        raise ValueError(
            f"confidence={values['confidence']!r} has no meaning for decoder={registry.name_of(decoder)!r}, which compares "
            "probabilities; use decoder='quota' or confidence='probability'"
        )
    if values["cfg_scale"] and cache not in (None, "none"):
        preset = values["preset"]
        sets = preset and cache in [variant.get("cache") for variant in presets.variants(preset)]
        of = f", which preset={preset!r} sets" if sets else ""
        raise ValueError(f"cfg_scale={values['cfg_scale']} needs cache='none', not {registry.name_of(cache)!r}{of}")
    for kind, chosen in ((Kind.DECODERS, decoder), (Kind.CACHES, cache)):
        own = registry.settable(kind, chosen)
        if own and own.keys() == registry.field_names(registry.class_of(kind, chosen)):
            make(kind, chosen, values)  # it checks the values of its fields


def make(kind: Kind, chosen: Any, values: Mapping[str, Any], **filled: Any) -> Any:
    """The decoder or cache that was chosen: the object itself, else one of that name or class with its options."""
    if not isinstance(chosen, str | type):
        return chosen
    own = registry.settable(kind, chosen)
    return registry.class_of(kind, chosen)(**{name: values[name] for name in own}, **filled)


def nearest(name: str, known: Iterable[str], show: str = "{!r}") -> str:
    """ "did you mean ...? ", or nothing where no known name is close."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return f"did you mean {show.format(near[0])}? " if near else ""


def unknown(name: str, value: Any, known: Iterable[str], chosen: Mapping[str, Any] | None = None) -> str:
    """What to say of an option that is not known: whose it is, what it is called here, or what is close to it.

    chosen: the decoder and the cache of the run, where they are known.
    """
    for kind in (Kind.DECODERS, Kind.CACHES) if chosen is not None else ():
        at = chosen.get(kind.option)
        if at is not None and not isinstance(at, str | type) and name in registry.field_names(type(at)):
            return f"{name}={shown(value)} belongs into the object: {kind.option}={registry.name_of(at)}({name}=...)"
        owners = [n for n in registry.names(kind) if name in registry.settable(kind, n)]
        if owners:
            taken = "the family's default" if at is None else repr(registry.name_of(at))
            of = f"{kind.option} {' or '.join(owners)}"
            return f"{name}={shown(value)} is an option of {of}, but {kind.option} is {taken}"
    if name in ELSEWHERE:
        return f"unknown option {name}={shown(value)}: {ELSEWHERE[name]}"
    near = difflib.get_close_matches(name, sorted({*known, *ALIASES, *ELSEWHERE}), n=1, cutoff=0.7)
    if near and near[0] in ELSEWHERE:
        return f"unknown option {name}={shown(value)}; did you mean {near[0]!r}? {ELSEWHERE[near[0]]}"
    hint = nearest(name, {*known, *ALIASES})
    return f"unknown option {name}={shown(value)}; {hint}allowed are {', '.join(sorted(known))}"


def _spellings() -> str:
    """The aliases of each option, a line each."""
    found: dict[str, list[str]] = {}
    for alias, own in ALIASES.items():
        found.setdefault(own, []).append(alias)
    return "\n".join(f"  {own}: {', '.join(aliases)}" for own, aliases in found.items())


def _documented() -> str:
    """One line an option, for `help(DecodeConfig)`."""
    width = max(map(len, OPTIONS))
    lines = []
    for option in OPTIONS.values():
        default = "" if option.default is None else f" (default {option.default})"
        lines.append(f"{option.name:<{width}}  {option.doc.rstrip('.')}{default}.")
    return "\n".join(lines)


OPTIONS: dict[str, fields.Option] = {
    name: option for name, option in fields.read(DecodeConfig).items() if not name.startswith("_")
}
DecodeConfig.__doc__ = inspect.cleandoc(DecodeConfig.__doc__ or "").format(aliases=_spellings(), table=_documented())
DecodeConfig.__signature__ = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.kind)
        for name, option in OPTIONS.items()
    ]
    + [inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)]
)

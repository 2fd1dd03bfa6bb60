# SPDX-License-Identifier: Apache-2.0
"""The one place that turns names into objects: a model and a config become a `Decoding`, and a runner to execute it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fastdllm import config as configs
from fastdllm import fields, presets, registry
from fastdllm.blocks import Block, Geometry, Progress, causal_aligned, grid_aligned, prompt_aligned, sliding
from fastdllm.config import DecodeConfig
from fastdllm.decoding import Decoding
from fastdllm.discounted import Discounted
from fastdllm.lossless import Over
from fastdllm.models import Model
from fastdllm.models.spec import ModelSpec
from fastdllm.registry import Kind
from fastdllm.reuse import LayerReuse, subset_layers
from fastdllm.runners.base import Runner
from fastdllm.sampling import Sampler
from fastdllm.schedules import SCHEDULES

RUNNERS: WeakKeyDictionary[Model, dict[str, Runner]] = WeakKeyDictionary()
BLOCK_LENGTH = 32  # of a family that names none
SHORT_PROMPT = 128  # tokens, where something is chosen before prompts are known
OVERSHOOT = 512  # positions beyond the context that the last block of a block-causal model may reach


def resolve(spec: ModelSpec, config: DecodeConfig) -> DecodeConfig:
    """The config with every option filled in: the family's defaults < the preset < what was given.

    The result names no preset, and resolves to itself. A default or a preset's value that exceeds what the model or the
    block allows, or does not divide the block as it must, is cut to one that does; the same value given is a ValueError, as
    are options that this family cannot run.
    """
    given = config.given()
    family = {"block_length": BLOCK_LENGTH, **spec.defaults}
    if config.cfg_scale:
        family["cache"] = "none"
    bound = bool(spec.block_causal) or spec.causal_context
    preset = given.pop("preset", None)
    values = configs.merge(given, family, presets.for_family(preset, spec.family, bound, bool(spec.shift)) if preset else {})
    configs.cross_check({**values, "preset": preset})
    if values["gen_length"] >= spec.max_length and "gen_length" in given:
        raise ValueError(
            f"gen_length={values['gen_length']} leaves no room for a question in the model's context of {spec.max_length}"
        )
    _within_bounds(spec, values, given)
    if preset and spec.block_causal and "small_block_size" not in given:
        values["small_block_size"] = math.gcd(values["small_block_size"], values["block_length"])
    _check_family(spec, values)
    values |= _steps(values)
    if values["stop_ids"] is None:
        values["stop_ids"] = spec.stop_ids
    if unknown := [token for token in values["stop_ids"] if token not in spec.stop_ids and not 0 <= token < spec.vocab]:
        raise ValueError(f"stop_ids: {fields.shown(unknown[0])} is none of the model's token ids, 0 to {spec.vocab - 1}")
    return DecodeConfig(**values)


def _within_bounds(spec: ModelSpec, values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Hold options to those that bound them: what was given is refused beyond, what was not is cut."""
    known = configs.known_options(values["decoder"], values["cache"])
    limits = {"context": spec.max_length}
    for name in sorted(known, key=lambda name: name != "block_length"):  # it bounds others
        bound = known[name].bounds.at_most
        limit = limits.get(bound)
        if limit is not None and values[name] is not None and values[name] > limit:
            if name in given:
                of = "the model's context of " if bound == "context" else f"{bound}="
                raise ValueError(f"{name}={values[name]} must be at most {of}{limit}")
            values[name] = limit
        if name == "block_length":
            limits[name] = values[name]


def _check_family(spec: ModelSpec, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a cache, a geometry or blocks that the family cannot run."""
    causal, cache = bool(spec.block_causal), values["cache"]
    if not registry.fits(cache, spec):
        raise ValueError(
            f"cache={registry.name_of(cache)!r} does not fit the family {spec.family!r}; "
            f"allowed are {', '.join(registry.caches_for(spec))}"
        )
    if values["prompt_cache"] not in (None, 0) and not registry.class_of(Kind.CACHES, cache).final():
        raise ValueError(
            f"prompt_cache={fields.shown(values['prompt_cache'])} needs a cache whose finished blocks never change (block, "
            f"sub_block, causal), and a family that has one; not cache={registry.name_of(cache)!r} of {spec.family!r}"
        )
    if (causal or spec.causal_context) and values["geometry"] is not None:
        raise ValueError(f"geometry is a choice of families that read both ways; {spec.family!r} has its own blocks")
    size = values["block_length"]
    if causal and -spec.max_length % size > OVERSHOOT:
        raise ValueError(f"block_length={size} must divide the model's context of {spec.max_length}, or nearly so")
    if causal and size % values["small_block_size"]:
        raise ValueError(f"small_block_size={values['small_block_size']} must divide block_length={size}")


def _steps(values: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and schedule as they run: none of an adaptive decoder, and of a fixed one no more steps than there are tokens.

    Following timesteps or a cosine, more steps than tokens are another plan than one token a step, and Dream's users ask for
    it; its length is bounded.
    """
    if not configs.keeps_to_steps(values["decoder"]):
        return dict.fromkeys(configs.STEPPED)
    length, schedule = values["gen_length"], values["schedule"] or "even"
    steps = values["steps"] or length
    if schedule == "even":
        steps = min(steps, length)
    elif steps > 100 * length:
        raise ValueError(f"steps={steps} must be at most 100 times gen_length={length}")
    return {"steps": steps, "schedule": schedule}


def runner(model: Model, config: DecodeConfig) -> Runner:
    """The runner that the config names, made once for each model: a captured runner keeps its graphs from run to run."""
    name = config.runner or ("cuda_graph" if model.device.type == "cuda" else "eager")
    runners = RUNNERS.setdefault(model, {})
    if name not in runners:
        runners[name] = registry.find("runners", name)()
    return runners[name]


def assemble(model: Model, config: DecodeConfig, rows: int | None = None) -> Decoding:
    """What a run of this model chooses. Raises ValueError for a combination that makes no sense.

    rows: requests at once; the config's batch_size, or one, unless given.
    """
    spec, given = model.spec, config.given()
    config = resolve(spec, config)
    for told in (
        configs.without_effect(given, config.decoder),
        _without_reuse(given, config),
        _without_sub_blocks(given, spec),
    ):
        if told:
            warnings.warn(told, stacklevel=1)  # one place, so that a process says it once
    outer = config.block_length
    size = config.small_block_size if spec.block_causal else min(outer, config.gen_length)
    geometry = _geometry(config, spec, size)
    name = config.name_of("cache")
    cache = configs.make(Kind.CACHES, config.cache, vars(config))
    lookback = _lookback(config, spec)
    reuse = _reuse(config, spec, outer, name) or cache.reuse(spec.layers, size + lookback)
    decoder = _discounted(config, _decoder(model, config, geometry, size, cache))
    positions = partial(_positions, config, spec, geometry, cache, reuse)
    decoder = _several_steps(model, config, decoder, positions, rows or config.batch_size or 1)
    sampler = Sampler(
        config.confidence, config.temperature, config.top_p, config.top_k, config.alg_temp, frozenset(decoder.needs)
    )
    _check_decoder(config, name, cache, decoder, sampler, reuse)
    _check_drafts(config, spec)
    return Decoding(
        geometry=geometry,
        cache=cache,
        decoder=decoder,
        sampler=sampler,
        block_length=size,
        stop_ids=config.stop_ids,
        block_causal=outer if spec.block_causal else 0,
        grid_at_prompt=spec.grid_at_prompt,
        causal=spec.causal_context,
        lookback=lookback,
        guidance=config.cfg_scale,
        reuse=reuse,
        prompt_cache=config.prompt_cache,
    )


def check_runner(model: Model, config: DecodeConfig) -> None:
    """Raise ValueError for a runner that the model's device cannot serve."""
    if config.runner == "cuda_graph" and model.device.type != "cuda":
        raise ValueError(
            f"runner='cuda_graph' needs a model on a GPU, and this one is on {model.device.type!r}; use 'eager'"
        )


def _geometry(config: DecodeConfig, spec: ModelSpec, size: int) -> Geometry:
    """How this run cuts answers into blocks, or sub-blocks, of `size` positions."""
    if config.geometry is not None:
        return _tiling(config.geometry, size)
    if spec.block_causal:
        return grid_aligned(config.block_length, size, spec.grid_at_prompt)
    if not spec.causal_context:
        return prompt_aligned(size)
    return sliding(size) if registry.class_of(Kind.DECODERS, config.decoder).drafts else causal_aligned(size)


def _tiling(geometry: Geometry, widest: int) -> Geometry:
    """A geometry of the user's, whose blocks must follow one another from the prompt to the end, none wider than the canvas
    was made for."""

    def blocks(prompt: int, total: int) -> list[Block]:
        try:
            out = list(geometry(prompt, total))
            ends = [prompt, *(block.stop for block in out)]
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"geometry={fields.shown(geometry)} is no function (prompt, total) -> blocks: {error}"
            ) from error
        if not out or ends[-1] != total or any(b.start != end or b.stop <= end for b, end in zip(out, ends, strict=False)):
            raise ValueError(f"geometry must cut [{prompt}, {total}) into blocks that follow one another, not {out}")
        if max(block.stop - block.start for block in out) > widest:
            raise ValueError(f"geometry cuts blocks wider than block_length={widest}; give the widest as block_length")
        return out

    return blocks


def _lookback(config: DecodeConfig, spec: ModelSpec) -> int:
    """Positions recomputed before each block, so that the decoder's rule decides about the block's first token too."""
    if config.first_token == "forced":
        return 0
    if not spec.shift or spec.block_causal:
        raise ValueError(f"first_token={config.first_token!r} is a choice of Dream only, not of the family {spec.family!r}")
    return spec.shift


def _check_decoder(config: DecodeConfig, name: str, cache: Any, decoder: Any, sampler: Sampler, reuse: Any) -> None:
    """Raises ValueError where branches, shadows or a lossless decoder meet an option they cannot be combined with."""
    asking = f"decoder={config.name_of('decoder')!r}"
    if config.lossless != 1 or config.attention_discount:
        several = f"lossless={config.lossless}"
        asking = several if config.lossless != 1 else f"attention_discount={config.attention_discount}"
    if decoder.lossless and not cache.pure:
        raise ValueError(
            f"{asking} is lossless, but a forward under cache={name!r} depends on the steps before it; use another cache"
        )
    if decoder.branches > 1 and (sampler.random(sampler.numbers) or config.cfg_scale):
        random = ", confidence other than random" if config.confidence == "random" else ""
        raise ValueError(f"{asking} tries several branches and needs temperature=0, alg_temp=0, cfg_scale=0{random}")
    if decoder.shadow and config.cfg_scale:
        raise ValueError(f"{asking} asks shadow queries and needs cfg_scale=0")
    if "attention" in decoder.needs and decoder.shadow:
        raise ValueError(f"{asking} asks shadow queries and cannot ask for attention too")
    if reuse and (decoder.branches > 1 or decoder.revocable() or decoder.drafts or "attention" in decoder.needs):
        partly = f"reuse_k={config.reuse_k}" if config.reuse_k > 1 else f"cache={name!r}"
        raise ValueError(f"{asking} needs layers that run for whole passes; {partly} skips positions")


def _check_drafts(config: DecodeConfig, spec: ModelSpec) -> None:
    """Raises ValueError where a decoder drafts and the family cannot verify, or guidance would ask for two prompts."""
    rule = config.name_of("decoder")
    if not registry.class_of(Kind.DECODERS, config.decoder).drafts:
        return
    in_blocks = registry.class_of(Kind.DECODERS, config.decoder).in_blocks
    if not (bool(spec.block_causal and spec.shift) if in_blocks else spec.causal_context):
        where = "blocks and a model that predicts the next token" if in_blocks else "a causal context"
        raise ValueError(
            f"decoder={rule!r} does not fit the family {spec.family!r}: drafts are verified by reading from left to right, "
            f"which needs a family with {where}"
        )
    if registry.class_of(Kind.CACHES, config.cache).begins:
        raise ValueError(
            f"decoder={rule!r} drafts in the passes after an opening; cache={config.name_of('cache')!r} begins blocks in it"
        )
    if config.cfg_scale:
        raise ValueError(f"decoder={rule!r} gives the tokens of autoregressive decoding and needs cfg_scale=0")


def _without_reuse(given: Mapping[str, Any], config: DecodeConfig) -> str:
    """What to say of options of layer reuse where no layer reuses; "" where there are none."""
    if config.reuse_k > 1 and config.layer_subset is not None:
        return ""
    named = [name for name in ("layer_subset", "trim_ratio", "trim_drift") if name in given]
    if not named:
        return ""
    missing = "reuse_k above 1" if config.reuse_k == 1 else "layer_subset"
    return f"{' and '.join(f'{n}={fields.shown(given[n])}' for n in named)}: no effect without {missing}"


def _without_sub_blocks(given: Mapping[str, Any], spec: ModelSpec) -> str:
    """What to say of the size of sub-blocks where blocks have none; "" where it was not given."""
    size, usual = given.get("small_block_size"), configs.OPTIONS["small_block_size"].default
    if spec.block_causal or size in (None, usual):  # a resolved config gives the usual one
        return ""
    return f"small_block_size={size} has no effect: {spec.family!r} decodes whole blocks; block_length is their size"


def _reuse(config: DecodeConfig, spec: ModelSpec, size: int, cache: str) -> LayerReuse | None:
    """Layer reuse as configured, None where it would change nothing."""
    if config.layer_subset is None:
        return None
    layers = subset_layers(config.layer_subset, spec.layers)
    if config.reuse_k == 1 or not layers or config.trim_ratio == 1:
        return None
    if cache not in ("block", "sub_block"):
        raise ValueError(f"reuse_k={config.reuse_k} needs cache='block' or 'sub_block' (Fast-dLLM v2), not {cache!r}")
    return LayerReuse(
        config.reuse_k, layers, config.reuse_mode, config.trim_ratio, config.trim_drift, size, cache == "sub_block"
    )


def _decoder(model: Model, config: DecodeConfig, geometry: Geometry, size: int, cache: Any) -> Any:
    """The decoder, with the fields that need the model or the geometry filled in."""
    if not isinstance(config.decoder, str | type):
        return config.decoder
    rule = registry.class_of(Kind.DECODERS, config.decoder)
    missing = registry.field_names(rule) - registry.settable(Kind.DECODERS, rule).keys()
    filled: dict[str, Any] = {}
    if "delimiters" in missing:
        newline = model.tokenizer("\n", add_special_tokens=False)["input_ids"] if model.tokenizer else ()
        filled["delimiters"] = tuple(newline)
    if "counts" in missing:
        filled["counts"] = _counts(model, config, geometry, size, cache)
    return configs.make(Kind.DECODERS, config.decoder, vars(config), **filled)


def _discounted(config: DecodeConfig, rule: Any) -> Any:
    """The decoder, or with the option `attention_discount` what lowers the confidences that it sees."""
    weight, name = config.attention_discount, registry.name_of(config.decoder)
    if not weight:
        return rule
    if why := _besides(rule):
        raise ValueError(f"attention_discount={weight} does not go with decoder={name!r}, which {why}")
    if config.confidence != "probability" or config.alg_temp:
        raise ValueError(f"attention_discount={weight} lowers probabilities and needs confidence='probability', alg_temp=0")
    return Discounted(rule, weight)


def _besides(rule: Any) -> str:
    """What a decoder does besides committing tokens for good, "" for nothing."""
    kinds = {"tries branches": rule.branches != 1, "remasks": rule.shadow, "edits": rule.edits, "drafts": rule.drafts}
    return next((kind for kind, does in kinds.items() if does), "")


def _several_steps(model: Model, config: DecodeConfig, rule: Any, positions: Callable[[], int], rows: int) -> Any:
    """The decoder, or with the option `lossless` what takes several of its steps in one forward.

    positions: says how many a forward of one row has, 0 where it can have no branches. rows: requests at once.
    """

    def over(inner: Any, name: str) -> Any:
        """`inner` with as many branches as pay."""
        device, calibration, each = model.device, model.calibration, positions()
        if not each:
            return inner
        count = calibration.best(name, device_name(device), device.type, rows, each, config.block_length)
        return Over(inner, calibration.graph(name, count)) if count > 1 else inner

    count, name = config.lossless, registry.name_of(config.decoder)
    if count == 1:
        return rule if rule.branches else over(rule.inner, "quota")
    if why := _besides(rule):
        raise ValueError(f"lossless={count} does not go with decoder={name!r}, which {why}")
    return over(rule, name) if count == 0 else Over(rule, model.calibration.graph(name, count))


def _positions(config: DecodeConfig, spec: ModelSpec, geometry: Geometry, cache: Any, reuse: Any) -> int:
    """How many a forward over a block recomputes, at a short prompt; 0 where no row may have branches: under a cache whose
    forwards depend on those before, with layer reuse, and where tokens are drawn or guided."""
    drawn = config.temperature or config.alg_temp or config.confidence == "random"
    if drawn or config.cfg_scale or reuse or not cache.pure:
        return 0
    prompt = max(1, min(SHORT_PROMPT, spec.max_length - config.gen_length))
    work = cache.step(geometry(prompt, prompt + config.gen_length)[0], Progress(1, 1, False))
    return work.stop - work.start


def device_name(device: torch.device) -> str:
    """As a table of measurements calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _counts(model: Model, config: DecodeConfig, geometry: Geometry, size: int, cache: Any) -> torch.Tensor:
    """[masks + 1, steps]: tokens to commit in each step of a block that opened with so many masks."""
    blocks = -(-config.gen_length // size)
    if config.steps < blocks:
        raise ValueError(f"steps={config.steps} must be at least the number of blocks, {blocks}")
    # A shifted model whose blocks open with a refresh gets the first token from it; Dream's schedule then starts at step 1.
    # Where blocks are opened by reading from left to right, the schedule spreads the other tokens over all of its steps.
    causal = model.spec.causal_context
    forced = bool(
        (causal or (model.spec.shift and not model.spec.block_causal and config.first_token == "forced"))
        and cache.open(geometry(1, 1 + config.gen_length)[0])
    )
    schedule = SCHEDULES[config.schedule]
    # By length: a last block that is cut short takes no steps from the others.
    per_block = config.steps * size // config.gen_length
    counts = torch.full((size + 1, max(size, per_block) + 1), float(size))
    for masks in range(1, size + 1):
        plan = [1, *schedule(masks - 1, per_block, int(not causal))] if forced else schedule(masks, per_block, 0)
        counts[masks, : len(plan)] = torch.tensor(plan, dtype=torch.float32)
    return counts.to(model.device)

# SPDX-License-Identifier: Apache-2.0
"""The one place that turns names into objects: a model and a config become a `Decoding`, and a runner to execute it."""

from __future__ import annotations

import dataclasses
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fastdllm import registry
from fastdllm.blocks import Geometry, grid_aligned, prompt_aligned
from fastdllm.config import DecodeConfig
from fastdllm.decoding import Decoding
from fastdllm.models import Model
from fastdllm.models.spec import ModelSpec
from fastdllm.presets import fitted
from fastdllm.reuse import LayerReuse, subset_layers
from fastdllm.runners.base import Runner
from fastdllm.sampling import Sampler
from fastdllm.schedules import SCHEDULES

RUNNERS: WeakKeyDictionary[Model, dict[str, Runner]] = WeakKeyDictionary()


def runner(model: Model, config: DecodeConfig) -> Runner:
    """The runner that the config names, made once for each model: a captured runner keeps its graphs from run to run."""
    name = config.runner or ("cuda_graph" if model.device.type == "cuda" else "eager")
    runners = RUNNERS.setdefault(model, {})
    if name not in runners:
        runners[name] = registry.find("runners", name)()
    return runners[name]


def assemble(model: Model, config: DecodeConfig) -> Decoding:
    """What a run of this model chooses. Raises ValueError for a combination that makes no sense."""
    spec = model.spec
    if config.preset:
        config = DecodeConfig(**fitted(config.given(), not spec.block_causal, bool(spec.shift)))
    outer = config.block_length or spec.defaults.get("block_length", 32)
    size = config.small_block_size if spec.block_causal else min(outer, config.gen_length)
    geometry = grid_aligned(outer, size) if spec.block_causal else prompt_aligned(size)
    name = config.cache or ("none" if config.cfg_scale else spec.defaults["cache"])
    kind = registry.find("caches", name)
    if kind.block_causal is not None and kind.block_causal != bool(spec.block_causal):
        fitting = [n for n in registry.names("caches") if _fits(n, bool(spec.block_causal))]
        raise ValueError(f"cache={name!r} does not fit the family {spec.family!r}; allowed are {', '.join(fitting)}")
    cache = kind(**_options(config, "caches", name, spec.defaults))
    decoder = _decoder(model, config, geometry, size, cache)
    sampler = Sampler(
        config.confidence, config.temperature, config.top_p, config.top_k, config.alg_temp, frozenset(decoder.needs)
    )
    stop_ids = spec.stop_ids if config.stop_ids is None else config.stop_ids
    lookback = _lookback(config, spec)
    reuse = _reuse(config, spec, outer, name) or cache.reuse(spec.layers, size + lookback)
    _check_decoder(config, name, cache, decoder, sampler, reuse)
    return Decoding(
        geometry=geometry,
        cache=cache,
        decoder=decoder,
        sampler=sampler,
        block_length=size,
        stop_ids=stop_ids,
        block_causal=outer if spec.block_causal else 0,
        lookback=lookback,
        guidance=config.cfg_scale,
        reuse=reuse,
    )


def _lookback(config: DecodeConfig, spec: ModelSpec) -> int:
    """Positions recomputed before each block, so that the decoder's rule decides about the block's first token too."""
    if config.first_token == "forced":
        return 0
    if not spec.shift or spec.block_causal:
        raise ValueError(f"first_token={config.first_token!r} is a choice of Dream alone, not of the family {spec.family!r}")
    return spec.shift


def _check_decoder(config: DecodeConfig, name: str, cache: Any, decoder: Any, sampler: Sampler, reuse: Any) -> None:
    """Raises ValueError where branches, shadows or a lossless decoder meet an option they cannot be combined with."""
    if decoder.lossless and not cache.pure:
        raise ValueError(
            f"decoder={config.decoder!r} is lossless, but a forward under cache={name!r} depends on the steps before it; "
            "use another cache"
        )
    if decoder.branches > 1 and (sampler.random(sampler.numbers) or config.cfg_scale):
        raise ValueError(
            f"decoder={config.decoder!r} tries several branches and needs temperature=0, alg_temp=0, cfg_scale=0"
        )
    if decoder.shadow and config.cfg_scale:
        raise ValueError(f"decoder={config.decoder!r} asks shadow queries and needs cfg_scale=0")
    if reuse and (decoder.branches > 1 or decoder.shadow):
        partly = f"reuse_k={config.reuse_k}" if config.reuse_k > 1 else f"cache={name!r}"
        raise ValueError(f"decoder={config.decoder!r} needs layers that run for whole passes; {partly} skips positions")


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


def _fits(name: str, block_causal: bool) -> bool:
    return registry.find("caches", name).block_causal in (None, block_causal)


def _options(config: DecodeConfig, kind: str, name: str, defaults: Any) -> dict[str, Any]:
    """What the config gives, over the family's defaults, over the component's own."""
    known = registry.options(kind, name)
    return {
        **{k: v for k, v in defaults.items() if k in known},
        **{k: v for k, v in config.options.items() if k in known},
    }


def _decoder(model: Model, config: DecodeConfig, geometry: Geometry, size: int, cache: Any) -> Any:
    rule, options = (
        registry.find("decoders", config.decoder),
        _options(config, "decoders", config.decoder, model.spec.defaults),
    )
    if any(f.name == "delimiters" for f in dataclasses.fields(rule)):
        newline = model.tokenizer("\n", add_special_tokens=False)["input_ids"] if model.tokenizer else ()
        options["delimiters"] = tuple(newline)
    if config.decoder != "quota":
        return rule(**options)
    blocks = -(-config.gen_length // size)
    steps = config.steps or config.gen_length
    if steps < blocks:
        raise ValueError(f"steps={steps} must be at least the number of blocks, {blocks}")
    # A shifted model whose blocks open with a refresh gets the first token from it; Dream's schedule then starts at step 1.
    forced = bool(
        model.spec.shift
        and not model.spec.block_causal
        and config.first_token == "forced"
        and cache.open(geometry(1, 1 + size)[0])
    )
    schedule = SCHEDULES[config.schedule or model.spec.defaults["schedule"]]
    per_block = steps * size // config.gen_length  # by length: a last block that is cut short takes no steps from the others
    counts = torch.full((size + 1, max(size, per_block) + 1), float(size))
    for masks in range(1, size + 1):
        plan = [1, *schedule(masks - 1, per_block, 1)] if forced else schedule(masks, per_block, 0)
        counts[masks, : len(plan)] = torch.tensor(plan, dtype=torch.float32)
    return rule(**options, counts=counts.to(model.device))

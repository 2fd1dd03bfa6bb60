# SPDX-License-Identifier: Apache-2.0
"""Options of the chat and of the web page: the command line's names, the published ones among them, as a `DecodeConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from fastdllm import registry
from fastdllm.build import assemble
from fastdllm.config import DecodeConfig
from fastdllm.models import Model, tiny_names

ALIASES = {"max_new_tokens": "gen_length", "block_size": "block_length", "bd_size": "block_length"}
SAMPLE_QUESTION = (
    "A student has 23 pencils. His sister has 7 fewer pencils than he has. How many pencils do they have together?"
)


@dataclasses.dataclass(frozen=True)
class About:
    """What a shipped model can do, a question to try, and how long its answers are."""

    note: str
    sample: str
    gen_length: int


WORD_PROBLEMS = About(
    "a small model that shows the method: it solves word problems of the kinds it was trained on, like the examples, and "
    "nothing else; it learnt from single questions, so start a new conversation before each",
    SAMPLE_QUESTION,
    128,
)
SUDOKU = About(
    "a small model that fills 4x4 sudokus and nothing else, each in a new conversation", "___3 __4_ 21__ 4___", 20
)


def about(name: str) -> About | None:
    """What there is to know of a shipped model; None for any other."""
    if name == "tiny-sudoku":
        return SUDOKU
    return WORD_PROBLEMS if name.startswith("tiny-") else None


def add_model_options(parser: argparse.ArgumentParser, default: str) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        "--model_path",
        default=default,
        metavar="NAME",
        help=f"shipped name ({', '.join(tiny_names())}), local folder or hub id (default {default})",
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    group.add_argument("--dtype", help="float32, bfloat16, float16 (default: bfloat16 on cuda, float32 elsewhere)")


def add_decode_options(parser: argparse.ArgumentParser, gen_length: int) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--max-new-tokens",
        "--max_new_tokens",
        "--gen_length",
        "--gen-length",
        dest="gen_length",
        type=int,
        default=gen_length,
        metavar="N",
        help=f"length of an answer (default {gen_length})",
    )
    group.add_argument(
        "--block-length",
        "--block_length",
        "--block_size",
        "--block-size",
        dest="block_length",
        type=int,
        metavar="N",
        help="positions decoded together (default 32)",
    )
    group.add_argument(
        "--cache",
        help=f"what is kept between forwards: {', '.join(registry.names('caches'))} (default: dual; v2: block)",
    )
    group.add_argument(
        "--decoder", help=f"what a forward commits: {', '.join(registry.names('decoders'))} (default threshold)"
    )
    group.add_argument("--threshold", type=float, metavar="P", help="commit tokens of at least this probability (0.9)")
    group.add_argument("--factor", type=float, metavar="F", help="the factor rule instead of the threshold (paper: 1.0)")
    group.add_argument("--steps", type=int, metavar="N", help="a fixed number of forwards for the answer (decoder quota)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 (default): the most likely token; above 0: drawn")
    group.add_argument(
        "--top-p", "--top_p", dest="top_p", type=float, metavar="P", help="draw from the likeliest tokens only"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the draws (default 0)")
    group.add_argument(
        "--set",
        dest="others",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of fastdllm.DecodeConfig, a decoder's or a cache's own among them; may be repeated",
    )
    group.add_argument("--use_cache", action="store_true", help="published name of --cache prefix")
    group.add_argument(
        "--if_cache_position", action="store_true", help="published: with --use_cache, the same as --cache dual"
    )


def config_of(args: argparse.Namespace) -> DecodeConfig:
    """The command line as a config; ValueError where options contradict each other."""
    names = (
        "gen_length",
        "block_length",
        "cache",
        "decoder",
        "threshold",
        "factor",
        "steps",
        "temperature",
        "top_p",
        "seed",
    )
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for item in args.others:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r} must be NAME=VALUE")
        given[name] = value
    if args.if_cache_position and not args.use_cache:
        raise ValueError("--if_cache_position needs --use_cache")
    if args.use_cache and args.cache:
        raise ValueError(f"--use_cache is the published name of --cache prefix; it is given beside --cache {args.cache}")
    if args.use_cache:
        given["cache"] = "dual" if args.if_cache_position else "prefix"
    # Adaptive decoders ignore steps; who asks for a number of steps and for no decoder means the one that keeps to it.
    if "steps" in given and not given.keys() & {"decoder", "threshold", "factor"}:
        given["decoder"] = "quota"
    return DecodeConfig(**given)


def change(config: DecodeConfig, changes: Mapping[str, Any]) -> DecodeConfig:
    """The config with some options changed by name.

    Naming a decoder's own option (`threshold`, `factor`) selects that decoder; options of the one before are left out.
    """
    changes = {ALIASES.get(name, name): value for name, value in ((k.replace("-", "_"), v) for k, v in changes.items())}
    if "preset" in changes:
        return config.replace(**changes)
    selected = [name for name in changes if name in registry.names("decoders")]
    if selected and "decoder" not in changes:
        changes["decoder"] = selected[0]
    elif "steps" in changes and "decoder" not in changes:
        changes["decoder"] = "quota"
    decoder, cache = (changes.get(kind, getattr(config, kind)) for kind in ("decoder", "cache"))
    known = registry.options("decoders", decoder) | (registry.options("caches", cache) if cache else {})
    kept = {k: v for k, v in config.given().items() if k not in config.options or k in known}
    return DecodeConfig(**{**kept, **changes})


def check(model: Model, config: DecodeConfig) -> None:
    """Raise ValueError when the model and the config do not fit: better at the setting than at the next answer."""
    if config.gen_length >= model.spec.max_length:
        raise ValueError(
            f"gen_length={config.gen_length} leaves no room for a question in the model's context of {model.spec.max_length}"
        )
    assemble(model, config)


def describe(model: Model, config: DecodeConfig) -> str:
    """The settings in one line, the family's defaults filled in."""
    cache = config.cache or model.spec.defaults["cache"]
    block = config.block_length or model.spec.defaults.get("block_length", 32)
    rule = assemble(model, config).decoder
    values = [
        f"{f.name} {value}" for f in dataclasses.fields(rule) if isinstance(value := getattr(rule, f.name), float | str)
    ]
    if config.decoder == "quota":
        values = [f"{config.steps or config.gen_length} steps"]
    rule_text = f"{config.decoder} ({', '.join(values)})" if values else config.decoder
    return f"cache {cache} · decoder {rule_text} · {config.gen_length} new tokens in blocks of {block}"


def describe_model(model: Model) -> str:
    parameters = sum(p.numel() for p in model.network.parameters()) / 1e6
    size = f"{parameters / 1e3:.1f} billion" if parameters >= 1e3 else f"{parameters:.1f} million"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.name} · {size} parameters · {dtype} on {model.device} · {model.spec.max_length} positions of context"

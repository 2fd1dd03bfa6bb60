# SPDX-License-Identifier: Apache-2.0
"""Options of the chat and of the page: the command line's names, the published ones among them, as a `DecodeConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import fastdllm
from fastdllm import config as configs
from fastdllm import registry
from fastdllm.build import assemble, check_runner, resolve
from fastdllm.config import ALIASES, OPTIONS, DecodeConfig
from fastdllm.fields import Option
from fastdllm.loading import add_place_options, load_options
from fastdllm.models import Model, tiny_names
from fastdllm.registry import Kind

NOT_TYPED = ("geometry", "batch_size")  # an object; a chat answers one prompt at a time


@dataclasses.dataclass(frozen=True)
class About:
    """What a shipped model can do, how long its answers are, and questions that it answers rightly under every setting of
    the page, each with the answer; the first one also around `words`, which stand at positions of the answer."""

    note: str
    gen_length: int
    examples: tuple[tuple[str, str], ...]
    words: str

    @property
    def sample(self) -> str:
        """A question to try."""
        return self.examples[0][0]


SAMPLE_QUESTION = (
    "A student has 23 pencils. His sister has 7 fewer pencils than he has. How many pencils do they have together?"
)
PUZZLES = (
    "Bobby finished half of a 404 piece puzzle, and then started and finished another 730 piece puzzle within an hour. "
    "How many puzzle pieces did Bobby place during that hour?",
    "932",
)
PIZZA = (
    "A pizza has 54 pieces. If Olivia can eat 3 pieces a day while Emma can eat 2 times as much, how many days will the "
    "pizza last?",
    "6",
)
WORD_PROBLEMS = About(
    "a small model that shows the method: it solves word problems of the kinds it was trained on, like the examples, and "
    "nothing else; it learnt from single questions, so each one starts a new conversation",
    128,
    ((SAMPLE_QUESTION, "39"), PUZZLES),
    "17:In all",
)
# tiny-dream loses a digit of the pencils under the presets balanced and fast.
DREAM = dataclasses.replace(WORD_PROBLEMS, examples=(PIZZA, PUZZLES), words="16:In all")
SUDOKU = About(
    "a small model that fills 4x4 sudokus and nothing else, each in a new conversation",
    20,
    (
        ("___3 __4_ 21__ 4___", "1423 3241 2134 4312"),
        ("4___ 21_3 ___2 __3_", "4321 2143 3412 1234"),
        ("_3__ 24__ _1_4 ___1", "1342 2413 3124 4231"),
    ),
    "0:1",
)
EXAMPLES = (  # for a model that nothing is known of, so without answers
    ("Natalia sold clips to 48 of her friends in April, and half as many in May. How many did she sell altogether?", ""),
    ("Write a Python function that tells whether a word is a palindrome.", ""),
    ("Explain in three sentences why the sky is blue.", ""),
)
EXAMPLE_WORDS = "0:Sure"


def about(name: str) -> About | None:
    """What there is to know of a shipped model; None for any other."""
    known = {"tiny-sudoku": SUDOKU, "tiny-dream": DREAM}
    return known.get(name, WORD_PROBLEMS if name.startswith("tiny-") else None)


def add_model_options(parser: argparse.ArgumentParser, default: str, more: bool = False) -> None:
    """more: the option may be repeated, and is then a list, None without it."""
    group = parser.add_argument_group("model")
    often: dict[str, Any] = {"action": "append"} if more else {"default": default}
    group.add_argument(
        "--model",
        "--model_path",
        metavar="NAME",
        help=f"shipped name ({', '.join(tiny_names())}), local folder or hub id{'; may be repeated' if more else ''} "
        f"(default {default})",
        **often,
    )
    add_place_options(group)


def loader(args: argparse.Namespace) -> Callable[[str], Model]:
    """Loads a model by name, as the command line says. Its adapter is for the model that it names, and for no other."""
    options = load_options(args)
    return lambda name: fastdllm.load(name, **options | ({} if name == args.model else {"adapter": None}))


def add_decode_options(parser: argparse.ArgumentParser, gen_length: int | None) -> None:
    """Every option of `DecodeConfig`, of the decoders and of the caches, documented by their own lines."""
    group = parser.add_argument_group("decoding", "Other spellings, such as --max-new-tokens, are understood as well.")
    added = [_add_option(group, o, gen_length if o.name == "gen_length" else None) for o in OPTIONS.values() if typed(o)]
    group.add_argument(
        "--set",
        dest="others",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any of these options, written as in the chat's /set; may be repeated",
    )
    group.add_argument("--use_cache", action="store_true", help="published name of --cache prefix")
    group.add_argument(
        "--if_cache_position", action="store_true", help="published: with --use_cache, the same as --cache dual"
    )
    group = parser.add_argument_group("options of one decoder or cache")
    added += [_add_option(group, option) for option in component_options()]
    parser.set_defaults(decoding=frozenset(filter(None, added)))


def typed(option: Option) -> bool:
    """Whether the option can be typed."""
    return option.name not in NOT_TYPED


def component_options() -> list[Option]:
    """The options of all decoders and caches, one by name; its line says what it does in each.

    Where a decoder carries the option's name, its line stands for all.
    """
    found: dict[str, dict[str, Option]] = {}
    for kind in (Kind.DECODERS, Kind.CACHES):
        for owner in registry.names(kind):
            for name, option in registry.settable(kind, owner).items():
                found.setdefault(name, {})[owner] = option
    out = []
    for name, owners in found.items():
        lines: dict[str, list[str]] = {}
        for owner, option in owners.items():
            lines.setdefault(owners.get(name, option).doc, []).append(owner)
        doc = " ".join(f"{', '.join(names)}: {line}" for line, names in lines.items())
        out.append(dataclasses.replace(option, default=None, doc=doc))
    return out


def _add_option(group: Any, option: Option, default: Any = None) -> str | None:
    """A flag with its documentation; with underscores and under its other names it is understood, and not listed.

    Returns the option's name; None where the command has a flag of that name, so that only --set reaches the option.
    """
    names = [option.name, *(alias for alias, own in ALIASES.items() if own == option.name)]
    first, *others = [f"--{name}" for given in names for name in dict.fromkeys((given.replace("_", "-"), given))]
    shown = option.default if default is None else default
    choices = str(option.bounds) if option.bounds.choices else ""
    notes = "; ".join(part for part in (choices, "" if shown is None else f"default {shown}") if part)
    text = f"{option.doc.rstrip('.')}{f' ({notes})' if notes else ''}".replace("%", "%%")
    metavar = option.type_name.split()[0].upper()
    try:
        group.add_argument(first, dest=option.name, default=default, metavar=metavar, help=text)
        if others:
            group.add_argument(*others, dest=option.name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    except argparse.ArgumentError:  # a registered rule may call its option --device
        return None
    return option.name


def config_of(args: argparse.Namespace) -> DecodeConfig:
    """The command line as a config; ValueError where options contradict each other."""
    given = {name: value for name, value in vars(args).items() if name in args.decoding and value is not None}
    for item in args.others:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r} must be NAME=VALUE")
        given[name.strip().replace("-", "_")] = value.strip()
    if args.if_cache_position and not args.use_cache:
        raise ValueError("--if_cache_position needs --use_cache")
    if args.use_cache and args.cache:
        raise ValueError(f"--use_cache is the published name of --cache prefix; it contradicts --cache {args.cache}")
    if args.use_cache:
        given["cache"] = "dual" if args.if_cache_position else "prefix"
    return DecodeConfig(**given)


def change(config: DecodeConfig, changes: Mapping[str, Any]) -> DecodeConfig:
    """The config with some options changed by name, dashes allowed; see `DecodeConfig.replace`."""
    return config.replace(**{name.replace("-", "_"): value for name, value in changes.items()})


def check(model: Model, config: DecodeConfig) -> None:
    """Raise ValueError when the model and the config do not fit: better at the setting than at the next answer."""
    check_runner(model, config)
    assemble(model, config)


def describe(model: Model, config: DecodeConfig) -> str:
    """The settings that really run, in one line."""
    run = resolve(model.spec, config)
    values = [f"{run.steps} steps"] if configs.keeps_to_steps(run.decoder) else []
    for name in registry.settable(Kind.DECODERS, run.decoder):
        value = getattr(run, name)
        if value is not False and (value or isinstance(value, float)):  # a number of 0 is none
            values.append(name if value is True else f"{name} {value}")
    decoder = run.name_of("decoder") + (f" ({', '.join(values)})" if values else "")
    guided = f" · guidance {run.cfg_scale}" if run.cfg_scale else ""
    if configs.without_effect(config.given(), run.decoder):
        guided += " · steps have no effect"
    cache = run.name_of("cache")
    return f"cache {cache} · decoder {decoder} · {run.gen_length} new tokens in blocks of {run.block_length}{guided}"


def describe_model(model: Model) -> str:
    parameters = sum(p.numel() for p in model.network.parameters()) / 1e6
    size = f"{parameters / 1e3:.1f} billion" if parameters >= 1e3 else f"{parameters:.1f} million"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.name} · {size} parameters · {dtype} on {model.device} · {model.spec.max_length} positions of context"

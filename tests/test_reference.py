# SPDX-License-Identifier: Apache-2.0
"""The pages that list every option, decoder and cache: they say what the declarations say."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

import fastdllm
from fastdllm import registry
from fastdllm.config import ALIASES, OPTIONS
from fastdllm.decoders.base import DecoderRule
from fastdllm.fields import Option, read
from fastdllm.reference import main, pages
from fastdllm.registry import Kind
from fastdllm.ui.options import NOT_TYPED, add_decode_options, add_model_options, component_options, config_of
from fastdllm.view import View

DOCS = Path(__file__).resolve().parents[1] / "docs"
COMPONENTS = [(kind, name) for kind in (Kind.DECODERS, Kind.CACHES) for name in registry.shipped(kind)]


@pytest.mark.parametrize("name", pages())
def test_the_pages_are_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == pages(DOCS)[name], "run: python -m fastdllm.reference docs"


def test_the_command_writes_the_pages(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == pages()


def test_what_was_measured_stands_next_to_every_component_but_those_that_were_not() -> None:
    unmeasured = set()
    for kind, name in COMPONENTS:
        page = pages(DOCS)[f"{kind.value}.md"]
        row = next(line for line in page.splitlines() if line.startswith(f"| [`{name}`]"))
        cost = row.strip("|").split("|")[4].strip()
        assert not cost or re.fullmatch(r"the reference|(v2: )?([+-]\d+\.\d|0\.0), [\d,.]+ instead of [\d,.]+", cost)
        unmeasured |= set() if cost else {name}
    # No shipped model reads its context causally, or was trained to edit.
    assert unmeasured == {"self_speculate", "causal", "joint_threshold"}


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_every_component_has_a_line_and_every_option_of_it_too(kind: Kind, name: str) -> None:
    page = pages()[f"{kind.value}.md"]
    row = next(line for line in page.splitlines() if line.startswith(f"| [`{name}`]"))
    assert all(cell.strip() for cell in row.strip("|").split("|")[:2]), "what it does"
    assert row.strip("|").split("|")[3].strip(), "when to use it: the first line of the class's docstring"
    for option in registry.settable(kind, name).values():
        assert_documented(option)
        default = "" if option.default is None else f"`{option.default}`"
        assert f"| `{option.name}` | {option.type_name} | {default} |" in page


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)
def test_every_option_has_a_line(option: Option) -> None:
    assert_documented(option)
    assert f"| `{option.name}` | {option.type_name} |" in pages()["options.md"]


def assert_documented(option: Option) -> None:
    assert option.doc.endswith(".") and "\n" not in option.doc and len(option.doc) <= 90, option


def test_an_option_without_a_note_is_an_option_too() -> None:
    class Plain:
        depth: int = 4

    assert read(Plain) == {"depth": Option("depth", int, 4)}


def test_the_chat_has_a_flag_for_every_option_and_alias() -> None:
    parser = argparse.ArgumentParser()
    add_decode_options(parser, 64)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    names = OPTIONS.keys() - set(NOT_TYPED) | {option.name for option in component_options()}
    names |= {alias for alias, own in ALIASES.items() if own in names}
    for name in names:
        assert {f"--{name}", f"--{name.replace('_', '-')}"} <= flags
    assert "commit tokens" not in parser.format_help() and OPTIONS["block_length"].doc.rstrip(".") in " ".join(
        parser.format_help().split()
    )


def test_a_registered_rule_may_call_its_options_as_it_likes() -> None:
    """Names of a cache's option, of a flag of the command, of another rule's option."""

    @dataclass(frozen=True)
    class Surest(DecoderRule):
        ratio: float = 0.5
        device: float = 0.25
        factor: float = 2.0

        def step(self, view: View) -> Tensor:
            return view.commit(view.masked)

    fastdllm.register("decoders", Surest)
    try:
        parser = argparse.ArgumentParser()
        add_model_options(parser, "tiny-llada")
        add_decode_options(parser, 64)
        args = parser.parse_args(["--device", "cpu", "--decoder", "surest", "--ratio", "0.7", "--set", "device=0.1"])
        assert config_of(args).given() == {"gen_length": 64, "decoder": "surest", "ratio": 0.7, "device": 0.1}
        assert args.device == "cpu"
    finally:
        fastdllm.registry.unregister("decoders", "surest")

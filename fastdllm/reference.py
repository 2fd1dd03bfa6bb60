# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/ that list every option, decoder and cache, written from their declarations.

`python -m fastdllm.reference docs` writes them; a test compares them with what this module says.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastdllm import registry, whole
from fastdllm.config import ALIASES, ELSEWHERE, OPTIONS
from fastdllm.fields import Option
from fastdllm.presets import OWN, PRESETS
from fastdllm.registry import Kind

NOTE = "<!-- Written by `python -m fastdllm.reference docs` from the declarations in fastdllm/ and docs/frontier.json. -->"
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
DECODERS = """# Decoders

A decoder says which of the scored tokens a forward commits. `decoder="NAME"` chooses one, and so does an option that carries
its name (`factor=1.0`). Its own options are given by name too: `generate(model, prompts, decoder="lopa", branches=2)`.

A rule of your own may be an object, `decoder=MyRule(0.8)`, or a name after `fastdllm.register("decoders", MyRule)`.
[A decoder or a cache](add_a_decoder.md) shows how to write one.

The last column of the table is measured: accuracy in points and forwards per answer, each against one token per step, at
the decoder's defaults. tiny-llada answered 500 problems with the `dual` cache. What is marked v2 ran on tiny-fast-dllm-v2
with the `block` cache. [Accuracy against forwards](frontier.md) has the intervals.
"""
CACHES = """# Caches

A cache says which positions a forward recomputes, and what they see of the others. `cache="NAME"` chooses one. Its own
options are given by name too: `generate(model, prompts, cache="vicinity", before=8)`.

A plan of your own may be an object, `cache=MyPlan()`, or a name after `fastdllm.register("caches", MyPlan)`.
[A decoder or a cache](add_a_decoder.md) shows how to write one.

The last column of the table is measured at threshold 0.9: accuracy in points against one token per step, and the positions
that an answer's forwards recompute. tiny-llada answered 500 problems. What is marked v2 ran on tiny-fast-dllm-v2. [Accuracy
against forwards](frontier.md) has the intervals.
"""
OPTIONS_PAGE = """# Options

These are the options of `fastdllm.generate`, `stream` and `DecodeConfig`, of lm-eval's `--model_args`, of the chat's flags
and its `/set`, and of the page's text field. Options of [decoders](decoders.md) and [caches](caches.md) are given likewise.

What is given overrides the preset, and the preset overrides the family's defaults. An option that carries a decoder's name
selects that decoder. `steps` or `schedule` without a decoder select `quota`, the decoder that keeps to a number of steps;
the others do not heed them. An empty default is the family's own choice.
"""
PRESETS_OPENING = """## Presets

A family with its own blocks and cache, such as SDAR and Nemotron, takes a preset's decoder only. A line that names a family
is what that family takes instead. `first_token` is Dream's.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def code(value: object) -> str:
    return "" if value is None else f"`{value}`"


def option_table(options: Iterable[Option]) -> str:
    rows = [(code(o.name), o.type_name, code(o.default), _allowed(o), o.doc) for o in options]
    return table(("option", "type", "default", "allowed", "what it does"), rows)


def _allowed(option: Option) -> str:
    bounds = option.bounds
    parts = [", ".join(map(code, bounds.allowed()))] if bounds.choices else [str(bounds)]
    if bounds.at_most and f"`{bounds.at_most}`" not in parts[0]:
        parts.append(f"at most the {bounds.at_most}")
    return ", ".join(filter(None, parts))


class Measured:
    """What components cost, from the studies in a folder of docs.

    folder: one with frontier.json; without it nothing is known.
    """

    def __init__(self, folder: Path | None) -> None:
        self.rows: dict[tuple[str, str], tuple[dict[str, float], dict[str, float]]] = {}  # its row, and the reference's
        if folder and (folder / "frontier.json").is_file():
            for study in json.loads((folder / "frontier.json").read_text(encoding="utf-8"))["studies"]:
                rows = {row["setting"]: row for row in study["settings"]}
                one = rows[study["reference"]]
                if study["template"] == "chat":
                    self.rows |= {(study["model"], setting): (row, one) for setting, row in rows.items()}

    def cost(self, kind: Kind, name: str) -> str:
        """`-4.8, 6.8 instead of 110.6`, or nothing if the component was not measured."""
        for model, mark, usual in (("tiny-llada", "", "dual"), ("tiny-fast-dllm-v2", "v2: ", "block")):
            for setting in self._settings(kind, name, usual):
                if found := self.rows.get((model, setting)):
                    row, one = found
                    if row is one:
                        return "the reference"
                    count = "forwards" if kind is Kind.DECODERS else "positions"
                    digits = ".1f" if kind is Kind.DECODERS else ",.0f"
                    lost = f"{100 * row['difference']:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")
                    return f"{mark}{lost}, {row[count]:{digits}} instead of {one[count]:{digits}}"
        return ""

    @staticmethod
    def _settings(kind: Kind, name: str, usual: str) -> list[str]:
        """How a study may spell a component at its defaults."""
        if kind is Kind.CACHES:
            return [f"threshold=0.9+{name}"]
        options = registry.settable(kind, name)
        levels = [f"={next(iter(options.values())).default}"] if options else []
        return [f"{name}{level}+{usual}" for level in [*levels, "", ":small_block_size=32"]]


def component_page(kind: Kind, opening: str, measured: Measured) -> str:
    """An overview of the components that ship, and a section for each with its options."""
    rows, sections = [], []
    for name in registry.shipped(kind):
        component = registry.find(kind, name)
        about = inspect.getdoc(sys.modules[component.__module__]) or ""
        what, paper = _sentence(about), _paper(about)
        use = (inspect.getdoc(component) or "").split("\n\n")[0].replace("\n", " ")
        rows.append((f"[`{name}`](#{name})", what, paper, use, measured.cost(kind, name)))
        options = registry.settable(kind, name)
        parts = [f"## {name}", use, *map(_linked, about.split("\n\n"))]
        parts.append(option_table(options.values()) if options else "It has no options.\n")
        sections.append("\n\n".join(parts))
    head = (kind.option, "what it does", "source", "when to use it", "what it cost")
    return "\n".join([NOTE, opening, table(head, rows), *sections])


def _sentence(about: str) -> str:
    """The first sentence of a module's docstring, without its source."""
    first = re.sub(r" ?\([^()]*arXiv[^()]*\)", "", about.split("\n\n")[0].replace("\n", " "))
    return first.split(". ")[0].rstrip(".") + "."


def _paper(about: str) -> str:
    """The sources that a module's docstring names."""
    found = re.search(r"\(([^()]*arXiv[^()]*)\)", about)
    return _linked(found[1].replace("\n", " ")) if found else ""


def _linked(text: str) -> str:
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def options_page() -> str:
    renamed = [(code(alias), code(own)) for alias, own in ALIASES.items()]
    chosen = {code(preset): given for preset, given in PRESETS.items()}
    chosen |= {f"{code(p)} of {code(family)}": given for family, own in OWN.items() for p, given in own.items()}
    names = list(dict.fromkeys(name for given in chosen.values() for name in given))
    presets = [(preset, *(code(given.get(name)) for name in names)) for preset, given in chosen.items()]
    return "\n".join(
        [
            NOTE,
            OPTIONS_PAGE,
            option_table(OPTIONS.values()),
            PRESETS_OPENING,
            table(("preset", *map(code, names)), presets),
            "## Other spellings\n\nThese mean the same option.\n",
            table(("spelling", "option"), renamed),
            "## Options of other libraries\n\nThese are refused, with this hint.\n",
            table(("name", "instead"), ((code(name), hint) for name, hint in ELSEWHERE.items())),
        ]
    )


def pages(folder: Path | None = None) -> dict[str, str]:
    """File name -> text of every page.

    folder: that of the documentation, whose data says what components cost.
    """
    measured = Measured(folder)
    return {
        "options.md": options_page(),
        "decoders.md": component_page(Kind.DECODERS, DECODERS, measured),
        "caches.md": component_page(Kind.CACHES, CACHES, measured),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages into a folder, `docs` unless another is named."""
    folder = Path(*(sys.argv[1:] if arguments is None else arguments) or ["docs"])
    for name, text in pages(folder).items():
        whole.write_text(folder / name, text)
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())

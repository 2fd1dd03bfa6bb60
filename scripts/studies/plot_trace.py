#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Draw a saved trace: which words each forward wrote, in which order, and where the model was in doubt.

    python -m scripts.studies.plot_trace trace.json -o trace.png
    python -m scripts.studies.plot_trace --model tiny-llada --set decoder=quota -o trace.png  (records an answer first)

A trace is what `fastdllm.watch` yields; `trace.save("trace.json")` and the chat's /trace write it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fastdllm import registry, whole
from fastdllm.arguments import Parser, output_file
from fastdllm.shell import one_line
from fastdllm.trace import Trace, watch
from fastdllm.ui.options import about

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NOW, BEFORE, DOUBT, GIVEN = "#1f5fbf", "#dce6f4", "#e08a1e", "#7a7a7a"
SURE = 0.5  # below this confidence a token was a doubtful choice


def draw(trace: Trace) -> Figure:
    """The figure: a row for each forward, a column for each token of the answer; what a forward wrote is dark, what stood
    there before is light, what is still open is white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    ids, now, steps = trace.answer(), trace.at(), len(trace.steps)
    shown = max(1, len(ids))
    figure, axis = plt.subplots(figsize=(min(24.0, 2.2 + 0.17 * shown), min(7.0, 2.2 + 0.3 * steps)), layout="constrained")
    colours = {
        "written in this forward": NOW,
        f"written with less than {SURE:.0%} confidence": DOUBT,
        "there already": BEFORE,
    }
    for position, token in enumerate(ids):
        written, sure = now.written[position], now.confidence[position]
        if token == trace.mask_id or written is None:
            continue
        doubtful = written > 0 and sure is not None and sure < SURE
        axis.add_patch(plt.Rectangle((position, written + 0.5), 1, steps - written, color=BEFORE, linewidth=0))
        colour = GIVEN if not written else DOUBT if doubtful else NOW
        axis.add_patch(
            plt.Rectangle((position, max(written, 1) - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.6)
        )
    for start in sorted({step.start for step in trace.steps if 0 < step.start < shown}):
        axis.axvline(start, color="0.4", linewidth=1, linestyle=":")
    words = [spelled(trace.texts.get(token, "")) if token != trace.mask_id else "" for token in ids]
    size = max(4.0, min(9.0, 24 * 72 / shown * 0.6))
    axis.set_xticks([p + 0.5 for p in range(len(words))], words, rotation=90, family="monospace", fontsize=size)
    axis.set(xlim=(0, shown), ylim=(steps + 0.5, 0.5), ylabel="forward")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title(trace), loc="left")
    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    if trace.fixed:
        handles.append(Patch(color=GIVEN, label="a constraint"))
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return figure


def spelled(text: str) -> str:
    """A token as a label: a line break shows, and a dollar sign starts no formula."""
    return text.replace("\n", "\u21b5").strip(" ").replace("$", r"\$") or "\u00b7"


def title(trace: Trace) -> str:
    """What the figure shows, in a sentence."""
    stats = trace.stats()
    if not stats.tokens:
        return f"{trace.model}: an empty answer in {stats.forwards} forwards"
    order = "left to right" if in_order(trace) else "not left to right"
    each = f"{stats.tokens_per_forward:.1f} a forward, " if stats.tokens_per_forward >= 1.05 else ""
    return f"{trace.model}: {stats.tokens} tokens in {stats.forwards} forwards, {each}{order}"


def in_order(trace: Trace) -> bool:
    """Whether no token of the answer was written before one to its left."""
    written = [w for w in trace.at().written[: len(trace.answer())] if w]
    return all(before <= after for before, after in pairwise(written))


def record(model: str, prompt: str, options: Sequence[str]) -> Trace:
    """Answer one question; options: "name=value" as `DecodeConfig` takes them."""
    import fastdllm

    config = fastdllm.DecodeConfig(**dict(option.split("=", 1) for option in options))
    *_, trace = watch(fastdllm.load(model), [[{"role": "user", "content": prompt}]], config)
    return trace


def parser() -> Parser:
    out = Parser(description=(__doc__ or "").partition("\n")[0])
    out.add_argument("trace", nargs="?", type=Path, help="JSON file that Trace.save wrote")
    out.add_argument("--prompt", help="record the answer to this question (default without a file: one the model knows)")
    out.add_argument("--model", default="tiny-llada", help="that answers (default tiny-llada)")
    out.add_argument("--set", dest="options", action="append", default=[], metavar="NAME=VALUE", help="for --prompt")
    out.add_argument("--save", type=output_file, help="also write the recorded trace here")
    out.add_argument("-o", "--output", type=output_file, default=Path("trace.png"), help="figure (default trace.png)")
    registry.add_import_option(out)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    own, args = registry.parse(parser, arguments)
    known = about(args.model)
    if args.trace is None and args.prompt is None:
        args.prompt = known.sample if known else None
    if (args.trace is None) == (args.prompt is None):
        own.error("give either a trace file or --prompt")
    try:
        trace = Trace.load(args.trace) if args.trace else record(args.model, args.prompt, args.options)
    except (OSError, ValueError) as error:
        own.error(str(error))
    if args.save:
        trace.save(args.save)
    with whole.replacing(args.output) as place:
        draw(trace).savefig(place, dpi=120)
    print(f"{title(trace)} -> {args.output}")
    return 0


if __name__ == "__main__":
    with one_line("plot_trace"):
        sys.exit(main())

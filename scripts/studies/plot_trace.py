#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Draw a saved trace: in which order the tokens came, how sure the model was, how many came per forward.

    python -m scripts.studies.plot_trace trace.json -o trace.png
    python -m scripts.studies.plot_trace --prompt "..." --model tiny-llada --set cache=none -o trace.png  (records one first)

A trace is what `fastdllm.trace.watch` yields; `trace.save("trace.json")` writes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fastdllm.trace import Trace, watch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(trace: Trace) -> Figure:
    """The figure. Left: one dot a token, at its position and the forward that wrote it; right: tokens of each forward;
    below: the confidence each token was written with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    now, steps = trace.at(), len(trace.steps)
    known = [(p, now.written[p], c) for p, c in enumerate(now.confidence) if c is not None]
    other = [(p, w) for p, w in enumerate(now.written) if w is not None and now.confidence[p] is None]
    curve = trace.filled()
    figure, axes = plt.subplots(
        2, 2, figsize=(10, 6.4), width_ratios=(5, 1), height_ratios=(3, 1), sharex="col", layout="constrained"
    )
    (order, counts), (confidence, corner) = axes
    corner.axis("off")

    # Confident tokens dark, doubtful ones light; the panel below is the scale.
    if known:
        positions, written, sure = zip(*known, strict=True)
        look = {"c": sure, "cmap": "viridis_r", "vmin": 0, "vmax": 1, "edgecolors": "0.3", "linewidths": 0.4, "zorder": 3}
        order.scatter(positions, written, s=26, **look)
        confidence.scatter(positions, sure, s=18, **look)
    if other:
        order.scatter(*zip(*other, strict=True), marker="D", s=26, color="tab:red", zorder=3, label="not scored")
        order.legend(loc="lower right")
    for start in sorted({step.start for step in trace.steps} - {0}):
        for axis in (order, confidence):
            axis.axvline(start - 0.5, color="0.75", linewidth=1)
    end = len(trace.answer())
    if end < trace.length:
        for axis in (order, confidence):
            axis.axvline(end - 0.5, color="tab:red", linestyle="--", linewidth=1)
        confidence.text(end - 1, 0.04, "the answer ends", color="tab:red", ha="right", va="bottom", fontsize=9)
    order.set(ylabel="forward", ylim=(steps + 0.6, 0.4), title=title(trace))
    confidence.set(xlabel="position of the answer", ylabel="confidence", ylim=(0, 1.05))
    counts.barh(range(1, steps + 1), [after - before for before, after in pairwise(curve)], color="0.4")
    counts.set(xlabel="positions filled", ylim=(steps + 0.6, 0.4))
    counts.tick_params(labelbottom=True)
    return figure


def title(trace: Trace) -> str:
    stats = trace.stats()
    cache = trace.config.get("cache", "default")
    return (
        f"{trace.model}, {trace.config.get('decoder', 'threshold')}, cache {cache}: {stats.tokens} tokens in "
        f"{stats.forwards} forwards, {stats.tokens_per_forward:.1f} tokens per forward"
    )


def record(model: str, prompt: str, options: Sequence[str]) -> Trace:
    """Answer one question; options: "name=value" as `DecodeConfig` takes them."""
    import fastdllm

    config = fastdllm.DecodeConfig(**dict(option.split("=", 1) for option in options))
    *_, trace = watch(fastdllm.load(model), [[{"role": "user", "content": prompt}]], config)
    return trace


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("trace", nargs="?", type=Path, help="JSON file that Trace.save wrote")
    parser.add_argument("--prompt", help="record a new trace of the answer to this question")
    parser.add_argument("--model", default="tiny-llada", help="for --prompt (default tiny-llada)")
    parser.add_argument("--set", dest="options", action="append", default=[], metavar="NAME=VALUE", help="for --prompt")
    parser.add_argument("--save", type=Path, help="also write the recorded trace here")
    parser.add_argument("-o", "--output", type=Path, default=Path("trace.png"), help="figure (default trace.png)")
    args = parser.parse_args(arguments)
    if (args.trace is None) == (args.prompt is None):
        parser.error("give either a trace file or --prompt")
    try:
        trace = Trace.load(args.trace) if args.trace else record(args.model, args.prompt, args.options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.save:
        trace.save(args.save)
    draw(trace).savefig(args.output, dpi=120)
    print(f"{title(trace)} -> {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

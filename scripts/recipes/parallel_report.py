# SPDX-License-Identifier: Apache-2.0
"""What `scripts.recipes.parallel` reports: accuracy against forwards an answer before and after, as a table and a figure.

A line of results is one setting: its name, block length and threshold, and of each problem whether the answer was right and
how many forwards it took.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdllm import whole
from scripts.results import read_json
from scripts.studies.paired import mcnemar

REFERENCE = "one token a step"


def sign_test(first: list[bool], second: list[bool]) -> float:
    """`paired.mcnemar` of the problems that only one of two solves."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    return mcnemar(only_first, only_second)


def report(before: list[dict], after: list[dict], out: Path) -> str:
    """A table of all settings, compared with the model as it was at one token a step, and a figure."""
    reference = next(line for line in before if line["setting"] == REFERENCE)
    lines = [
        f"{len(reference['right'])} problems; p: exact McNemar against the model as it was at {REFERENCE}.",
        "",
        "| model | setting | accuracy, % | forwards an answer | p |",
        "|---|---|---|---|---|",
    ]
    for model, results in (("before", before), ("after", after)):
        for line in sorted(results, key=lambda line: -mean(line["forwards"])):
            p = sign_test(reference["right"], line["right"])
            figures = f"{100 * mean(line['right']):.1f} | {mean(line['forwards']):.2f} | {p:.2g}"
            lines.append(f"| {model} | {line['setting']} | {figures} |")
    table = "\n".join(lines) + "\n"
    whole.write_text(out / "report.md", table)
    draw(before, after, out / "report.png")
    return table


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(before: list[dict], after: list[dict], path: Path) -> None:
    """Accuracy against forwards an answer, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, results, colour in (("before", before, "tab:gray"), ("after", after, "tab:blue")):
        for block in sorted({line["block"] for line in results if line["threshold"] < 1}):
            points = sorted((mean(x["forwards"]), 100 * mean(x["right"])) for x in results if x["block"] == block)
            axes.plot(
                *zip(*points, strict=True), ".-", color=colour, alpha=0.4 + 0.6 * block / 256, label=f"{name}, {block}"
            )
    level = next(100 * mean(line["right"]) for line in before if line["setting"] == REFERENCE)
    axes.axhline(level, color="black", linewidth=0.8, linestyle=":", label=f"before, {REFERENCE}")
    axes.set(xlabel="forwards an answer", ylabel="accuracy, %", xscale="log")
    axes.legend(title="model, block length", fontsize=8)
    with whole.replacing(path) as place:
        figure.savefig(place, dpi=150)
    plt.close(figure)


def results_of(path: Path, problems: int) -> list[dict]:
    """The results that an earlier session wrote. Raises ValueError for others."""
    found = read_json(path, list)
    kinds: dict[str, Any] = {"setting": str, "block": int, "threshold": (int, float), "right": list, "forwards": list}
    for line in found:
        if not isinstance(line, dict) or not all(isinstance(line.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(f"{path} holds no results of this recipe; without it they are measured anew")
        if len(line["right"]) != problems or len(line["forwards"]) != problems:
            raise ValueError(f"{path} is about {len(line['right'])} problems, not {problems}; give another --out")
    if REFERENCE not in [line["setting"] for line in found]:
        raise ValueError(f"{path} has no line of {REFERENCE!r}, which the others are compared with")
    return found

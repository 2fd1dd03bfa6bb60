# SPDX-License-Identifier: Apache-2.0
"""Statistics of settings that answered the same problems, as a table and as a plot; `pareto.py` collects the answers.

An answer is a dict with setting, problem, correct, forwards, positions, tokens, seconds (or None) and ids. Each setting is
paired with a reference, problem by problem: a bootstrap interval of the difference, and McNemar's exact test.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from fastdllm import whole

COSTS = ("forwards", "positions", "tokens")


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p: chance of a split at least this uneven of `lost + won` disagreements between equals."""
    n, least = lost + won, min(lost, won)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)


def interval(difference: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of per-problem differences [N]."""
    rng = np.random.default_rng(0)
    means = difference[rng.integers(0, len(difference), (draws, len(difference)))].mean(1)
    return tuple(np.percentile(means, (2.5, 97.5)).tolist())


def places_that_differ(a: list[int], b: list[int]) -> tuple[int, int]:
    """At how many places two answers differ, where one is shorter at all that it lacks; and how many places there are."""
    longest = max(len(a), len(b))
    return longest - sum(x == y for x, y in zip(a, b, strict=False)), longest


def by_setting(lines: list[dict[str, Any]], reference: str) -> dict[str, list[dict[str, Any]]]:
    """Setting -> its lines in the order of the problems; settings that lack a problem of the reference are left out."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["setting"], {})[line["problem"]] = line  # a timed line comes after the untimed one
    if reference not in found:
        raise ValueError(f"no lines of {reference}, which the others are paired with")
    keys = sorted(found[reference])
    for setting, answers in found.items():
        if not answers.keys() >= found[reference].keys():
            print(f"{setting}: {len(answers)} of {len(keys)} problems, left out")
    return {s: [a[i] for i in keys] for s, a in found.items() if a.keys() >= found[reference].keys()}


def correct(lines: list[dict[str, Any]]) -> np.ndarray:
    return np.array([x["correct"] for x in lines], float)


def summarise(grouped: dict[str, list[dict[str, Any]]], reference: str, presets: dict[str, str]) -> list[dict[str, Any]]:
    """One row per setting, most forwards first."""
    paired, rows = grouped[reference], []
    for setting, answers in grouped.items():
        difference = correct(answers) - correct(paired)
        low, high = interval(difference)
        places = [places_that_differ(a["ids"], b["ids"]) for a, b in zip(answers, paired, strict=True)]
        differ, total = np.sum(places, 0)
        cost = {name: np.array([x[name] for x in answers], float) for name in COSTS}
        timed = [x for x in answers if x["seconds"] is not None]
        rows.append(
            {
                "setting": setting,
                "preset": presets.get(setting, ""),
                "problems": len(answers),
                "accuracy": correct(answers).mean(),
                "difference": difference.mean(),
                "low": low,
                "high": high,
                "p": mcnemar(int((difference < 0).sum()), int((difference > 0).sum())),
                "same": np.mean([n == 0 for n, _ in places]),
                "tokens_differ": differ / total,
                "forwards": cost["forwards"].mean(),
                "positions": cost["positions"].mean(),
                "tokens_per_forward": cost["tokens"].sum() / cost["forwards"].sum(),
                "tokens_per_second": sum(x["tokens"] for x in timed) / sum(x["seconds"] for x in timed) if timed else None,
            }
        )
    rows.sort(key=lambda r: -r["forwards"])
    return [{k: round(float(v), 5) if isinstance(v, float) else v for k, v in r.items()} for r in rows]


def compare(a: dict[str, list[dict[str, Any]]], b: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """How two templates rank the settings that both have: 1 is the most accurate, equals share the better rank.

    Over all pairs of settings: Kendall's tau-a (ties count as neither; scipy has tau-b, which leaves them out), pairs that
    change places, and those of them whose order McNemar's test confirms at 5 % under both templates.
    """
    shared = [s for s in a if s in b]
    solved = [{s: correct(x[s]).sum() for s in shared} for x in (a, b)]
    ranks = {s: [1 + sum(int(other > of[s]) for other in of.values()) for of in solved] for s in shared}
    pairs, agree, change, clear = list(itertools.combinations(shared, 2)), 0, 0, []
    for one, other in pairs:
        differences = [correct(x[one]) - correct(x[other]) for x in (a, b)]
        same = differences[0].sum() * differences[1].sum()
        agree, change = agree + int(same > 0), change + int(same < 0)
        if same < 0 and all(mcnemar(int((d < 0).sum()), int((d > 0).sum())) < 0.05 for d in differences):
            clear.append([one, other])
    tau = (agree - change) / max(1, len(pairs))
    return {"pairs": len(pairs), "tau": round(tau, 3), "change": change, "clear": clear, "ranks": ranks}


def frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings that no other one beats in both accuracy and forwards, fewest forwards first."""
    best, found = -1.0, []
    for r in sorted(rows, key=lambda r: (r["forwards"], -r["accuracy"])):
        if r["accuracy"] > best:
            best = r["accuracy"]
            found.append(r)
    return found


def plot(panels: list[tuple[str, list[dict[str, Any]]]], columns: int, path: Path) -> None:
    """Accuracy over forwards, one mark a decoder; the line joins the frontier, whose bars are the paired intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(1 + 5.2 * columns, 1.2 + 4 * lines), dpi=100, squeeze=False)
    names = sorted({re.split("[+=:]", r["setting"])[0] for _, rows in panels for r in rows})
    colours = pyplot.get_cmap("tab20")
    marks = {name: {"color": colours(i % 20), "marker": "osD^v<>P*Xph"[i % 12]} for i, name in enumerate(names)}
    for axis, (title, rows) in zip(axes.flat, panels, strict=False):
        for name, mark in marks.items():
            own = [r for r in rows if re.split("[+=:]", r["setting"])[0] == name]
            x, y = [r["forwards"] for r in own], [100 * r["accuracy"] for r in own]
            axis.plot(x, y, linestyle="", alpha=0.8, label=name, **mark)
        best = frontier(rows)
        x, y = np.array([(r["forwards"], 100 * r["accuracy"]) for r in best]).T
        spread = 100 * np.array([(r["difference"] - r["low"], r["high"] - r["difference"]) for r in best]).T
        axis.errorbar(x, y, np.maximum(spread, 0), color="k", lw=0.8, elinewidth=0.6, alpha=0.5, zorder=1)
        for r in rows:
            if r["preset"]:
                place = (r["forwards"], 100 * r["accuracy"])
                axis.annotate(r["preset"], place, xytext=(5, -11), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", title=f"{title}, {rows[0]['problems']} problems")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("forwards per answer")
    figure.supylabel("accuracy, %")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.set_layout_engine("constrained")
    with whole.replacing(path) as partial:
        figure.savefig(partial)
    pyplot.close(figure)


def markdown(rows: list[dict[str, Any]]) -> str:
    head = "setting", "accuracy", "difference (95 %)", "p", "same", "tokens differ", "forwards", "positions"
    table = [[*head, "tokens/forward", "tokens/s"], ["---"] * (len(head) + 2)]
    for r in rows:
        speed = r["tokens_per_second"]
        table.append(
            [
                f"`{r['setting']}`" + (f" (preset `{r['preset']}`)" if r["preset"] else ""),
                f"{100 * r['accuracy']:.1f}",
                f"{100 * r['difference']:+.1f} ({100 * r['low']:+.1f}, {100 * r['high']:+.1f})",
                f"{r['p']:.3f}",
                f"{100 * r['same']:.1f}",
                f"{100 * r['tokens_differ']:.2f}",
                f"{r['forwards']:.2f}",
                f"{r['positions']:.0f}",
                f"{r['tokens_per_forward']:.2f}",
                "" if speed is None else f"{speed:.0f}",
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)
